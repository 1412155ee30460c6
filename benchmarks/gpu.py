"""The inductor target's kernels on a GPU, against memory bandwidth measured in the same run.

    python -m benchmarks.gpu sweep|layer [--shape 1b|8b] [--out FILE]

sweep: tilings of `liger::linear_step`, each layer of the shape, with and without overlapping launches.
layer: `liger::attention_step` at the 8B layer's shape, batch 1 to 256, float32 and bfloat16 state.

Times are medians of CUDA-graph replays between events. `tests/test_triton.py` holds both kernels to float64.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import report

SHAPES: dict[str, dict[str, int]] = {
    "1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    },
    "8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    },
}  # fmt: skip


def median_ms(graph: torch.cuda.CUDAGraph, rounds: int = 50) -> float:
    """Median time of one replay."""
    times = []
    for _ in range(rounds + 5):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times[5:])


def captured(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of one call, after a warm-up."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def bandwidth() -> dict[str, float]:
    """GB/s of a large copy (bytes read and written) and of a large read."""
    x = torch.randn(1 << 30, device="cuda")
    y = torch.empty_like(x)
    copy = median_ms(captured(lambda: torch.add(x, 1, out=y)), 10)
    # A product with a narrow matrix reads all of x and writes next to nothing.
    wide, vector = x.view(-1, 8192).bfloat16(), torch.randn(8192, 1, device="cuda").bfloat16()
    read = median_ms(captured(lambda: wide @ vector), 20)
    total = median_ms(captured(lambda: x.sum()), 10)
    return {
        "copy_gb_s": 2 * x.nbytes / copy / 1e6,
        "read_gb_s": max(wide.nbytes / read, x.nbytes / total) / 1e6,
        "read_gemv_gb_s": wide.nbytes / read / 1e6,
        "read_sum_gb_s": x.nbytes / total / 1e6,
    }


def sweep(shape: dict[str, Any]) -> list[dict[str, Any]]:
    """Time of one layer's product under each tiling; the best six, and the best four that do not overlap."""
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
    for name, (rows, width, norm, swiglu, residual) in layers.items():
        size = rows * (1 + swiglu) * width * 2
        timed = sorted(_products(rows, width, norm, swiglu, residual))
        for ms, tiling in [*timed[:6], *[one for one in timed if not one[1][3]][:4]]:
            found.append({"layer": name, "tiling": tiling, "us": ms * 1e3, "gb_s": size / ms / 1e6})
            print(found[-1], flush=True)
    return found


def _products(
    rows: int, width: int, norm: bool, swiglu: bool, residual: bool
) -> list[tuple[float, tuple[int, int, int, bool]]]:
    """(milliseconds, (rows of a program, columns of a load, warps, overlap)); weights change from call to call, so that
    none is in the cache."""
    from liger_deploy.model.kernels.linear_step import _linear_step

    copies = max(2, min(24, (400 << 20) // (rows * width * 2)))
    weights = [torch.randn(rows * (1 + swiglu), width, device="cuda").bfloat16() for _ in range(copies)]
    x, scale = (torch.randn(width, device="cuda").bfloat16() for _ in range(2))
    out, other = (torch.randn(rows, device="cuda").bfloat16() for _ in range(2))

    def run(bn: int, bd: int, warps: int, overlap: bool) -> None:
        for weight in weights:
            _linear_step[(-(-rows // bn),)](
                x, weight, scale, other, out, 1e-5, N=rows, D=width, BN=bn, BD=bd,
                NORM=norm, SWIGLU=swiglu, RESIDUAL=residual, OVERLAP=overlap, num_warps=warps, launch_pdl=overlap,
            )  # fmt: skip

    found = []
    for bn, bd, warps, overlap in itertools.product((1, 2, 4, 8), (512, 1024, 2048, 4096), (2, 4, 8), (False, True)):
        tile = bn * bd * (1 + swiglu) // (32 * warps)  # elements a thread holds
        if 16 <= tile <= 128 and bd < 2 * width:
            graph = captured(functools.partial(run, bn, bd, warps, overlap))
            found.append((median_ms(graph, 10) / copies, (bn, bd, warps, overlap)))
    return found


def layer() -> list[dict[str, Any]]:
    """One attention step of the 8B layer: time, and bytes moved over it."""
    from liger_deploy.model.kernels.attention_step import attention_step

    found = []
    for batch, dtype in itertools.product((1, 16, 64, 256), (torch.float32, torch.bfloat16)):
        ms, size = _attention_time(attention_step, batch, dtype)
        found.append({"batch": batch, "state": str(dtype), "us": ms * 1e3, "gb_s": size / ms / 1e6})
        print(found[-1], flush=True)
    return found


def _attention_time(attention_step: Any, batch: int, dtype: torch.dtype) -> tuple[float, int]:
    """Milliseconds of a call, and the bytes that it must move: state in and out, window in, rows of q, k, v and out."""
    g, r, d, w = 8, 4, 128, 64
    sets = max(1, min(8, 512 // batch))
    wide = torch.randn(batch, (r + 2) * g * d, device="cuda").bfloat16()
    q, k, v = wide.split([r * g * d, g * d, g * d], 1)
    q, k, v = q.unflatten(1, (g, r, d)), k.unflatten(1, (g, d)), v.unflatten(1, (g, d))
    states = [torch.randn(batch, g, d, d, device="cuda").to(dtype) for _ in range(sets)]
    rings = [[torch.randn(batch, g, w, d, device="cuda").bfloat16() for _ in range(2)] for _ in range(sets)]
    rope = [torch.randn(w + 1, d, device="cuda") for _ in range(2)]
    length = torch.full((batch,), 1000, device="cuda")

    def run() -> None:
        for state, ring in zip(states, rings, strict=True):
            attention_step(q, k, v, k, length, state, *ring, *rope, "gla", True, 16.0, 0.0, 0.5, 0.5, d**-0.5)

    size = batch * g * (2 * d * d * states[0].element_size() + 2 * w * d * 2) + wide.nbytes + q.nbytes
    return median_ms(captured(run)) / sets, size


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=("sweep", "layer"))
    parser.add_argument("--shape", default="1b", choices=tuple(SHAPES))
    parser.add_argument("--out", type=Path, help="copy the result there")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"bandwidth": bandwidth()}
    print(figures, flush=True)
    if arguments.question == "sweep":
        figures["sweep"] = sweep(SHAPES[arguments.shape])
    else:
        figures["layer"] = layer()
    name = f"gpu_{arguments.question}" + (f"_{arguments.shape}" if arguments.question == "sweep" else "")
    path = report.write(name, report.command("python -m benchmarks.gpu"), figures)
    if arguments.out:
        shutil.copy(path, arguments.out)


if __name__ == "__main__":
    main()
