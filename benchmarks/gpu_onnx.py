"""ONNX bundles on ONNX Runtime's CUDA provider: right first, then the time of a step and of a prompt.

    python -m benchmarks.gpu_onnx [--out FILE]

The embedded model, exported in each precision, passes `verify`. A Llama of 291 million parameters (`depth.py`'s, random
weights) is timed in each; wall time, the logits in this process's memory. Needs onnxruntime-gpu.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import liger_deploy as ld
from benchmarks import report
from benchmarks.depth import SHAPES
from liger_deploy.verify import verify

PRECISIONS = ("float32", "float16", "int4", "bfloat16")
STEPS, PROMPT = 200, 2048


def options(precision: Any) -> ld.ExportOptions:
    """For a GPU, in this dtype or quantization."""
    kind = {"quant": precision} if "int" in precision else {"dtype": precision}
    return ld.ExportOptions(**kind, device="cuda")


def check(folder: Path) -> dict[str, Any]:
    """Each row of the embedded model's tables."""
    found: dict[str, Any] = {}
    for precision in PRECISIONS:
        bundle = ld.export_bundle(None, "onnx", folder / precision, options(precision))
        try:
            rows = verify(bundle.path, tokens=64)
            found[precision] = {row.check: [row.value, row.limit, row.passed] for row in rows}
        except ld.UserError as error:  # a precision that this ONNX Runtime does not have on this GPU
            found[precision] = {"error": str(error)}
        print(precision, found[precision], flush=True)
    return found


def times(folder: Path, precisions: list[str]) -> dict[str, Any]:
    """Milliseconds of a step (median, 10th and 90th percentile) and tokens a second of a prompt."""
    torch.manual_seed(0)
    model, found = ld.linearize(LlamaForCausalLM(LlamaConfig(**SHAPES["291m"])).eval()), {}
    for precision in precisions:
        session = ld.load_session(ld.export_bundle(model, "onnx", folder / f"291m-{precision}", options(precision)))
        for _ in range(2):
            session.reset()
            begin = time.perf_counter()
            session.prefill([list(range(PROMPT))])
            prompt_s = time.perf_counter() - begin
        steps = []
        for token in range(STEPS + 20):
            begin = time.perf_counter()
            session.step([token])
            steps.append(1e3 * (time.perf_counter() - begin))
        deciles = statistics.quantiles(steps[20:], n=10)
        found[precision] = {"step_ms": statistics.median(steps[20:]), "p10": deciles[0], "p90": deciles[-1]}
        found[precision]["prefill_tokens_s"] = PROMPT / prompt_s
        print(precision, found[precision], flush=True)
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="copy the result there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures: dict[str, Any] = {"onnxruntime": onnxruntime.__version__, "check": check(Path(folder))}
        _write(figures, arguments.out)  # the times may not end in the time that one has
        good = [p for p, rows in figures["check"].items() if "error" not in rows]
        _write(figures | {"times": times(Path(folder), good)}, arguments.out)


def _write(figures: dict[str, Any], copy: Path | None) -> None:
    path = report.write("gpu_onnx", report.command("python -m benchmarks.gpu_onnx"), figures)
    if copy:
        shutil.copy(path, copy)


if __name__ == "__main__":
    main()
