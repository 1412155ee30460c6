"""Decode and prefill against what a user would pick instead: llama.cpp Q4_0 and onnxruntime-genai int4, on a CPU.

    python -m benchmarks.cpu_peers [--threads 1,2] [--contexts 128,1024,4096,16384] [--peer-python PATH]

One shape (benchmarks/quant.py's 291 million parameters, random weights), 4 bits everywhere, batch 1. Every runtime is a
process of its own that keeps its state; at each depth they take turns, a block of steps each, so that the machine's
noise falls on all alike. Depth is real: the cache or state has seen that many tokens. Memory is the process's resident
set after its last block. The peers need llama-cpp-python and gguf: `--peer-python` is an interpreter that has them.
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

SHAPE = {
    "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 20,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "tie_word_embeddings": False,
    "max_position_embeddings": 20480, "rms_norm_eps": 1e-6,
}  # fmt: skip
BLOCK, ROUNDS, WARM = 8, 6, 4


class Liger:
    """Our int4 bundle; `LIGER_ORT_OPS` says whether with our kernels."""

    def __init__(self, path: str, threads: int) -> None:
        from liger_deploy.bundle import Bundle
        from liger_deploy.runtimes.onnx import OnnxSession

        self.session = OnnxSession(Bundle.open(path, False), threads)

    def prefill(self, tokens: list[int]) -> None:
        self.session.prefill([tokens])

    def step(self, token: int) -> None:
        self.session.step([token])


class ExecuTorch(Liger):
    """Our int4 program on ExecuTorch."""

    def __init__(self, path: str, threads: int) -> None:
        from liger_deploy.bundle import Bundle
        from liger_deploy.runtimes.executorch import ExecuTorchSession

        self.session = ExecuTorchSession(Bundle.open(path, False), threads)  # type: ignore[assignment]


class LlamaCpp:
    """Flash attention off, its best setting at depth on these CPUs."""

    def __init__(self, path: str, threads: int) -> None:
        from llama_cpp import Llama

        self.model = Llama(
            path, n_ctx=17408, n_threads=threads, n_threads_batch=threads, flash_attn=False, verbose=False, n_batch=512
        )

    def prefill(self, tokens: list[int]) -> None:
        self.model.eval(tokens)

    def step(self, token: int) -> None:
        self.model.eval([token])


class Genai:
    """onnxruntime-genai's own int4 export of the softmax model."""

    def __init__(self, path: str, threads: int) -> None:
        import onnxruntime_genai as og

        config = Path(path) / "genai_config.json"
        values = json.loads(config.read_text())
        values["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
        config.write_text(json.dumps(values))
        model = og.Model(path)
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=17408, do_sample=False)
        self.generator = og.Generator(model, parameters)

    def prefill(self, tokens: list[int]) -> None:
        import numpy as np

        for start in range(0, len(tokens), 512):
            self.generator.append_tokens(np.array(tokens[start : start + 512], np.int32))

    def step(self, token: int) -> None:
        self.generator.append_tokens([token])


RUNTIMES: dict[str, Any] = {
    "liger": Liger,
    "liger, stock operators": Liger,
    "llama.cpp Q4_0": LlamaCpp,
    "genai int4": Genai,
    "liger, ExecuTorch": ExecuTorch,
}


def serve(name: str, path: str, threads: int) -> None:
    """Answer `prefill N` and `steps N` on standard input with seconds and the resident set."""
    import psutil

    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:threads]))
    runtime = RUNTIMES[name](path, threads)
    print("ready", flush=True)
    seen = 0
    for line in sys.stdin:
        kind, count = line.split()
        tokens = [(17 * (seen + i)) % 31000 + 5 for i in range(int(count))]
        seconds, start = [], time.perf_counter()
        if kind == "prefill":
            runtime.prefill(tokens)
            seconds.append(time.perf_counter() - start)
        else:
            for token in tokens:
                start = time.perf_counter()
                runtime.step(token)
                seconds.append(time.perf_counter() - start)
        seen += len(tokens)
        print(json.dumps({"seconds": seconds, "rss": psutil.Process().memory_info().rss}), flush=True)


class Worker:
    """A runtime in a process of its own."""

    def __init__(self, name: str, path: Path, threads: int, python: str) -> None:
        env = os.environ | {"OMP_NUM_THREADS": str(threads)}
        if "stock" in name:
            env["LIGER_ORT_OPS"] = "none"
        command = [python if RUNTIMES[name] is LlamaCpp else sys.executable, "-m", "benchmarks.cpu_peers"]
        command += ["--serve", name, str(path), str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self._answer()

    def ask(self, kind: str, count: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{kind} {count}\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._answer())
        return answer

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a runtime died: {self.process.args}")
        return line

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def measure(paths: dict[str, Path], threads: int, contexts: list[int], python: str) -> list[dict[str, Any]]:
    workers = {name: Worker(name, path, threads, python) for name, path in paths.items()}
    rows, depth = [], 0
    for context in contexts:
        fed = {name: worker.ask("prefill", context - depth) for name, worker in workers.items()}
        for worker in workers.values():
            worker.ask("steps", WARM)
        found: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in workers}
        for _ in range(ROUNDS):
            for name, worker in workers.items():
                time.sleep(0.3)  # another runtime's threads stop spinning
                worker.ask("steps", 1)
                answer = worker.ask("steps", BLOCK)
                found[name]["seconds"] += answer["seconds"]
                found[name]["rss"] = answer["rss"]
        for name in workers:
            rows.append({
                "runtime": name, "threads": threads, "context": context,
                "ms_a_token": 1e3 * statistics.median(found[name]["seconds"]),
                "prefill_tokens": context - depth,
                "prefill_tokens_per_second": (context - depth) / fed[name]["seconds"][0],
                "resident_mb": found[name]["rss"] / 1e6,
                "seconds": found[name]["seconds"],
            })  # fmt: skip
            print(name, threads, context, round(rows[-1]["ms_a_token"], 2), file=sys.stderr, flush=True)
        depth = context + WARM + ROUNDS * (BLOCK + 1)
    for worker in workers.values():
        worker.close()
    return rows


def build(folder: Path, python: str, wanted: list[str]) -> dict[str, Path]:
    """The same random weights in every wanted runtime's format; what is there already is kept."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import liger_deploy as ld
    from liger_deploy.export import EMBEDDED

    base, ours, gguf, genai, pte = (folder / name for name in ("base", "liger", "q4_0.gguf", "genai", "executorch"))
    if not ours.exists():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, bos_token_id=1, eos_token_id=2)).eval()
        model.save_pretrained(base)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (base / name).write_bytes((EMBEDDED / name).read_bytes())
        ld.export_bundle(ld.linearize(model), "onnx", ours, ld.ExportOptions(quant="int4"))
    if "llama.cpp Q4_0" in wanted and not gguf.exists():
        subprocess.run([python, "-m", "benchmarks.cpu_peers", "--gguf", str(base), str(gguf)], check=True)
    if "genai int4" in wanted and not genai.exists():
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(base), "-o", str(genai)]
        subprocess.run([*command, "-p", "int4", "-e", "cpu"], check=True, stdout=subprocess.DEVNULL)
    if "liger, ExecuTorch" in wanted and not pte.exists():
        model = ld.linearize(LlamaForCausalLM.from_pretrained(base))
        ld.export_bundle(model, "executorch", pte, ld.ExportOptions(quant="int4"))
    paths = dict(zip(RUNTIMES, (ours, ours, gguf, genai, pte), strict=True))
    return {name: paths[name] for name in wanted}


def write_gguf(base: Path, out: Path) -> None:
    """The Hugging Face checkpoint as a GGUF file, quantized to Q4_0 by llama.cpp itself."""
    import gguf
    import llama_cpp
    from safetensors.numpy import load_file

    weights = load_file(base / "model.safetensors")
    full = out.with_suffix(".f32.gguf")
    writer = gguf.GGUFWriter(full, "llama")
    writer.add_context_length(SHAPE["max_position_embeddings"])
    writer.add_embedding_length(SHAPE["hidden_size"])
    writer.add_block_count(SHAPE["num_hidden_layers"])
    writer.add_feed_forward_length(SHAPE["intermediate_size"])
    writer.add_head_count(SHAPE["num_attention_heads"])
    writer.add_head_count_kv(SHAPE["num_key_value_heads"])
    writer.add_key_length(SHAPE["head_dim"])
    writer.add_value_length(SHAPE["head_dim"])
    writer.add_rope_dimension_count(SHAPE["head_dim"])
    writer.add_layer_norm_rms_eps(SHAPE["rms_norm_eps"])
    writer.add_vocab_size(SHAPE["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, SHAPE["num_hidden_layers"])
    for name, array in weights.items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, 2
    if llama_cpp.llama_model_quantize(str(full).encode(), str(out).encode(), parameters):
        raise SystemExit("llama.cpp did not quantize the model")
    full.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--contexts", default="128,1024,4096,16384")
    parser.add_argument("--runtimes", default="; ".join(RUNTIMES), help="which, separated by semicolons")
    parser.add_argument("--name", default="cpu_peers", help="of the result")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--folder", type=Path, help="where the models are written (default: a temporary folder)")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--gguf", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve[0], args.serve[1], int(args.serve[2]))
        return 0
    if args.gguf:
        write_gguf(*args.gguf)
        return 0
    from benchmarks.report import write

    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        paths = build(folder, args.peer_python, [name.strip() for name in args.runtimes.split(";")])
        contexts = [int(x) for x in args.contexts.split(",")]
        rows = [row for n in args.threads.split(",") for row in measure(paths, int(n), contexts, args.peer_python)]
    peers = [args.peer_python, "-c", "from importlib.metadata import version as v; print(v('llama-cpp-python'))"]
    version = subprocess.run(peers, capture_output=True, text=True).stdout.strip()
    command = "python -m benchmarks.cpu_peers"
    if args.name != "cpu_peers":
        command += (
            f' --threads {args.threads} --contexts {args.contexts} --runtimes "{args.runtimes}" --name {args.name}'
        )
    write(args.name, command, {"llama_cpp_python": version, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
