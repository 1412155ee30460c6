"""A whole step of an exported package on a GPU: right first, then against memory bandwidth and against Hugging Face.

    python -m benchmarks.gpu_step check|step|quant|throughput [--shape 1b|8b] [--layers N] [--out FILE]

check: the embedded model exported for CUDA passes `verify` in each precision, and in float32 its state continues on the
       CPU, and from there on the GPU again.
step:  exports the shape in bfloat16 with random weights, compares the session with PyTorch, and times its captured step
       at several positions beside Hugging Face's model with a static cache under CUDA graphs.
quant: exports the shape in bfloat16, 8 and 4 bits, at once, and times their captured steps in turn.
throughput: exports the shape in bfloat16 for any number of rows, and times the captured step of as many sequences as
       fit into the GPU's memory at 32k tokens, beside Hugging Face's model with as many as fit with its static cache.

Times are medians of CUDA-graph replays between events. Bandwidth is measured in the same run.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import gc
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import liger_deploy as ld
from benchmarks import report
from benchmarks.gpu import SHAPES, bandwidth, captured, median_ms
from liger_deploy.bundle import Bundle
from liger_deploy.export import EMBEDDED
from liger_deploy.generate import generate
from liger_deploy.runtimes import inductor as runtime
from liger_deploy.runtimes.inductor import InductorSession
from liger_deploy.verify import verify

DEPTHS = (1 << 10, 1 << 14, 1 << 16, 1 << 20)
# What gpu.SHAPES leaves out: the rest of the public configs.
REST: dict[str, dict[str, Any]] = {
    "1b": {
        "num_hidden_layers": 16, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0,
                            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    },
    "8b": {
        "num_hidden_layers": 32, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    },
}  # fmt: skip


def build(shape: dict[str, Any]) -> Any:
    """A Hugging Face Llama of this shape on the GPU, bfloat16, random weights."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**shape, rms_norm_eps=1e-5, max_position_embeddings=131072))
    torch.set_default_dtype(before)
    return model.eval()


def check(precisions: list[Any]) -> dict[str, Any]:
    """Worst value over its limit in each table, and greedy tokens of a state that went to the CPU and back."""
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for precision, seconds in _export_all(None, Path(folder), precisions).items():
            figures[f"export_s {precision}"] = seconds
            rows = verify(Path(folder) / precision, tokens=64)
            figures[precision] = {row.check: [row.value, row.limit, row.passed] for row in rows}
            print(precision, figures[precision], flush=True)
        if "float32" in precisions:
            figures["tokens_of_a_moved_state_equal"] = moved_state(Path(folder) / "float32")
    return figures


def _export_all(shape: dict[str, Any] | None, folder: Path, precisions: list[Any]) -> dict[str, float]:
    """Exports the embedded model, or a shape with random weights, in each precision, side by side; seconds of each."""
    gpus = torch.cuda.device_count()
    large = shape is not None and shape["hidden_size"] > 2048  # one such export takes half of a GPU
    workers = 1 if large and gpus == 1 else len(precisions)
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        made = {name: pool.submit(_export, shape, folder / name, name, i % gpus) for i, name in enumerate(precisions)}
        return {name: future.result() for name, future in made.items()}


def _export(shape: dict[str, Any] | None, out: Path, precision: Any, gpu: int) -> float:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7").split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[gpu]  # inside, it is the first: where a package will run
    model = ld.linearize(build(shape), ld.LigerConfig()) if shape else None
    kind = {"dtype": "bfloat16", "quant": precision} if "int" in precision else {"dtype": precision}
    begin = time.perf_counter()
    options = ld.ExportOptions(**kind, batch=1, device="cuda", chunk=512 if shape else 32)
    ld.export_bundle(model, "inductor", out, options)
    return time.perf_counter() - begin


def moved_state(bundle: Path) -> bool:
    """GPU, CPU, GPU take turns on one state; whether the greedy tokens are those of the CPU alone."""
    prompt, on_gpu, on_cpu = list(range(40, 140)), ld.load_session(bundle), ld.EagerSession(ld.load_model(EMBEDDED))
    tokens, logits = [], on_gpu.prefill([prompt])
    for session, other in ((on_gpu, on_cpu), (on_cpu, on_gpu), (on_gpu, on_cpu)):
        for _ in range(16):
            tokens.append(int(logits.argmax()))
            logits = session.step([tokens[-1]])
        other.load_state(session.state())
    on_cpu.reset()
    return tokens == list(generate(on_cpu, prompt, len(tokens)))


def step(shape: dict[str, Any], peer_depths: list[int]) -> dict[str, Any]:
    """The exported session's step at each position, and Hugging Face's."""
    model = ld.linearize(build(shape), ld.LigerConfig())
    size = sum(p.nbytes for p in model.parameters())
    if not shape["tie_word_embeddings"]:
        size -= model.get_input_embeddings().weight.nbytes  # one row of it is read
    figures: dict[str, Any] = {"weight_bytes": size}
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        options = ld.ExportOptions(dtype="bfloat16", batch=1, device="cuda", chunk=512)
        bundle = ld.export_bundle(model, "inductor", Path(folder) / "b", options)
        figures["export_s"] = time.perf_counter() - begin
        begin = time.perf_counter()
        session = ld.load_session(bundle)
        figures["load_s"] = time.perf_counter() - begin
        figures["files"] = {name: info.size for name, info in bundle.manifest.files.items()}
    assert isinstance(session, InductorSession)
    print("exported", figures, flush=True)
    oracle, prompt = ld.EagerSession(model), torch.randint(0, shape["vocab_size"], (700,)).tolist()
    worst = [relative(session.prefill([prompt]), oracle.prefill([prompt]))]
    worst += [relative(session.step([token]), oracle.step([token])) for token in prompt[:32]]
    figures["largest_difference"] = {"prompt": worst[0], "first step": worst[1], "replayed steps": max(worst[2:])}
    print("differences", figures["largest_difference"], flush=True)
    overlap, edges = runtime.overlap_kernels, []
    for name, edit in (("in turn", lambda graph: 0), ("overlapped", lambda graph: edges.append(overlap(graph)))):
        runtime.overlap_kernels = edit
        session.reset()
        for token in prompt[:4]:  # the first as it is, the second captured, then replayed
            session.step([token])
        figures[f"step_ms {name}"] = at_depths(session)
        print(name, figures[f"step_ms {name}"], flush=True)
    figures["overlapped_edges"], figures["kernels"] = edges[-1], kernels(session)
    begin = time.perf_counter()
    for token in prompt[:200]:
        session.step([token])
    figures["wall_ms_a_step_with_logits_in_numpy"] = (time.perf_counter() - begin) * 5
    session.reset()
    begin = time.perf_counter()
    session.prefill([prompt[:512] * 4])
    figures["prefill_tokens_s"] = 2048 / (time.perf_counter() - begin)
    print(figures, flush=True)
    del session, oracle, model
    figures["peer_ms"] = {depth: peer(shape, depth) for depth in peer_depths}
    return figures


def quant(shape: dict[str, Any]) -> dict[str, Any]:
    """Each precision's sizes, step by position and kernels; steps are timed in turn, three times."""
    figures: dict[str, dict[str, Any]] = {}
    sessions: dict[str, InductorSession] = {}
    logits: dict[str, Any] = {}
    prompt = torch.randint(0, shape["vocab_size"], (512,)).tolist()
    free_memory()  # for the exports, in processes of their own
    with tempfile.TemporaryDirectory() as folder:
        for name, seconds in _export_all(shape, Path(folder), ["bfloat16", "int8", "int4"]).items():
            bundle = Bundle.open(Path(folder) / name, checksums=False)
            sizes = {file: info.size for file, info in bundle.manifest.files.items()}
            figures[name], sessions[name] = {"export_s": seconds, "files": sizes}, InductorSession(bundle)
    for name, session in sessions.items():
        for token in prompt[:4]:  # the first as it is, the second captured, then replayed
            logits[name] = session.step([token])
        figures[name]["difference"] = relative(logits[name], logits["bfloat16"])
    for turn in range(3):
        for name, session in sessions.items():
            figures[name][f"step_ms {turn}"] = at_depths(session)
    for name, session in sessions.items():
        figures[name]["kernels"] = kernels(session)
        for _ in range(2):
            session.reset()
            begin = time.perf_counter()
            session.prefill([prompt * 4])
            figures[name]["prefill_tokens_s"] = 2048 / (time.perf_counter() - begin)
    print(figures, flush=True)
    return figures


def throughput(shape: dict[str, Any], depth: int = 1 << 15) -> dict[str, Any]:
    """Tokens a second of all the sequences that fit, ours and Hugging Face's."""
    figures: dict[str, Any] = {"depth": depth}
    with tempfile.TemporaryDirectory() as folder:
        model = ld.linearize(build(shape), ld.LigerConfig())
        weights = sum(p.nbytes for p in model.parameters())
        begin = time.perf_counter()
        options = ld.ExportOptions(dtype="bfloat16", device="cuda", chunk=512)
        bundle = ld.export_bundle(model, "inductor", Path(folder) / "b", options)
        figures["export_s"] = time.perf_counter() - begin
        del model
        free_memory()
        session = ld.load_session(bundle)
        assert isinstance(session, InductorSession)
    session.step([1])
    row_bytes = sum(tensor.nbytes for tensor in session._tensors)
    session.reset()
    most = int(0.92 * free_memory() / row_bytes) // 64 * 64
    figures["ours"] = fullest(functools.partial(full_step, session, depth), most, 64, row_bytes)
    session.reset()
    cache_bytes = 4 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"] * depth
    del session
    most = int((free_memory() - weights) / cache_bytes)
    figures["peer"] = fullest(functools.partial(peer, shape, depth), most, 1, cache_bytes)
    return figures


def full_step(session: InductorSession, depth: int, rows: int) -> float:
    """Milliseconds of the captured step of this many sequences at `depth`."""
    session.reset()
    free_memory()
    for _ in range(3):  # the first as it is, the second captured, then replayed
        session.step(list(range(rows)))
    session._tensors[-1].fill_(depth)
    assert session._graph is not None
    return median_ms(session._graph._graph, 10)


def fullest(step_ms: Callable[[int], float], rows: int, fewer: int, row_bytes: int) -> dict[str, Any]:
    """Figures of as many rows as fit, from `rows` down."""
    while rows > 0:
        try:
            ms = step_ms(rows)
        except RuntimeError as error:  # torch's, and a session's around it
            print(rows, str(error).splitlines()[0], flush=True)
            rows -= fewer
            continue
        figures = {"sequences": rows, "bytes_of_one": row_bytes, "ms": ms, "tokens_s": rows / ms * 1e3}
        print(figures, flush=True)
        return figures
    raise MemoryError("not one sequence fits the GPU")


def free_memory() -> int:
    """Bytes of the GPU that are free once Python's and torch's leftovers are gone."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0])


def at_depths(session: InductorSession) -> dict[int, float]:
    """Milliseconds of the captured step, by position in the sequence."""
    assert session._graph is not None
    found = {}
    for depth in DEPTHS:
        session._tensors[-1].fill_(depth)
        found[depth] = median_ms(session._graph._graph)
    return found


def kernels(session: InductorSession) -> list[dict[str, Any]]:
    """Each kernel of a step by name: how many times it runs, and microseconds in all (profiled one after another)."""
    assert session._graph is not None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        session._graph._graph.replay()
        torch.cuda.synchronize()
    events = [e for e in profile.key_averages() if e.self_device_time_total]
    events.sort(key=lambda e: -e.self_device_time_total)
    return [{"name": e.key, "count": e.count, "us": e.self_device_time_total} for e in events]


def relative(ours: Any, theirs: Any) -> float:
    """Largest difference over the largest value."""
    return float(abs(ours - theirs).max() / abs(theirs).max())


def peer(shape: dict[str, Any], depth: int, rows: int = 1) -> float:
    """Milliseconds of Hugging Face's compiled forward with a static cache filled to `depth`, under a CUDA graph."""
    free_memory()
    model = build(shape)
    cache = StaticCache(config=model.config, max_cache_len=depth)
    token = torch.zeros(rows, 1, dtype=torch.long, device="cuda")
    position = torch.full((rows, 1), depth - 1, device="cuda")
    with torch.no_grad():
        model(torch.zeros(rows, 8, dtype=torch.long, device="cuda"), past_key_values=cache, use_cache=True)
        compiled = torch.compile(model.forward)

        def call() -> Any:
            return compiled(token, past_key_values=cache, position_ids=position, use_cache=True).logits

        for _ in range(3):
            call()
        ms = median_ms(captured(call))
    print("peer", depth, rows, ms, flush=True)
    return ms


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=("check", "step", "quant", "throughput"))
    parser.add_argument("--shape", default="1b", choices=tuple(SHAPES))
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than the shape has")
    parser.add_argument("--peer-depths", default="1024,16384,65536")
    parser.add_argument("--precisions", default="float32,bfloat16,float16,int8,int4")
    parser.add_argument("--out", type=Path, help="copy the result there")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"bandwidth": bandwidth()}
    print(figures, flush=True)
    if arguments.question == "check":
        figures["check"] = check(arguments.precisions.split(","))
    else:
        shape = SHAPES[arguments.shape] | REST[arguments.shape]
        if arguments.layers:
            shape |= {"num_hidden_layers": arguments.layers}
        if arguments.question in ("quant", "throughput"):
            figures[arguments.question] = globals()[arguments.question](shape)
        else:
            figures["step"] = step(shape, [int(depth) for depth in arguments.peer_depths.split(",") if depth])
    name = f"gpu_{arguments.question}" + ("" if arguments.question == "check" else f"_{arguments.shape}")
    path = report.write(name, report.command("python -m benchmarks.gpu_step"), figures)
    if arguments.out:
        shutil.copy(path, arguments.out)


if __name__ == "__main__":
    main()
