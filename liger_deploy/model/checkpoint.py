"""Hugging Face checkpoint directories, read without loading them: what they are and whether they are whole."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from liger_deploy.config import LigerConfig
from liger_deploy.config import check_fits as check_sizes
from liger_deploy.errors import CheckpointError
from liger_deploy.files import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*")

# What is known to hold for each family (rung 3 of the parity ladder proves it).
SUPPORTED: dict[str, str] = {
    "gemma3_text": "Gemma3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}


def read_config(path: Path) -> dict[str, Any]:
    """`config.json` of a checkpoint directory.

    Raises:
        CheckpointError: no such directory, or not a checkpoint.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory: --model takes a Hugging Face checkpoint directory")
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} is not a checkpoint: it has no config.json")
    return read_json(path / "config.json", CheckpointError)


def check_supported(config: dict[str, Any], path: Path | None = None) -> None:
    """Raise CheckpointError unless the architecture is one whose attention can be replaced."""
    where = f"{path}: " if path else ""
    kind, names = config.get("model_type"), config.get("architectures")
    if kind not in SUPPORTED:
        listed = ", ".join(sorted(SUPPORTED))
        raise CheckpointError(f"{where}model type {kind!r} is not supported; supported are {listed}")
    if names and names != [SUPPORTED[str(kind)]]:
        raise CheckpointError(f"{where}{names} is not a causal language model: {SUPPORTED[str(kind)]} is needed")


def check_fits(values: dict[str, Any], config: LigerConfig, path: Path | None = None) -> None:
    """Raise unless the configuration's sizes fit those in a model's `config.json`."""
    where = f"{path / 'config.json'}: " if path else ""
    heads, layers, hidden = (
        _positive(values, name, where) for name in ("num_attention_heads", "num_hidden_layers", "hidden_size")
    )
    keys = values.get("num_key_value_heads")
    if keys is not None and (type(keys) is not int or keys < 1 or heads % keys):
        raise CheckpointError(f"{where}{heads} query heads cannot share {keys!r} KV heads")
    check_sizes(config, values.get("head_dim") or hidden // heads, layers)
    kinds, sliding = values.get("layer_types") or [], values.get("sliding_window") or config.softmax_window
    for layer in config.softmax_layers:
        full = values.get("use_sliding_window") is False or kinds[layer : layer + 1] == ["full_attention"]
        if sliding < config.softmax_window and not full:
            raise CheckpointError(
                f"{where}layer {layer} of this model attends to its last {sliding} keys: "
                f"give --softmax-window {sliding}, or choose other softmax_layers"
            )


def _positive(values: dict[str, Any], name: str, where: str) -> int:
    value = values.get(name)
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{where}{name} must be a positive integer, not {value!r}")
    return value


def dtype(values: dict[str, Any]) -> str:
    """Floating dtype that `config.json` names; float32 where it names none."""
    name = values.get("dtype") or values.get("torch_dtype") or "float32"
    if name not in ("float32", "float16", "bfloat16"):
        raise CheckpointError(f"config.json: dtype must be float32, float16 or bfloat16, not {name!r}")
    return str(name)


def companions(path: Path) -> list[Path]:
    """What belongs to a checkpoint beside config.json and the weights: tokenizer, generation settings, licence."""
    found = {file for pattern in COMPANIONS for file in path.glob(pattern) if file.is_file()}
    return sorted(found - {path / "config.json"})


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint, each checked to be whole.

    Raises:
        CheckpointError: missing, truncated or listed but absent.
    """
    if (path / INDEX).is_file():
        weights = read_json(path / INDEX, CheckpointError).get("weight_map")
        if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights.values()):
            raise CheckpointError(f"{path / INDEX} has no weight_map of file names")
        names = sorted(set(weights.values()))
        if odd := [name for name in names if Path(name).name != name]:
            raise CheckpointError(f"{path / INDEX} names a file outside the checkpoint: {odd[0]}")
        files = [path / name for name in names]
    else:
        files = [path / SINGLE]
    for file in files:
        _check_whole(file)
    return files


def _check_whole(file: Path) -> None:
    """A safetensors file is as long as its header says."""
    try:
        with file.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            if size > file.stat().st_size:
                raise ValueError
            header = json.loads(stream.read(size))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        expected = 8 + size + max(ends, default=0)
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing: weights must be in safetensors files") from None
    except (struct.error, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        raise CheckpointError(f"{file} is not a safetensors file, or is damaged: download it again") from None
    if file.stat().st_size < expected:
        raise CheckpointError(f"{file} is truncated: {file.stat().st_size} of {expected} bytes; download it again")
