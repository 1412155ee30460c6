"""liger-run against the Python session on each runtime: one bundle, one prompt, the same steps, turn by turn in
processes of their own.

python -m benchmarks.native [--rounds N] [--steps N]        (after `make native`)
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import onnxruntime

import liger_deploy as ld
from benchmarks import report
from liger_deploy.runtimes.onnx import OPS

RUN = report.ROOT / "liger_deploy" / "native" / "liger-run"
PYTHON = """
import json, statistics, sys, time
from liger_deploy.bundle import Bundle
from liger_deploy.runtimes import load_session
session = load_session(Bundle.open(sys.argv[1]), threads=1)
logits, times = session.prefill([json.loads(sys.argv[2])]), []
for _ in range(int(sys.argv[3])):
    token, start = int(logits.argmax()), time.perf_counter()
    logits = session.step([token])
    times.append((time.perf_counter() - start) * 1e3)
print(json.dumps({"step_ms_median": statistics.median(times)}))
"""


def timed(words: list[str]) -> dict[str, Any]:
    """What a program printed, and its seconds from start to end less those of its steps."""
    runtime = next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*"))
    variables = {**os.environ, "LIGER_ONNXRUNTIME": str(runtime), "LIGER_ORT_OPS": str(OPS)}
    begin = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=variables)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | {"seconds": time.perf_counter() - begin}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=500)
    arguments = parser.parse_args()
    steps, prompt = str(arguments.steps), list(range(40, 140))
    targets, all_rounds = {}, {}
    for target in ("onnx", "executorch", "inductor"):
        with tempfile.TemporaryDirectory() as folder:
            bundle = str(ld.export_bundle(None, target, Path(folder) / "b").path)
            programs = {
                "liger-run": [str(RUN), bundle, "--tokens", " ".join(map(str, prompt)), "--threads", "1", "--bench"],
                "Python": [sys.executable, "-c", PYTHON, bundle, json.dumps(prompt)],
            }
            rounds = [
                {name: timed([*words, steps]) for name, words in programs.items()} for _ in range(arguments.rounds)
            ]
            starts = [{name: timed([*words, "2"])["seconds"] for name, words in programs.items()} for _ in range(5)]
        ratio = statistics.median(
            one["Python"]["step_ms_median"] / one["liger-run"]["step_ms_median"] for one in rounds
        )
        targets[target] = {"python_over_native": ratio} | {
            name: {
                "step_ms": statistics.median(one[name]["step_ms_median"] for one in rounds),
                "start_s": statistics.median(one[name] for one in starts),
            }
            for name in programs
        }
        all_rounds[target] = rounds
    sizes = {path.name: path.stat().st_size for path in (RUN, *sorted(RUN.parent.glob("*.so")))}
    everything = {"targets": targets, "bytes": sizes, "rounds": all_rounds}
    report.write("native", f"python -m benchmarks.native --rounds {arguments.rounds} --steps {steps}", everything)


if __name__ == "__main__":
    main()
