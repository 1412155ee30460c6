"""Convert, export and step a random checkpoint of a real model's shape; peak memory of each, as its own process.

python -m benchmarks.memory 1b    (Llama-3.2-1B, float32)
python -m benchmarks.memory 3b    (Llama-3.2-3B, int4)
python -m benchmarks.memory 1b_executorch    (Llama-3.2-1B on ExecuTorch, int4)
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import report

# The public configs of Llama-3.2-1B and -3B.
SHAPES: dict[str, dict[str, Any]] = {}
SHAPES["1b"] = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "bos_token_id": 128000, "eos_token_id": 128001,
    "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
}  # fmt: skip
SHAPES["3b"] = SHAPES["1b"] | {
    "hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "head_dim": 128,
}  # fmt: skip
TARGETS = {"1b": ("onnx", "none"), "3b": ("onnx", "int4"), "1b_executorch": ("executorch", "int4")}


def make(shape: str, out: str) -> None:
    """A random checkpoint in bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(LlamaConfig(**SHAPES[shape])).save_pretrained(out, max_shard_size="1GB")


def step(bundle: str) -> None:
    """Prefill and decode; prints the time of a step."""
    import liger_deploy as ld

    session = ld.load_session(bundle)
    session.prefill(list(range(100)))
    times = []
    for token in range(10):
        start = time.perf_counter()
        session.step([token])
        times.append(time.perf_counter() - start)
    print(json.dumps({"median_step_ms": round(sorted(times)[5] * 1e3, 1)}))


def measure(*arguments: str) -> dict[str, float]:
    """Run this file's or the package's command in a process of its own; its peak resident memory and time."""
    code = "import resource, runpy, sys; sys.argv = sys.argv[1:]; name = sys.argv[0]\n"
    code += "try: runpy.run_module(name, run_name='__main__')\nexcept SystemExit as e: assert not e.code, e\n"
    code += "print('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(result.stdout + result.stderr)
    found = {"seconds": round(time.perf_counter() - start, 1)}
    for line in result.stdout.splitlines():
        if line.startswith("PEAK"):
            found["peak_resident_gb"] = round(int(line.split()[1]) / 1e9, 2)
        elif line.startswith("{"):
            found |= json.loads(line)
    return found


def main() -> None:
    """Everything in a temporary folder."""
    if sys.argv[1:2] in (["make"], ["step"]):
        {"make": make, "step": step}[sys.argv[1]](*sys.argv[2:])
        return
    name = sys.argv[1]
    with tempfile.TemporaryDirectory() as folder:
        base, liger, bundle = (str(Path(folder) / name) for name in ("base", "liger", "bundle"))
        measure("benchmarks.memory", "make", name.split("_")[0], base)
        target, quant = TARGETS[name]
        size = sum(p.stat().st_size for p in Path(base).glob("*.safetensors"))
        figures = {
            "checkpoint_gb": round(size / 1e9, 2),
            "convert": measure("liger_deploy", "convert", "--model", base, "--out", liger),
            "export": measure(
                "liger_deploy", "export", "--target", target, "--quant", quant, "--model", liger, "--out", bundle
            ),
            "bundle_gb": round(sum(p.stat().st_size for p in Path(bundle).iterdir()) / 1e9, 2),
            "run": measure("benchmarks.memory", "step", bundle),
        }
    report.write(f"memory_{name}", f"python -m benchmarks.memory {name}", figures)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
