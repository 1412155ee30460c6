"""What every benchmark writes beside its figures: the machine, the versions, the commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "onnxscript", "numpy")


def command(program: str) -> str:
    """The program with this call's arguments, but for --out and its path."""
    words = sys.argv[1:]
    if "--out" in words:
        at = words.index("--out")
        del words[at : at + 2]
    return " ".join([program, *words])


def write(name: str, command: str, figures: object) -> Path:
    """Write benchmarks/results/NAME.json."""
    values = {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "commit": os.environ.get("COMMIT") or _commit(),  # the variable serves a machine that has no git history
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "python": platform.python_version()} | _gpu(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "figures": figures,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(values, indent=2) + "\n")
    print(json.dumps(figures, indent=2))
    return path


def _commit() -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    dirty = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return commit.stdout.strip() + ("+changes" if dirty else "")


def _gpu() -> dict[str, str]:
    import torch

    return {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
