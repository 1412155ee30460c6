"""The inductor target's kernels on a GPU, cut in other ways: where the numbers in their `tiling` come from.

    python -m benchmarks.gpu_cuts KERNEL [--shape 1b|8b] [--bits 16|8|4] [--out FILE]

linear_step: each layer of the shape, its matrices in 16, 8 or 4 bits.
attention_step: one 8B layer, batch 16 to 256.
attention_prefill: one 8B layer, 2k and 32k tokens.
attention_sequence: one layer of both shapes, forward and backward, 8,192 tokens.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.gpu import (
    SHAPES,
    attention_time,
    bandwidth,
    captured,
    kernel_times,
    median_ms,
    prefill_call,
    sequence_calls,
)
from liger_deploy.model.packed import pack
from liger_deploy.runtimes.cuda_graphs import overlap_kernels


def linear_step(shape: dict[str, int], bits: int) -> list[dict[str, Any]]:
    """Time of one layer's product under each tiling; the best six."""
    d, f, kv = shape["hidden_size"], shape["intermediate_size"], shape["num_key_value_heads"] * shape["head_dim"]
    h = shape["num_attention_heads"] * shape["head_dim"]
    layers = {
        "qkv": (h + 2 * kv, d, True, False, False),
        "o": (d, h, False, False, True),
        "gate_up": (f, d, True, True, False),
        "down": (d, f, False, False, True),
        "head": (shape["vocab_size"], d, True, False, False),
    }
    found = []
    for name, layer in layers.items():
        for ms, size, tiling in _products(*layer, bits)[:6]:
            found.append({"layer": name, "tiling": tiling, "us": ms * 1e3, "gb_s": size / ms / 1e6})
            print(found[-1], flush=True)
    return found


def _products(
    rows: int, width: int, norm: bool, swiglu: bool, residual: bool, bits: int
) -> list[tuple[float, int, tuple[int, int, int]]]:
    """(milliseconds, bytes of the matrix, way), the fastest first; weights change from call to call, so that none is in
    the cache."""
    from liger_deploy.model.kernels import linear_step as module

    height = rows * (1 + swiglu)
    copies = max(2, min(24, (400 << 20) // (height * width * bits // 8)))
    matrix = torch.randn(height, width, device="cuda").bfloat16()
    packed = (matrix, None) if bits == 16 else pack(matrix, bits)
    matrices = [[x if x is None else x.clone() for x in packed] for _ in range(copies)]
    x, scale = (torch.randn(width, device="cuda").bfloat16() for _ in range(2))
    other = torch.randn(rows, device="cuda").bfloat16() if residual else None

    def run() -> None:
        for numbers, scales in matrices:
            module.linear_step(x, numbers, scales, scale if norm else None, 1e-5, swiglu, other)

    found, kept = [], (module.tiling, module.packed_tiling)
    # Rows of a program; columns of a load, or programs of a multiprocessor; warps.
    for rows_of_program, second, warps in itertools.product(
        (1, 2, 4, 8, 16), (1024, 2048, 4096) if bits == 16 else (1, 2, 4), (1, 2, 4, 8, 16)
    ):
        columns = second if bits == 16 else width
        share = rows_of_program * columns * bits * (1 + swiglu) // (1024 * warps)  # words that a thread holds
        if not 4 <= share <= 64 or columns >= 2 * width:
            continue
        way = (rows_of_program, second, warps)
        module.tiling = functools.partial(_always, way)  # type: ignore[assignment]
        packed_way = module.PackedTiling(rows_of_program, warps, second)
        module.packed_tiling = functools.partial(_always, packed_way)  # type: ignore[assignment]
        if (graph := _unless_too_large(captured, run, overlap_kernels)) is not None:
            size = sum(part.nbytes for part in matrices[0] if part is not None)
            found.append((median_ms(graph, 10) / copies, size, way))
    module.tiling, module.packed_tiling = kept
    return sorted(found)


def attention_step() -> list[dict[str, Any]]:
    """`attention_step` at batch 16 to 256, each way to cut it; the best five of each."""
    from liger_deploy.model.kernels import attention_step as module
    from liger_deploy.model.kernels.attention_step_many import Many

    found, kept = [], module.tiling
    cuts = ((128, 8, 1), (128, 16, 1), (128, 32, 1), (64, 8, 1), (64, 16, 1), (64, 64, 2), (128, 64, 2), (128, 32, 4))
    ways = [Many(*cut, stages) for cut in cuts for stages in (1, 2, 3)] + [64, 128]
    for batch, dtype in itertools.product((256, 64, 32, 16), (torch.float32, torch.bfloat16)):
        timed = []
        for way in ways:
            module.tiling = functools.partial(_always, way)  # type: ignore[assignment]
            if result := _unless_too_large(attention_time, module.attention_step, batch, dtype):
                timed.append((result[0] * 1e3, result[1] / result[0] / 1e6, way))
        for us, gb_s, way in sorted(timed, key=lambda one: one[0])[:5]:
            found.append({"batch": batch, "state": str(dtype), "us": us, "gb_s": gb_s, "tiling": way})
            print(found[-1], flush=True)
    module.tiling = kept
    return found


def attention_prefill() -> list[dict[str, Any]]:
    """Milliseconds at 2k and 32k tokens, each way to cut the kernels."""
    from liger_deploy.model.kernels import attention_prefill as module

    found = []
    ways: list[dict[str, int]] = [
        {},
        {"CHUNK": 32},
        {"CHUNK": 128},
        {"WARPS": 8},
        {"WRITE_STAGES": 1},
        {"KEYS": 16},
        {"SCAN": 512},
        {"AHEAD": 4},
    ]
    for way in _cut(module, ways):
        calls = {tokens: prefill_call(tokens) for tokens in (2048, 32768)}
        graphs = {tokens: _unless_too_large(captured, call) for tokens, call in calls.items()}
        if None in graphs.values():
            continue
        times = {tokens: median_ms(graph, 10) for tokens, graph in graphs.items()}
        found.append({"cut": way, "ms": times, "kernels_us": kernel_times(calls[32768])})
        print(found[-1], flush=True)
    return found


def attention_sequence() -> list[dict[str, Any]]:
    """Milliseconds of each way to cut the kernels, and of its kernels."""
    from liger_deploy.model.kernels import attention_sequence as module

    found = []
    ways: list[dict[str, int]] = [
        {}, {"STAGES": 2}, {"WARPS": 8}, {"CHUNK_WARPS": 4}, {"KEYS": 16}, {"SUB": 32}, {"SUB": 32, "WARPS": 8},
        {"AHEAD": 4}, {"AHEAD": 16}, {"SCAN": 256},
    ]  # fmt: skip
    for way in _cut(module, ways):
        for name, shape in SHAPES.items():
            ours = sequence_calls(shape, 8192)[0]
            if (graph := _unless_too_large(captured, ours)) is not None:
                times = {"ms": median_ms(graph, 10), "kernels_us": kernel_times(ours)}
                found.append({"shape": name, "cut": way, **times})
                print(found[-1], flush=True)
    return found


def _cut(module: Any, ways: list[dict[str, int]]) -> Iterator[dict[str, int]]:
    """Each way in turn, while the module's constants are cut so; its own again at the end."""
    kept = {name: getattr(module, name) for way in ways for name in way}
    try:
        for way in ways:
            for name, value in kept.items():
                setattr(module, name, way.get(name, value))
            yield way
    finally:
        for name, value in kept.items():
            setattr(module, name, value)


def _always(value: Any, *_: Any) -> Any:
    return value


def _unless_too_large(call: Callable[..., Any], *arguments: Any) -> Any:
    """What a call returns; None, and a line, where a kernel wants more shared memory or registers than there are."""
    try:
        return call(*arguments)
    except Exception as error:
        print(str(error).splitlines()[:1], flush=True)
        return None


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernel", choices=("linear_step", "attention_step", "attention_prefill", "attention_sequence"))
    parser.add_argument("--shape", default="1b", choices=tuple(SHAPES))
    parser.add_argument("--bits", type=int, default=16, choices=(16, 8, 4))
    parser.add_argument("--out", type=Path, help="copy the result there")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"bandwidth": bandwidth()}
    if arguments.kernel == "linear_step":
        figures["cuts"] = linear_step(SHAPES[arguments.shape], arguments.bits)
    else:
        figures["cuts"] = globals()[arguments.kernel]()
    path = report.write(f"gpu_cuts_{arguments.kernel}", report.command("python -m benchmarks.gpu_cuts"), figures)
    if arguments.out:
        shutil.copy(path, arguments.out)


if __name__ == "__main__":
    main()
