"""Operators of the `liger` domain: what a target may map to a kernel of its own.

Each has an eager body (the reference form of this package), so a traced graph that holds one still runs in PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from liger_deploy.model.recurrence import gated_chunked


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
