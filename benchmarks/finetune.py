"""Tokens a second and peak memory of LoRA on a GPU: a converted model beside the softmax model it came from.

    python -m benchmarks.finetune [--shape 1b|8b] [--lengths 1024,8192] [--tokens 8192] [--layers N] [--out FILE]

Both train the same adapter (rank 8 on q, k, v and o) with the same loop in one process, on the shape's random bfloat16
weights: forward, loss, backward, AdamW. A step takes `--tokens` tokens, in rows of each length. The softmax model runs
through scaled_dot_product_attention, causal, without a mask; the converted one as
`finetune --compile` and `finetune` run it.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

import liger_deploy as ld
from benchmarks import report
from benchmarks.gpu import SHAPES
from benchmarks.gpu_step import REST, build
from liger_deploy.model.training import quicken

STEPS = 10


def adapted(shape: dict[str, Any], kind: str) -> Any:
    """The model with its adapter: "softmax", "liger pytorch" (op by op), "liger kernels", or "liger" (`--compile`)."""
    model = build(shape)
    if kind != "softmax":
        model = ld.linearize(model, ld.LigerConfig())
        if kind != "liger pytorch":
            quicken(model, compiled=kind == "liger")
    model.config.use_cache = False
    config = LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    return get_peft_model(model, config).train()


def train(shape: dict[str, Any], kind: str, length: int, tokens: int) -> dict[str, float]:
    """Median seconds of a step, tokens a second, and the peak of allocated bytes."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model = adapted(shape, kind)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(0, shape["vocab_size"], (tokens // length, length), device="cuda")
    seconds, begin = [], time.perf_counter()
    for step in range(STEPS + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        extra = {} if kind == "softmax" else {"segment_ids": torch.ones_like(ids)}
        loss = model(input_ids=ids, labels=ids, **extra).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        if step == 0:
            compile_s = time.perf_counter() - begin
    step_s = statistics.median(seconds[3:])
    return {
        "step_s": step_s, "tokens_s": ids.numel() / step_s, "peak_bytes": torch.cuda.max_memory_allocated(),
        "first_step_s": compile_s, "loss": float(loss),
    }  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1b", choices=tuple(SHAPES))
    parser.add_argument("--lengths", default="1024,8192")
    parser.add_argument("--tokens", type=int, default=8192, help="of a step")
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than the shape has")
    parser.add_argument("--kinds", default="softmax,liger,liger kernels")
    parser.add_argument("--out", type=Path, help="copy the result there")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape] | REST[arguments.shape]
    if arguments.layers:
        shape |= {"num_hidden_layers": arguments.layers}
    rows = []
    for length in map(int, arguments.lengths.split(",")):
        for kind in arguments.kinds.split(","):
            try:
                found: dict[str, Any] = train(shape, kind, length, arguments.tokens)
            except torch.OutOfMemoryError:
                found = {"out_of_memory": True}
            rows.append({"kind": kind, "length": length, **found})
            print(rows[-1], flush=True)
    path = report.write("gpu_finetune", report.command("python -m benchmarks.finetune"), {"rows": rows})
    if arguments.out:
        shutil.copy(path, arguments.out)


if __name__ == "__main__":
    main()
