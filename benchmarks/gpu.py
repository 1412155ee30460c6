"""The inductor target on a GPU: kernels against memory bandwidth, and a whole step of an exported package.

    python -m benchmarks.gpu sweep|step|layer [--shape 1b|8b] [--out FILE]

sweep: tilings of `liger::linear_step`, each layer of the shape, with and without overlapping launches.
step:  exports the shape in bfloat16 with random weights, checks the session against PyTorch, and times its captured
       step at several depths, beside Hugging Face's model of the same shape with a static cache under CUDA graphs.
layer: `liger::attention_step` at the 8B layer's shape, batch 64 and 256, float32 and bfloat16 state.

Times are medians of CUDA-graph replays between events. Bandwidth is measured in the same run.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import report

SHAPES: dict[str, dict[str, Any]] = {
    "1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0,
                            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    },
    "8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
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
    """Time of one layer's product under each tiling, weights rotated so that none is in the cache."""
    from liger_deploy.model.kernels.linear_step import _linear_step

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
        copies = max(2, min(24, (400 << 20) // (rows * width * 2)))
        weights = [torch.randn(rows * (1 + swiglu), width, device="cuda").bfloat16() for _ in range(copies)]
        x, scale = (torch.randn(width, device="cuda").bfloat16() for _ in range(2))
        out, other = (torch.randn(rows, device="cuda").bfloat16() for _ in range(2))
        best: list[tuple[float, Any]] = []
        for bn, bd, warps, overlap in itertools.product(
            (1, 2, 4, 8, 16), (512, 1024, 2048, 4096), (2, 4, 8), (False, True)
        ):
            tile = bn * bd * (1 + swiglu) // (32 * warps)  # elements a thread holds
            if not 16 <= tile <= 128 or bd > triton_power(width):
                continue

            def run(bn: int = bn, bd: int = bd, warps: int = warps, overlap: bool = overlap) -> None:
                for weight in weights:
                    _linear_step[(-(-rows // bn),)](
                        x, weight, scale, other, out, 1e-5, N=rows, D=width, BN=bn, BD=bd,
                        NORM=norm, SWIGLU=swiglu, RESIDUAL=residual, OVERLAP=overlap,
                        num_warps=warps, launch_pdl=overlap,
                    )  # fmt: skip

            try:
                ms = median_ms(captured(run), 10) / copies
            except Exception as error:
                print(name, bn, bd, warps, overlap, str(error).splitlines()[0])
                continue
            best.append((ms, (bn, bd, warps, overlap)))
        best.sort()
        size = rows * (1 + swiglu) * width * 2
        for ms, tiling in [*best[:6], *[b for b in best if not b[1][3]][:4]]:
            found.append({"layer": name, "tiling": tiling, "us": ms * 1e3, "gb_s": size / ms / 1e6})
            print(found[-1])
        del weights
    return found


def triton_power(width: int) -> int:
    """Least power of two that is not less."""
    return 1 << (width - 1).bit_length()


def build(shape: dict[str, Any]) -> Any:
    """A Hugging Face Llama of this shape on the GPU, bfloat16, random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**shape))
    torch.set_default_dtype(before)
    return model.eval()


def step(shape: dict[str, Any], depths: list[int], peer_depths: list[int]) -> dict[str, Any]:
    """The exported session's step at each depth, and Hugging Face's."""
    import liger_deploy as ld
    from liger_deploy.runtimes import inductor as runtime
    from liger_deploy.runtimes.eager import EagerSession

    model = ld.linearize(build(shape), ld.LigerConfig())
    size = sum(p.nbytes for p in model.parameters())
    if not shape["tie_word_embeddings"]:
        size -= model.get_input_embeddings().weight.nbytes
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        options = ld.ExportOptions(dtype="bfloat16", batch=1, device="cuda", chunk=64)
        bundle = ld.export_bundle(model, "inductor", Path(folder) / "b", options)
        export_s = time.perf_counter() - begin
        print("export", export_s, flush=True)
        begin = time.perf_counter()
        session = ld.load_session(bundle)
        load_s = time.perf_counter() - begin
        files = {name: info.size for name, info in bundle.manifest.files.items()}
    oracle = EagerSession(model)
    prompt = torch.randint(0, shape["vocab_size"], (700,)).tolist()
    ours, theirs = (x.prefill([prompt]) for x in (session, oracle))
    worst = [relative(ours, theirs)]
    for token in prompt[:8]:
        ours, theirs = (x.step([token]) for x in (session, oracle))
        worst.append(relative(ours, theirs))
    print("differences", worst, flush=True)
    figures: dict[str, Any] = {"weight_bytes": size, "export_s": export_s, "load_s": load_s, "files": files}
    figures["difference"] = max(worst)
    overlap = runtime.overlap_kernels
    for name, edit in (("step_ms_in_turn", lambda graph: 0), ("step_ms", overlap)):
        runtime.overlap_kernels = edit
        session.reset()
        after = [
            session.step([token]) for token in prompt[:6]
        ]  # the first as it is, the second captured, then replayed
        figures[name] = {}
        for depth in depths:
            session._tensors[-1].fill_(depth)
            figures[name][depth] = median_ms(session._graph._graph)
        print(name, figures[name], float(after[-1].sum()), flush=True)
    session.reset()
    oracle.reset()
    figures["difference_replayed"] = max(relative(session.step([t]), oracle.step([t])) for t in prompt[:32])
    start = time.perf_counter()
    for token in prompt[:200]:
        session.step([token])
    figures["wall_ms"] = (time.perf_counter() - start) * 5
    begin = time.perf_counter()
    session.reset()
    session.prefill([prompt[:512] * 4])
    figures["prefill_tokens_s"] = 2048 / (time.perf_counter() - begin)
    print(json.dumps(figures), flush=True)
    del session, oracle, model
    gc.collect()
    torch.cuda.empty_cache()
    figures["peer_ms"] = {depth: peer(shape, depth) for depth in peer_depths}
    return figures


def relative(ours: Any, theirs: Any) -> float:
    """Largest difference over the largest value."""
    return float(abs(ours - theirs).max() / abs(theirs).max())


def peer(shape: dict[str, Any], depth: int) -> float:
    """Hugging Face: compiled forward with a static cache filled to `depth`, under a CUDA graph."""
    from transformers import StaticCache

    torch._dynamo.reset()
    model = build(shape)
    cache = StaticCache(config=model.config, max_cache_len=depth)
    token, position = torch.zeros(1, 1, dtype=torch.long, device="cuda"), torch.tensor([[depth - 1]], device="cuda")
    with torch.no_grad():
        model(torch.zeros(1, 8, dtype=torch.long, device="cuda"), past_key_values=cache, use_cache=True)
        compiled = torch.compile(model.forward, fullgraph=False)

        def call() -> Any:
            return compiled(token, past_key_values=cache, position_ids=position, use_cache=True).logits

        for _ in range(3):
            call()
        ms = median_ms(captured(call))
    print("peer", depth, ms, flush=True)
    del model, cache, compiled
    gc.collect()
    torch.cuda.empty_cache()
    return ms


def layer() -> list[dict[str, Any]]:
    """One attention step of the 8B layer: time, and bytes moved over it."""
    from liger_deploy.model.kernels import attention_step as kernel

    chosen = (kernel.BLOCK_V, kernel.BLOCK_H, kernel.WARPS)
    found = []
    for batch, dtype in itertools.product((1, 16, 64, 256), (torch.float32, torch.bfloat16)):
        tilings = [chosen]
        if "TILINGS" in os.environ and batch == 256:
            tilings += list(itertools.product((16, 32, 64), (16, 32), (4, 8)))
        for tiling in tilings:
            kernel.BLOCK_V, kernel.BLOCK_H, kernel.WARPS = tiling
            ms, size = _attention_time(kernel.attention_step, batch, dtype)
            found.append(
                {"batch": batch, "state": str(dtype), "tiling": tiling, "us": ms * 1e3, "gb_s": size / ms / 1e6}
            )
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
    parser.add_argument("question", choices=("sweep", "step", "layer"))
    parser.add_argument("--shape", default="1b", choices=tuple(SHAPES))
    parser.add_argument("--peer-depths", default="1024,16384,65536")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    figures: dict[str, Any] = {"bandwidth": bandwidth()}
    print(figures, flush=True)
    if arguments.question == "sweep":
        figures["sweep"] = sweep(shape)
    elif arguments.question == "layer":
        figures["layer"] = layer()
    else:
        peers = [int(depth) for depth in arguments.peer_depths.split(",") if depth]
        figures["step"] = step(shape, [1024, 16384, 65536, 1 << 20], peers)
    name = f"gpu_{arguments.question}" + (f"_{arguments.shape}" if arguments.question != "layer" else "")
    path = report.write(name, " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]), figures)
    if arguments.out:
        shutil.copy(path, arguments.out)


if __name__ == "__main__":
    main()
