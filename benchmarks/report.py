"""What every benchmark writes beside its figures: the machine, the versions, the commit. And how tables read it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from liger_deploy.bench.machine import ROOT, document

RESULTS = ROOT / "benchmarks" / "results"


def command(program: str) -> str:
    """The program with this call's arguments, but for --out and its path."""
    words = sys.argv[1:]
    if "--out" in words:
        at = words.index("--out")
        del words[at : at + 2]
    return " ".join([program, *words])


def write(name: str, command: str, figures: object) -> Path:
    """Write benchmarks/results/NAME.json."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(document(command, figures), indent=2) + "\n")
    print(json.dumps(figures, indent=2))
    return path


def result(name: str) -> tuple[Any, str]:
    """The figures of benchmarks/results/NAME.json, and a line that says where they are from."""
    r = json.loads((RESULTS / f"{name}.json").read_text())
    machine = r["machine"].get("gpu") or f"{r['machine']['cpu']}, {r['machine']['cores']} cores"
    source = f"`{r['command']}`, {r['date']}, {machine}"
    return r["figures"], f"{source}: `benchmarks/results/{name}.json`"
