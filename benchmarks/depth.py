"""One shape on every runtime and beside its peers, by depth: makes models, proves them, runs `liger-deploy benchmark`.

    python -m benchmarks.depth NAME [--threads N] [--folder DIR] [--peer-python PATH]

tiny: the embedded model, float32.  291m: a small Llama's shape, random weights, float32 and 4 bits, peers included.
int4: that shape in 4 bits on ONNX Runtime, and its peers of 4 bits.
executorch: the same on ExecuTorch, with and without this project's operator, and on ONNX Runtime.
tiny_cuda, 291m_cuda: the first two in bfloat16 on a GPU.
What is in --folder already is not made again. Writes benchmarks/results/depth_NAME.json, and docs/depth_NAME.png.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS, ROOT
from liger_deploy.export import EMBEDDED

SHAPES: dict[str, dict[str, Any]] = {
    "291m": {
        "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 20,
        "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "tie_word_embeddings": False,
        "max_position_embeddings": 20480, "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2,
    },
}  # fmt: skip
# target, --dtype, --quant, and at int4 --group-size, and of executorch --backend
BUNDLES: dict[str, list[tuple[str, ...]]] = {
    "tiny": [("onnx", "float32", "none"), ("executorch", "float32", "none"), ("inductor", "float32", "none")],
    "291m": [
        ("onnx", "float32", "none"), ("onnx", "float32", "int4"),
        ("onnx", "float32", "int4", "64"), ("onnx", "float32", "int4", "128"),
        ("executorch", "float32", "int4"),
        ("inductor", "float32", "none"), ("inductor", "bfloat16", "none"), ("inductor", "float32", "int8"),
    ],
    "int4": [("onnx", "float32", "int4"), ("onnx", "float32", "int4", "64")],
    "executorch": [
        ("onnx", "float32", "int4"), ("executorch", "float32", "int4"),
        ("executorch", "float32", "int4", "32", "liger"),
    ],
    "tiny_cuda": [("inductor", "bfloat16", "none")],
    "291m_cuda": [("inductor", "bfloat16", "none")],
}  # fmt: skip
PEERS = {
    "executorch": "",
    "int4": "llama.cpp,onnxruntime-genai",
    "tiny": "transformers",
    "291m": "llama.cpp,onnxruntime-genai,transformers,transformers-bf16",
    "tiny_cuda": "transformers-bf16,transformers-compiled-bf16",
    "291m_cuda": "transformers-bf16,transformers-compiled-bf16",
}
WITHOUT_PAGE = ("executorch", "int4")  # their tables are enough
CONTEXTS = "128,1024,4096,16384"


def liger(*words: object) -> None:
    """A verb in a process of its own."""
    subprocess.run([sys.executable, "-m", "liger_deploy", *map(str, words)], check=True)


def checkpoints(folder: Path) -> tuple[Path, Path]:
    """The 291M shape's softmax checkpoint and its Liger form."""
    base, model = folder / "base", folder / "model"
    if not base.exists():
        random_checkpoint(SHAPES["291m"], base)
    if not model.exists():
        liger("convert", "--model", base, "--out", model)
    return base, model


def make(name: str, folder: Path) -> tuple[Path, list[Path]]:
    """The softmax checkpoint and the proved bundles."""
    device = _device(name)
    base, model = (EMBEDDED.parent / "base", EMBEDDED) if name.startswith("tiny") else checkpoints(folder)
    bundles = []
    for target, dtype, quant, *more in BUNDLES[name]:
        bundles.append(folder / "-".join([target, dtype if quant == "none" else quant, *more]))
        if not bundles[-1].exists():
            options: tuple[object, ...] = ("--target", target, "--dtype", dtype, "--quant", quant)
            for flag, value in zip(("--group-size", "--backend"), more, strict=False):
                options += (flag, value)
            if target == "inductor":
                options += ("--device", device, "--batch", 1)
            liger("export", "--model", model, "--out", bundles[-1], *options)
        if not (bundles[-1] / "parity.json").exists():
            liger("verify", "--bundle", bundles[-1], "--model", model, "--tokens", 64)
    return base, bundles


def _device(name: str) -> str:
    return "cuda" if name.endswith("_cuda") else "cpu"


def random_checkpoint(shape: dict[str, Any], out: Path) -> None:
    """A Llama of this shape with random weights, and the embedded model's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(out)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / file, out)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=tuple(BUNDLES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--peer-python", default=sys.executable)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        base, bundles = make(arguments.name, folder)
        threads = "_1_thread" if arguments.threads == 1 else ""
        out = RESULTS / f"depth_{arguments.name}{threads}.json"
        peers: tuple[object, ...] = ("--base", base, "--peer-folder", folder)
        if PEERS[arguments.name]:
            peers += ("--peers", PEERS[arguments.name])
        how = ("--threads", arguments.threads, "--contexts", CONTEXTS, "--stock")
        how += ("--device", _device(arguments.name))
        liger("benchmark", "--bundle", *bundles, *peers, "--peer-python", arguments.peer_python, *how, "--out", out)
        for page in (out.with_suffix(suffix) for suffix in (".png", ".html")):
            if arguments.name in WITHOUT_PAGE:
                page.unlink()
            else:
                page.replace(ROOT / "docs" / page.name)


if __name__ == "__main__":
    main()
