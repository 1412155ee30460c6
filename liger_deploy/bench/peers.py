"""What a user would run instead, made from the same softmax checkpoint: its shape, and 4 bits where there are any."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from liger_deploy.errors import UserError

Make = Callable[[Path, Path, str], None]  # checkpoint, where to write, interpreter


@dataclass(frozen=True)
class Peer:
    """How a peer's model is made, and its name in tables.

    Attributes:
        label: what tables call it.
        file: what `make` writes in the folder of the peers' models; "" where the checkpoint itself is loaded.
        make: writes it.
        other_python: whether it may live in an interpreter of its own (`--peer-python`).
    """

    label: str
    file: str = ""
    make: Make | None = None
    other_python: bool = False


def _llama_cpp(bits: str) -> Make:
    def make(base: Path, out: Path, python: str) -> None:
        _run([python, "-m", "liger_deploy.bench.gguf", str(base), str(out), bits], out)

    return make


def _genai(base: Path, out: Path, python: str) -> None:
    words = ["-i", str(base), "-o", str(out), "-p", "int4", "-e", "cpu"]
    _run([sys.executable, "-m", "onnxruntime_genai.models.builder", *words], out)


PEERS: dict[str, Peer] = {
    "llama.cpp": Peer("llama.cpp Q4_0", "q4_0.gguf", _llama_cpp("Q4_0"), True),
    "llama.cpp-f16": Peer("llama.cpp F16", "f16.gguf", _llama_cpp("F16"), True),
    "onnxruntime-genai": Peer("onnxruntime-genai int4", "genai", _genai),
    "transformers": Peer("transformers, eager, float32"),
    "transformers-bf16": Peer("transformers, eager, bfloat16"),
    "transformers-compiled": Peer("transformers, static cache, compiled, float32"),
    "transformers-compiled-bf16": Peer("transformers, static cache, compiled, bfloat16"),
}


def prepare(name: str, base: Path, folder: Path, python: str) -> Path:
    """The path that a peer loads; what is made is kept in `folder`.

    Raises:
        UserError: an unknown peer, a missing package, or a checkpoint that it does not take.
    """
    if name not in PEERS:
        raise UserError(f"unknown peer {name!r}: choose from {', '.join(PEERS)}")
    if not (base / "config.json").is_file():
        raise UserError(f"{base} is no checkpoint: --base takes the softmax model's directory")
    peer = PEERS[name]
    if peer.make is None:
        return base
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / peer.file
    if not out.exists():
        peer.make(base, out, python)
    config = json.loads((base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    return out


def _run(command: list[str], out: Path) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    except OSError as error:
        raise UserError(f"{out.name} could not be made: {error}") from None
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise UserError(f"{out.name} could not be made: {reason[0]}")
