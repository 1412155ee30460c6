"""What weight-only quantization gives on ONNX Runtime: time a token and sizes; float32, int8 and int4 side by side.

    python -m benchmarks.quant [--threads 1]

A Llama of 291 million parameters (hidden 1024, 20 layers, 16 query and 4 KV heads of 64, MLP 2816, vocabulary 32,000
untied) with random weights, batch 1. Steps of the bundles are interleaved; the embedded trained model's
divergence comes from `verify`. Its 4 bits are also chosen over a text (`--calibrate`), Python's standard library.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import liger_deploy as ld
from benchmarks.report import write
from liger_deploy.bundle import Bundle
from liger_deploy.runtimes.onnx import OnnxSession
from liger_deploy.verify import verify

SHAPE = {
    "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 20,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
}  # fmt: skip
QUANTS = {
    "none": ld.ExportOptions(),
    "int8": ld.ExportOptions(quant="int8"),
    "int4": ld.ExportOptions(quant="int4"),
    "int4, groups of 64": ld.ExportOptions(quant="int4", group_size=64),
    "int4, groups of 128": ld.ExportOptions(quant="int4", group_size=128),
}
WARM, STEPS, PROMPT = 8, 60, 512
MODULES = ("argparse", "ast", "inspect", "shutil", "tarfile", "zipfile")  # about 60,000 tokens


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", default="1")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = ld.linearize(LlamaForCausalLM(LlamaConfig(**SHAPE)).eval())
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        bundles = {q: Path(folder) / q for q in QUANTS}
        for quant, path in bundles.items():
            ld.export_bundle(model, "onnx", path, QUANTS[quant])
        sizes = {q: sum(p.stat().st_size for p in path.iterdir()) for q, path in bundles.items()}
        for threads in map(int, args.threads.split(",")):
            sessions = {q: OnnxSession(Bundle.open(path, False), threads) for q, path in bundles.items()}
            seconds: dict[str, list[float]] = {q: [] for q in QUANTS}
            prefill: dict[str, list[float]] = {q: [] for q in QUANTS}
            for turn in range(WARM + STEPS):
                for quant, session in sessions.items():
                    start = time.perf_counter()
                    session.step([turn])
                    if turn >= WARM:
                        seconds[quant].append(time.perf_counter() - start)
            for _ in range(3):
                for quant, session in sessions.items():
                    session.reset()
                    start = time.perf_counter()
                    session.prefill(list(range(PROMPT)))
                    prefill[quant].append(time.perf_counter() - start)
            for quant in QUANTS:
                rows.append({
                    "quant": quant,
                    "threads": threads,
                    "ms_a_token": 1e3 * statistics.median(seconds[quant]),
                    "speed_to_float32": statistics.median(seconds["none"]) / statistics.median(seconds[quant]),
                    "prefill_tokens_per_second": PROMPT / statistics.median(prefill[quant]),
                    "bundle_mb": sizes[quant] / 1e6,
                    "seconds": seconds[quant],
                })  # fmt: skip
        library, text = Path(os.__file__).parent, Path(folder) / "library.txt"
        text.write_text("\n".join((library / f"{name}.py").read_text(encoding="utf-8") for name in MODULES))
        plain = {quant: quality(options, Path(folder)) for quant, options in QUANTS.items() if quant != "none"}
        chosen = {
            quant: quality(dataclasses.replace(options, calibrate=str(text)), Path(folder))
            for quant, options in QUANTS.items()
            if options.quant == "int4"
        }
    write("quant", "python -m benchmarks.quant", {"rows": rows, "embedded": plain, "calibrated": chosen})
    return 0


def quality(options: ld.ExportOptions, folder: Path) -> dict[str, float]:
    """The embedded model's table."""
    with tempfile.TemporaryDirectory(dir=folder) as made:
        bundle = ld.export_bundle(None, "onnx", Path(made) / "bundle", options)
        return {row.check: row.value for row in verify(bundle.path, tokens=1000)}


if __name__ == "__main__":
    sys.exit(main())
