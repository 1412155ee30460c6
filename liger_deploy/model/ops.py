"""Operators of the `liger` domain: what a target may map to a kernel of its own.

Each has an eager body (the reference form of this package), so a traced graph that holds one still runs in PyTorch.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from liger_deploy.config import LigerConfig
from liger_deploy.model.lolcats import Lolcats
from liger_deploy.model.mixer import Heads, LayerState, Mixer
from liger_deploy.model.recurrence import gated_chunked
from liger_deploy.model.window import Rope


@torch.library.custom_op("liger::linear_attention", mutates_args=())
def linear_attention(
    q_BTGRK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, g_BTGC: Tensor, state_BGKV: Tensor
) -> tuple[Tensor, Tensor]:
    """`recurrence.gated_chunked` as one node: (out [B,T,G,R,V], state [B,G,K,V]), all float32."""
    out, state = gated_chunked(q_BTGRK, k_BTGK, v_BTGV, g_BTGC, state_BGKV)
    return out.contiguous(), state.clone()


@linear_attention.register_fake
def _(q_BTGRK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, g_BTGC: Tensor, state_BGKV: Tensor) -> tuple[Tensor, Tensor]:
    return q_BTGRK.new_empty(*q_BTGRK.shape[:-1], v_BTGV.shape[-1]), torch.empty_like(state_BGKV)


@torch.library.custom_op("liger::attention", mutates_args=())
def attention(
    q_BTGRK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    gate_key_BTGK: Tensor,
    length_B: Tensor,
    valid_B: Tensor,
    recurrent: list[Tensor],
    window_k_BGWK: Tensor,
    window_v_BGWV: Tensor,
    cos_SK: Tensor,
    sin_SK: Tensor,
    config: str,
    scaling: float,
) -> list[Tensor]:
    """`Mixer.after_state` as one node: [out [B,T,G,R,V], *recurrent, window_k, window_v].

    `config` is the layer's LigerConfig as JSON.
    """
    mixer = Mixer(LigerConfig.from_dict(json.loads(config)), scaling)
    layer = LayerState(tuple(recurrent), window_k_BGWK, window_v_BGWV)
    heads = Heads(q_BTGRK, k_BTGK, v_BTGV, gate_key_BTGK)
    out, layer = mixer.after_state(heads, (cos_SK, sin_SK), layer, length_B, valid_B)
    return [x.contiguous() for x in (out, *layer.tensors())]


@attention.register_fake
def _(
    q_BTGRK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    gate_key_BTGK: Tensor,
    length_B: Tensor,
    valid_B: Tensor,
    recurrent: list[Tensor],
    window_k_BGWK: Tensor,
    window_v_BGWV: Tensor,
    cos_SK: Tensor,
    sin_SK: Tensor,
    config: str,
    scaling: float,
) -> list[Tensor]:
    dtype = torch.float32 if recurrent else q_BTGRK.dtype
    out = q_BTGRK.new_empty(*q_BTGRK.shape[:-1], v_BTGV.shape[-1], dtype=dtype)
    return [out, *(torch.empty_like(x) for x in (*recurrent, window_k_BGWK, window_v_BGWV))]


def has_one_node(config: LigerConfig) -> bool:
    """Whether `liger::attention` carries a layer of this configuration: one recurrence at most, no sinks."""
    return config.row.width in ("key", "scalar", "none") and not config.sinks


def full_rope(rope: Rope, heads: Heads) -> Rope:
    """The tables; of a layer without RoPE among others with it, such as turn by nothing."""
    if rope[0].shape[1]:
        return rope
    shape = (rope[0].shape[0], heads.k.shape[-1])
    return heads.k.new_ones(shape, dtype=torch.float32), heads.k.new_zeros(shape, dtype=torch.float32)


def attention_after_state(
    mixer: Mixer,
    heads: Heads,
    rope: Rope,
    layer: LayerState,
    length: Tensor,
    valid: Tensor | None = None,
    lolcats: Lolcats | None = None,
) -> tuple[Tensor, LayerState]:
    """`Mixer.after_state` through `liger::attention`, for a layer that `has_one_node`; `valid` is needed."""
    assert valid is not None
    assert lolcats is None
    rope = full_rope(rope, heads)
    state = (list(layer.recurrent), layer.window_k, layer.window_v)
    config = json.dumps(mixer.liger.to_dict(), sort_keys=True)
    out, *new = attention(*heads, length, valid, *state, *rope, config, mixer.scaling)
    return out, LayerState(tuple(new[:-2]), *new[-2:])
