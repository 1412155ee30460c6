"""Put LigerAttention into a Hugging Face model, and load and save the result."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.utils import logging as transformers_logging

from liger_deploy.config import LigerConfig
from liger_deploy.errors import CheckpointError, ConfigError
from liger_deploy.model import checkpoint
from liger_deploy.model.attention import LigerAttention, Mode, RopeTable
from liger_deploy.state import ModelShape, StateSpec

CHUNK_LIMIT = 1024  # longest run of tokens after a state that the RoPE tables cover


def _padding_mask(*_: Any, attention_mask: torch.Tensor | None = None, **__: Any) -> torch.Tensor | None:
    return attention_mask


# LigerAttention wants the padding mask [B, T] itself, not a [B, 1, T, T] built from it.
ALL_MASK_ATTENTION_FUNCTIONS.register("liger", _padding_mask)


def linearize(model: PreTrainedModel, config: LigerConfig | None = None) -> PreTrainedModel:
    """Replace every attention module of a Hugging Face causal language model, in place; returns the same model.

    Parameter names and values stay. `config` defaults to Liger-GLA.

    Raises:
        CheckpointError: an architecture that is not supported, with the reason.
        ConfigError: a configuration that does not fit the model, or a model already linearized.
    """
    config = config or LigerConfig()
    checkpoint.check_supported(model.config.to_dict())
    if is_linearized(model):
        raise ConfigError("this model is already linearized: load the base checkpoint to choose another structure")
    checkpoint.check_fits(model.config.to_dict(), config)
    for index, layer in enumerate(model.model.layers):
        own = config.layer(index)
        length = max(2 * own.window, own.window + CHUNK_LIMIT)
        layer.self_attn = LigerAttention(layer.self_attn, own, _rope_table(model, layer.self_attn, length))
    model.config._attn_implementation = "liger"
    model.config.use_cache = False
    model.config.liger = config.to_dict()
    return model


def is_linearized(model: PreTrainedModel) -> bool:
    """Whether the model's attention modules are LigerAttention."""
    return isinstance(model.model.layers[0].self_attn, LigerAttention)


@contextlib.contextmanager
def softmax_attention(model: nn.Module, mode: Mode = "softmax") -> Iterator[None]:
    """Within it, whole sequences go through the base model's own attention: the same weights, not yet linearized.

    `mode` "transfer" does so too, and leaves each layer's `transfer_loss` (LoLCATs' first stage).
    """
    layers = [module for module in model.modules() if isinstance(module, LigerAttention)]
    for layer in layers:
        layer.mode = mode
    try:
        yield
    finally:
        for layer in layers:
            layer.mode = "liger"


def liger_config(model: PreTrainedModel) -> LigerConfig:
    """The configuration a model was linearized with."""
    if not is_linearized(model):
        raise ConfigError("this is a softmax-attention model: linearize it, or convert its checkpoint, first")
    return LigerConfig.from_dict(model.config.liger)


def model_shape(model: PreTrainedModel) -> ModelShape:
    """The sizes that the state depends on."""
    config, attention = model.config, model.model.layers[0].self_attn
    heads = config.num_attention_heads
    return ModelShape(config.num_hidden_layers, heads, heads // attention.queries_per_key, attention.head_dim)


def state_spec(model: PreTrainedModel) -> StateSpec:
    """Layout of a linearized model's state."""
    return StateSpec.of(liger_config(model), model_shape(model))


def load_model(path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a converted checkpoint directory. `dtype` None keeps the checkpoint's own.

    Raises:
        CheckpointError: not a checkpoint, truncated, of an unsupported architecture, or not converted.
        ConfigError: unknown or bad `liger` keys.
    """
    path = Path(path)
    values = checkpoint.read_config(path)
    if "liger" not in values:
        raise CheckpointError(
            f"{path} is a softmax-attention checkpoint: run `liger-deploy convert --model {path} --out DIR` first"
        )
    config = LigerConfig.from_dict(values["liger"], f"{path / 'config.json'}: liger")
    model = linearize(load_base_model(path, dtype), config).eval()
    _load_learned(model, path)
    return model


def _load_learned(model: PreTrainedModel, path: Path) -> None:
    """Parameters that the base model does not have (LoLCATs'), where the checkpoint holds them: all or none."""
    wanted = {name: p for name, p in model.named_parameters() if ".lolcats." in name}
    found: dict[str, torch.Tensor] = {}
    for file in checkpoint.weight_files(path) if wanted else []:
        with safe_open(file, framework="pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in wanted.keys() & set(tensors.keys())}
    if found and (missing := sorted(wanted.keys() - found.keys())):
        raise CheckpointError(f"{path} lacks {len(missing)} weights, the first is {missing[0]!r}")
    for name, tensor in sorted(found.items()):
        if tensor.shape != wanted[name].shape:
            raise CheckpointError(f"{path}: {name!r} is {list(tensor.shape)}, not {list(wanted[name].shape)}")
        wanted[name].data.copy_(tensor)


def load_base_model(path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a checkpoint directory as the softmax-attention model that Hugging Face knows, every tensor checked."""
    path = Path(path)
    checkpoint.check_supported(checkpoint.read_config(path), path)
    checkpoint.weight_files(path)
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype or "auto", local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{path} does not load: {str(error).splitlines()[0]}") from None
    finally:
        transformers_logging.set_verbosity(level)
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(f"{path} lacks {len(missing)} weights, the first is {missing[0]!r}")
    return model  # type: ignore[no-any-return]


def save_model(model: PreTrainedModel, out: Path) -> None:
    """Write a model (linearized or not) as a Hugging Face checkpoint into an existing directory."""
    use_cache, model.config.use_cache = model.config.use_cache, True
    try:
        model.save_pretrained(out)
    finally:
        model.config.use_cache = use_cache
    for file in out.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes them for the owner alone


def fingerprint(model: PreTrainedModel) -> str:
    """A short hash of the configuration and a sample of every weight, equal for any floating dtype it is loaded in.

    It ties a state to the model that wrote it; it is no checksum.
    """
    shape = model_shape(model)
    digest = hashlib.sha256(json.dumps([model.config.model_type, repr(shape), liger_config(model).to_dict()]).encode())
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.detach().flatten()
        step = max(1, flat.numel() // 61)
        sample = flat[::step].to(torch.bfloat16).float().cpu().numpy()
        digest.update(name.encode() + sample.tobytes())
    return digest.hexdigest()[:16]


def _rope_table(model: PreTrainedModel, attention: nn.Module, length: int) -> RopeTable:
    """cos and sin [length, rotary dim] for positions 0 .. length-1, angles in float64, from the model's frequencies.

    The rotary dim is 0 in a layer without RoPE (SmolLM 3). Some models turn each layer type differently (Gemma 3).
    """
    rotary, kind = model.model.rotary_emb, getattr(attention, "layer_type", "")
    prefix = f"{kind}_" if hasattr(rotary, f"{kind}_inv_freq") else ""
    frequencies = getattr(rotary, f"{prefix}inv_freq").double()
    scale = getattr(rotary, f"{prefix}attention_scaling")
    if not getattr(attention, "use_rope", True):
        frequencies = frequencies[:0]
    angles = torch.arange(length, device=frequencies.device)[:, None] * frequencies.repeat(2)
    return RopeTable((angles.cos() * scale).float(), (angles.sin() * scale).float(), frequencies, scale)
