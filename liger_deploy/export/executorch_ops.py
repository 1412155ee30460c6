"""`liger::fused_attention`: what a layer does between its projections and o_proj as one ExecuTorch operator.

`export/executorch/ops.cpp` has its kernel, over the same code as ONNX Runtime's. ExecuTorch wants results as plain
tensors and a form that writes them where it is told to (`.out`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from liger_deploy.config import LigerConfig
from liger_deploy.model.mixer import Heads, LayerState, Mixer
from liger_deploy.model.ops import full_rope
from liger_deploy.model.window import Rope

_TENSORS = "q k v gate_key length valid recurrent window_k window_v cos sin"
_ARGUMENTS = ", ".join(f"Tensor {name}" for name in _TENSORS.split()) + (
    ", str structure, bool softmax_map, float normalizer, float lower_bound, float recurrent_weight"
    ", float window_weight, float scale"
)
_OUTPUTS = "Tensor(a!) out, Tensor(b!) new_recurrent, Tensor(c!) new_window_k, Tensor(d!) new_window_v"
_LIBRARY = torch.library.Library("liger", "FRAGMENT")
_LIBRARY.define(f"fused_attention({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)")
_LIBRARY.define(f"fused_attention.out({_ARGUMENTS}, *, {_OUTPUTS}) -> (Tensor(a!), Tensor(b!), Tensor(c!), Tensor(d!))")


@torch.library.impl(_LIBRARY, "fused_attention", "CompositeExplicitAutograd")
def _fused_attention(
    q_BTGRK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    gate_key_BTGK: Tensor,
    length_B: Tensor,
    valid_B: Tensor,
    recurrent_BGKV: Tensor,
    window_k_BGWK: Tensor,
    window_v_BGWV: Tensor,
    cos_SK: Tensor,
    sin_SK: Tensor,
    structure: str,
    softmax_map: bool,
    normalizer: float,
    lower_bound: float,
    recurrent_weight: float,
    window_weight: float,
    scale: float,
) -> tuple[Tensor, ...]:
    """(out [B,T,G,R,V], recurrent, window_k, window_v), all float32."""
    config = LigerConfig(
        structure=structure,
        feature_map="softmax" if softmax_map else "identity",
        window=window_k_BGWK.shape[2],
        gate_normalizer=normalizer,
        lower_bound=lower_bound,
        recurrent_weight=recurrent_weight,
        window_weight=window_weight,
    )
    heads = Heads(q_BTGRK, k_BTGK, v_BTGV, gate_key_BTGK)
    layer = LayerState((recurrent_BGKV,), window_k_BGWK, window_v_BGWV)
    out, layer = Mixer(config, scale).after_state(heads, (cos_SK, sin_SK), layer, length_B, valid_B)
    return tuple(x.contiguous() for x in (out, *layer.tensors()))


def _shapes(q: Tensor, k: Tensor, v: Tensor, gate_key: Tensor, length: Tensor, valid: Tensor, *rest: object) -> object:
    return (torch.empty_like(q), *(torch.empty_like(x) for x in rest[:3] if isinstance(x, Tensor)))


torch.library.register_fake("liger::fused_attention", _shapes, lib=_LIBRARY)


def fused(
    mixer: Mixer, heads: Heads, rope: Rope, layer: LayerState, length: Tensor, valid: Tensor
) -> tuple[Tensor, LayerState]:
    """`Mixer.after_state` through the operator, for a layer with one recurrence."""
    config = mixer.liger
    out, *new = torch.ops.liger.fused_attention(
        *(x.contiguous() for x in heads), length, valid, *layer.recurrent, layer.window_k, layer.window_v,
        *full_rope(rope, heads), config.structure, config.feature_map == "softmax", config.gate_normalizer,
        config.lower_bound, config.recurrent_weight, config.window_weight, mixer.scaling,
    )  # fmt: skip
    return out, LayerState((new[0],), *new[1:])
