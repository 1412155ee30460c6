"""The inductor target's kernels on a GPU, against memory bandwidth measured in the same run.

    python -m benchmarks.gpu QUESTION [--out FILE]

layer: `liger::attention_step` at the 8B layer's shape, batch 1 to 256, float32 and bfloat16 state, and what
       flash-linear-attention takes for the recurrence alone, called as the reference code does (32 heads).
prefill: `liger::attention_prefill` for one 8B layer, 2k to 128k tokens, the window included, beside
       flash-linear-attention's `chunk_gla` (the recurrence alone) and causal scaled_dot_product_attention.
sequence: `liger::attention_sequence` for one layer, forward and backward, 8,192 tokens in rows of 1,024 and of 8,192,
       beside causal scaled_dot_product_attention without its rotary embedding.

Times are medians of CUDA-graph replays between events. `tests/test_triton.py` holds both kernels to float64.
"""

from __future__ import annotations

import argparse
import functools
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


def captured(call: Callable[[], Any], edit: Callable[[int], Any] | None = None) -> torch.cuda.CUDAGraph:
    """A CUDA graph of one call, after a warm-up; `edit` gets its handle before it is made ready."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph(keep_graph=edit is not None)
    with torch.cuda.graph(graph):
        call()
    if edit is not None:
        edit(graph.raw_cuda_graph())
        graph.instantiate()
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


def layer() -> list[dict[str, Any]]:
    """One attention step of the 8B layer: time, and bytes moved over it."""
    from liger_deploy.model.kernels.attention_step import attention_step

    found = []
    for batch in (1, 16, 64, 256):
        theirs = _fla_step(batch)
        for dtype in (torch.float32, torch.bfloat16):
            ms, size = attention_time(attention_step, batch, dtype)
            row = {"batch": batch, "state": str(dtype), "us": ms * 1e3, "gb_s": size / ms / 1e6, "fla_us": theirs}
            found.append(row)
            print(row, flush=True)
    return found


def _fla_step(batch: int) -> float | None:
    """Microseconds of the recurrence alone, keys and values repeated to 32 heads; None without the package."""
    try:
        from fla.ops.gla import fused_recurrent_gla
    except ImportError:
        return None
    q, k, v, g = (torch.randn(batch, 1, 32, 128, device="cuda").bfloat16() for _ in range(4))
    states = [torch.randn(batch, 32, 128, 128, device="cuda") for _ in range(max(1, min(4, 128 // batch)))]
    gate = torch.nn.functional.logsigmoid(g.float()) / 16

    def run() -> None:
        for state in states:
            fused_recurrent_gla(q, k, v, gk=gate, scale=1.0, initial_state=state, output_final_state=True)

    return median_ms(captured(run)) / len(states) * 1e3


LENGTHS = (2048, 8192, 32768, 131072)


def prefill_call(tokens: int, dtype: torch.dtype = torch.bfloat16) -> Callable[[], Any]:
    """One 8B layer's prefill from a state that has seen 1,000 tokens."""
    from liger_deploy.model.kernels.attention_prefill import attention_prefill

    g, r, d, w = 8, 4, 128, 64
    wide = torch.randn(1, tokens, (r + 2) * g * d, device="cuda").to(dtype)
    q, k, v = wide.split([r * g * d, g * d, g * d], 2)
    q, k, v = q.unflatten(2, (g, r, d)), k.unflatten(2, (g, d)), v.unflatten(2, (g, d))
    state = torch.randn(1, g, d, d, device="cuda")
    rings = [torch.randn(1, g, w, d, device="cuda").to(dtype) for _ in range(2)]
    rope = [torch.randn(w + 64, d, device="cuda") for _ in range(2)]
    length, valid = torch.tensor([1000], device="cuda"), torch.tensor([tokens], device="cuda")
    rest = ("gla", True, 16.0, 0.0, 0.5, 0.5, d**-0.5)
    return lambda: attention_prefill(q, k, v, k, length, valid, state, *rings, *rope, *rest)


def prefill() -> list[dict[str, Any]]:
    """Milliseconds of one layer at each length."""
    found = []
    for tokens in LENGTHS:
        row: dict[str, Any] = {"tokens": tokens, "ms": median_ms(captured(prefill_call(tokens)), 20)}
        q, k, v = (torch.randn(1, heads, tokens, 128, device="cuda").bfloat16() for heads in (32, 8, 8))
        attend = functools.partial(
            torch.nn.functional.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True
        )
        row["sdpa_ms"] = median_ms(captured(attend), 10)
        row["fla_ms"] = _fla_prefill(tokens)
        found.append(row)
        print(row, flush=True)
    return found


def _fla_prefill(tokens: int) -> float | None:
    """Milliseconds of the recurrence alone, keys, values and gates repeated to 32 heads; None without the package."""
    try:
        from fla.ops.gla import chunk_gla
    except ImportError:
        return None
    q, k, v = (torch.randn(1, tokens, 32, 128, device="cuda").bfloat16() for _ in range(3))
    gate, state = torch.nn.functional.logsigmoid(k.float()) / 16, torch.randn(1, 32, 128, 128, device="cuda")

    def run() -> None:
        chunk_gla(q, k, v, gate, scale=1.0, initial_state=state, output_final_state=True)

    for _ in range(3):
        run()
    times = []
    for _ in range(20):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def sequence_calls(shape: dict[str, int], length: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Forward and backward of one layer over 8,192 tokens: ours, and causal attention's."""
    from liger_deploy.model.kernels.attention_sequence import attention_sequence

    b, g, h, d, w = 8192 // length, shape["num_key_value_heads"], shape["num_attention_heads"], shape["head_dim"], 64
    q, up = (torch.randn(b, length, g, h // g, d, device="cuda").bfloat16().requires_grad_() for _ in range(2))
    k, v = (torch.randn(b, length, g, d, device="cuda").bfloat16().requires_grad_() for _ in range(2))
    write = torch.randn(b, length, g, d, device="cuda").softmax(-1).requires_grad_()
    gate = (torch.nn.functional.logsigmoid(torch.randn(b, length, g, d, device="cuda")) / 16).requires_grad_()
    segment = torch.ones(b, length, dtype=torch.long, device="cuda")
    rope = [torch.randn(2 * w, d, device="cuda") for _ in range(2)]

    def ours() -> Any:
        out = attention_sequence(q, k, v, write, gate, segment, *rope, True, 0.5, 0.5, d**-0.5, w)
        return torch.autograd.grad(out, (q, k, v, write, gate), up)

    heads = [x.detach().flatten(2, -2).transpose(1, 2).requires_grad_() for x in (q, k, v)]
    up_BHTV = up.detach().flatten(2, 3).transpose(1, 2)

    def attention() -> Any:
        out = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        return torch.autograd.grad(out, heads, up_BHTV)

    return ours, attention


def sequence() -> list[dict[str, Any]]:
    """Milliseconds of each shape's layer, and of its kernels."""
    found = []
    for name, shape in SHAPES.items():
        for length in (1024, 8192):
            ours, attention = sequence_calls(shape, length)
            row = {"shape": name, "length": length, "ms": median_ms(captured(ours), 20)}
            row |= {"sdpa_ms": median_ms(captured(attention), 20), "kernels_us": kernel_times(ours)}
            found.append(row)
            print(row, flush=True)
    return found


def kernel_times(call: Callable[[], Any]) -> dict[str, float]:
    """Microseconds of each kernel of a call."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return {e.key: round(e.self_device_time_total, 1) for e in profile.key_averages() if e.self_device_time_total}


def attention_time(attention_step: Any, batch: int, dtype: torch.dtype) -> tuple[float, int]:
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


QUESTIONS = {"layer": layer, "prefill": prefill, "sequence": sequence}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=tuple(QUESTIONS))
    parser.add_argument("--out", type=Path, help="copy the result there")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"bandwidth": bandwidth()}
    print(figures, flush=True)
    figures[arguments.question] = QUESTIONS[arguments.question]()
    path = report.write(f"gpu_{arguments.question}", report.command("python -m benchmarks.gpu"), figures)
    if arguments.out:
        shutil.copy(path, arguments.out)


if __name__ == "__main__":
    main()
