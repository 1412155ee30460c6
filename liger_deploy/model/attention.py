"""LigerAttention: a Hugging Face attention module whose softmax became a gated recurrence and a window.

It takes over the base module's projections, norms and biases under their own names, so a checkpoint of one loads into
the other, and knows no model family: what differs between families is read off the base module's attributes.

Shape legend: B batch, T time, D model width, G KV heads, R query heads per KV head, K key dim, V value dim (= K).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from liger_deploy.config import LigerConfig
from liger_deploy.errors import SessionError
from liger_deploy.model import window
from liger_deploy.model.lolcats import Lolcats
from liger_deploy.model.mixer import Heads, LayerState, Mixer, Segments
from liger_deploy.model.window import Rope

Mode = Literal["liger", "softmax", "transfer"]
AfterState = Callable[
    [Mixer, Heads, Rope, LayerState, Tensor, Tensor | None, Lolcats | None], tuple[Tensor, LayerState]
]
Sequence = Callable[[Mixer, Heads, Rope, Segments, Lolcats | None], Tensor]


@dataclass(frozen=True)
class RopeTable:
    """A layer's rotary embedding: cos and sin [S, rotary dim] by distance, and the model's own frequencies."""

    cos: Tensor
    sin: Tensor
    inverse_frequency: Tensor
    scale: float


@dataclass
class ModelState:
    """All layers' state on its way through one forward, handed to Hugging Face's layers as their cache.

    Attributes:
        layers: read by each layer, and replaced by its next state.
        length: [B] int64, tokens seen before this call.
        valid: [B] int64, real tokens among the T given; None when all are (a step).
        read: the layers that this call has come through.
    """

    layers: list[LayerState]
    length: Tensor
    valid: Tensor | None = None
    read: set[int] = field(default_factory=set)
    is_compileable: bool = field(default=False, init=False)
    is_sliding: tuple[bool, ...] = field(default=(), init=False)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Part of Hugging Face's cache protocol; positions do not matter here."""
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Part of Hugging Face's cache protocol."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Part of Hugging Face's cache protocol; no mask is built from it."""
        return query_length, 0


class LigerAttention(nn.Module):
    """Eq. 9: recurrent_weight * recurrence + window_weight * window, around the base module's projections."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    qkv_proj: nn.Module
    o_proj: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    lolcats: Lolcats | None

    def __init__(self, base: nn.Module, config: LigerConfig, rope: RopeTable) -> None:
        super().__init__()
        self.layer_idx: int = base.layer_idx  # type: ignore[assignment]
        self.head_dim: int = base.head_dim  # type: ignore[assignment]
        self.scaling: float = base.scaling  # type: ignore[assignment]
        self.queries_per_key: int = base.num_key_value_groups  # type: ignore[assignment]
        self.liger = config
        self.base_window: int | None = getattr(base, "sliding_window", None)
        self.mode: Mode = "liger"
        self.transfer_loss: Tensor | None = None
        self.rope_cos: Tensor
        self.rope_sin: Tensor
        self.register_buffer("rope_cos", rope.cos, persistent=False)
        self.register_buffer("rope_sin", rope.sin, persistent=False)
        for name, child in base.named_children():
            self.add_module(name, child)
        self.norms = _norms(base, self.head_dim)
        self.mixer = Mixer(config, self.scaling)
        self.after_state: AfterState = Mixer.after_state
        self.sequence: Sequence = Mixer.sequence
        self.lolcats = None
        if config.row.width == "learned":
            weight = next(self.parameters())
            heads: int = base.config.num_attention_heads  # type: ignore[union-attr,assignment]
            maps = Lolcats(heads, self.head_dim, config.features, rope.inverse_frequency, rope.scale)
            self.lolcats = maps.to(weight.device, weight.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LigerAttention:
        """Move the RoPE tables with the module, but keep them float32: rounded ones would no longer turn by distance
        alone, and a prompt cut elsewhere would give other scores."""
        tables = self.rope_cos, self.rope_sin
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.rope_cos, self.rope_sin = (table.to(self.rope_cos.device) for table in tables)
        return self

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: ModelState | None = None,
        cache: ModelState | None = None,
        segment_ids: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Called by the Hugging Face layer. hidden [B,T,D], attention_mask [B,T] bool (False: padding) or None.

        Without a state the T tokens are a whole sequence (or several, numbered from 1 by `segment_ids` [B,T], 0 being
        padding); with one they continue it, and it holds the next state afterwards. transformers hands it over as
        `past_key_values` up to 5.23 and as `cache` from 5.24 on.
        """
        state = past_key_values if cache is None else cache
        heads = self._project(hidden_states)
        if state is None:
            segments = Segments.of(hidden_states, attention_mask, segment_ids)
            out = self._in_mode(heads, segments, position_embeddings)
        elif isinstance(state, ModelState):
            out = self._continue(heads, state)
        else:
            raise SessionError("a Liger model keeps no KV cache: pass use_cache=False, or decode through a Session")
        return self.o_proj(out.flatten(2).to(hidden_states.dtype)), None

    @property
    def _rope(self) -> Rope:
        return self.rope_cos, self.rope_sin

    def _continue(self, heads: Heads, state: ModelState) -> Tensor:
        """T tokens after a state, [B,T,G,R,V]; replaces this layer's state."""
        layer = state.layers[self.layer_idx]
        state.read.add(self.layer_idx)
        rest = (layer, state.length, state.valid, self.lolcats)
        out, state.layers[self.layer_idx] = self.after_state(self.mixer, heads, self._rope, *rest)
        return out

    def _in_mode(self, heads: Heads, segments: Segments, position_embeddings: tuple[Tensor, Tensor] | None) -> Tensor:
        """`mode`: "liger"; "softmax", the base model's attention; "transfer", the latter while measuring the former
        against it (LoLCATs' first stage: mean squared error of the heads' outputs)."""
        if self.mode == "liger":
            return self.sequence(self.mixer, heads, self._rope, segments, self.lolcats)
        rope = position_embeddings if self.rope_cos.shape[-1] else None
        teacher = window.attend_all(*heads[:3], segments.number, rope, self.scaling, self.base_window)
        if self.mode == "transfer":
            with torch.enable_grad():
                ours = self.sequence(self.mixer, heads, self._rope, segments, self.lolcats)
                errors = (ours.float() - teacher.float()).square().mean((2, 3, 4))
                self.transfer_loss = errors[segments.number > 0].mean()
        return teacher

    def _project(self, x_BTD: Tensor) -> Heads:
        """q [B,T,G,R,K], k [B,T,G,K], v [B,T,G,V] and the key that feeds the gate [B,T,G,K], before RoPE.

        Query and key norms act where the base model has them: on whole projections (OLMo 2) or on heads (Qwen 3).
        """
        heads = (-1, self.head_dim)
        q, raw, v = self._projections(x_BTD)
        if self.norms == "projection":
            q, raw = self.q_norm(q), self.k_norm(raw)
        q, raw, v = q.unflatten(-1, heads), raw.unflatten(-1, heads), v.unflatten(-1, heads)
        k = raw
        if self.norms == "head":
            q, k = self.q_norm(q), self.k_norm(raw)
        return Heads(q.unflatten(2, (-1, self.queries_per_key)), k, v, raw if self.liger.gate_source == "raw" else k)

    def _projections(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if hasattr(self, "qkv_proj"):  # one matrix (Phi 3): R query heads for each key and value head
            groups = self.queries_per_key
            fused: Tensor = self.qkv_proj(x_BTD)
            unit = fused.shape[-1] // (groups + 2)
            q, k, v = fused.split([groups * unit, unit, unit], -1)
            return q, k, v
        return self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)


def _norms(base: nn.Module, head_dim: int) -> str:
    """Where the base module normalizes queries and keys: "", "head" or "projection"."""
    if not hasattr(base, "q_norm"):
        return ""
    width: int = base.q_norm.weight.numel()  # type: ignore[operator,union-attr]
    return "head" if width == head_dim else "projection"
