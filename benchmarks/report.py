"""What every benchmark writes beside its figures: the machine, the versions, the commit."""

from __future__ import annotations

import json
import sys
from pathlib import Path

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
