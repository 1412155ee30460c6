"""The chunked recurrence through flash-linear-attention's kernels, for training on a GPU (extra `cuda`).

Its kernels know no grouped heads, so keys, values and gates are repeated for every query head. Recurrences that it has
no kernel for, and machines without it, keep `recurrence.gated_chunked`.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn

from liger_deploy.model.attention import LigerAttention


def available() -> bool:
    """Whether a GPU, Triton and flash-linear-attention (fla-core) are here."""
    return torch.cuda.is_available() and all(importlib.util.find_spec(name) for name in ("triton", "fla"))


def use_fast_recurrence(model: nn.Module) -> bool:
    """Let every layer of a model train through the kernels, in the model's dtype; whether there are any."""
    if not available():
        return False
    for module in model.modules():
        if isinstance(module, LigerAttention):
            module.recurrence = fla_chunked
    return True


def fla_chunked(
    q_BTGRK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, g_BTGC: Tensor, state_BGKV: Tensor
) -> tuple[Tensor, Tensor]:
    """As `recurrence.gated_chunked`, with products in bfloat16 and sums in float32; tensors on a GPU."""
    from fla.ops.gla import chunk_gla
    from fla.ops.simple_gla import chunk_simple_gla

    groups, queries = q_BTGRK.shape[2:4]
    q = q_BTGRK.flatten(2, 3)
    k, v, g = (x.repeat_interleave(queries, 2) for x in (k_BTGK, v_BTGV, g_BTGC))
    q, k, v = (x.to(torch.bfloat16).contiguous() for x in (q, k, v))
    start = state_BGKV.repeat_interleave(queries, 1).contiguous()
    rest = {"scale": 1.0, "initial_state": start, "output_final_state": True}
    if g.shape[-1] == 1:
        out, state = chunk_simple_gla(q, k, v, g=g[..., 0].contiguous(), **rest)
    else:
        out, state = chunk_gla(q, k, v, g.contiguous(), **rest)
    return out.float().unflatten(2, (groups, queries)), state[:, ::queries]
