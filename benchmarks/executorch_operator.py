"""This project's operator in an ExecuTorch program against the program that XNNPACK takes whole: step and prompt.

    python -m benchmarks.executorch_operator [--threads 1,2] [--folder DIR]

A Llama of 291 million parameters (`depth.py`'s), random weights, int4, exported with `--backend xnnpack` and `--backend
liger`. Both in one process for each number of threads, in turn. What is in --folder already is not made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import liger_deploy as ld
from benchmarks import report
from benchmarks.depth import checkpoints, liger
from liger_deploy.bundle import Bundle

BACKENDS = ("xnnpack", "liger")
ROUNDS, STEPS, PROMPT = 12, 10, 512


def measure(folder: Path, threads: int) -> dict[str, Any]:
    """Milliseconds of a step (median) and tokens a second of a prompt (the best of three), by backend."""
    sessions = {name: ld.load_session(Bundle.open(folder / name, False), threads=threads) for name in BACKENDS}
    step_ms: dict[str, list[float]] = {name: [] for name in BACKENDS}
    prompt_s: dict[str, list[float]] = {name: [] for name in BACKENDS}
    for _ in range(3):
        for name, session in sessions.items():
            session.reset()
            begin = time.perf_counter()
            session.prefill([list(range(PROMPT))])
            prompt_s[name].append(time.perf_counter() - begin)
    for turn in range(ROUNDS):
        for name, session in sessions.items():
            for step in range(STEPS):
                begin = time.perf_counter()
                session.step([turn * STEPS + step])
                step_ms[name].append(1e3 * (time.perf_counter() - begin))
    return {
        name: {"step_ms": statistics.median(step_ms[name]), "prefill_tokens_s": PROMPT / min(prompt_s[name])}
        for name in BACKENDS
    }


def make(folder: Path) -> None:
    """The two bundles."""
    _, model = checkpoints(folder)
    for name in BACKENDS:
        if not (folder / name).exists():
            options = ("--target", "executorch", "--quant", "int4", "--backend", name)
            liger("export", "--model", model, "--out", folder / name, *options)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--one", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.folder, arguments.one)))
        return
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        make(folder)
        for threads in arguments.threads.split(","):
            call = [sys.executable, "-m", "benchmarks.executorch_operator", "--folder", str(folder), "--one", threads]
            answer = subprocess.run(call, check=True, capture_output=True, text=True).stdout
            figures[threads] = json.loads(answer.strip().splitlines()[-1])
    report.write("executorch_operator", "python -m benchmarks.executorch_operator", figures)


if __name__ == "__main__":
    main()
