"""What makes training quick on a GPU: one layer's mixing in Triton kernels, or compiled, instead of op by op."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from liger_deploy.model.attention import LigerAttention, Sequence
from liger_deploy.model.lolcats import Lolcats
from liger_deploy.model.mixer import Heads, Mixer, Segments
from liger_deploy.model.window import Rope

Writes = Callable[[Mixer, Tensor, Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]


def quicken(model: nn.Module, compiled: bool = False) -> None:
    """On a GPU, let Triton kernels carry the layers that they support. `compiled`: let torch.compile make the rest.

    All layers share one compilation; rows of another length or number make another one.
    """
    writes: Writes = Mixer.writes
    whole: Sequence = Mixer.sequence
    if compiled:
        writes, whole = torch.compile(writes, dynamic=False), torch.compile(whole, dynamic=False)

    def sequence(mixer: Mixer, heads: Heads, rope: Rope, segments: Segments, lolcats: Lolcats | None) -> Tensor:
        if heads.q.is_cuda:
            from liger_deploy.model.kernels import attention_sequence as kernels

            if kernels.supports(mixer.liger):
                return by_kernels(mixer, heads, rope, segments, writes)
        return whole(mixer, heads, rope, segments, lolcats)

    for layer in model.modules():
        if isinstance(layer, LigerAttention):
            layer.sequence = sequence


def by_kernels(mixer: Mixer, heads: Heads, rope: Rope, segments: Segments, writes: Writes = Mixer.writes) -> Tensor:
    """`Mixer.sequence` through `liger::attention_sequence`, in q's dtype."""
    from liger_deploy.model.kernels.attention_sequence import attention_sequence

    q, k, v, gate_key = heads
    g, write = writes(mixer, k, gate_key, segments.keep, segments.restart)
    liger = mixer.liger
    weights = (liger.recurrent_weight, liger.window_weight, mixer.scaling)
    out: Tensor = attention_sequence(
        q, k.to(q.dtype), v.to(q.dtype), write, g, segments.number, *rope, liger.feature_map == "softmax", *weights,
        liger.window,
    )  # fmt: skip
    return out
