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
from liger_deploy.model import recurrence, window
from liger_deploy.model.lolcats import Lolcats
from liger_deploy.model.recurrence import Recurrence
from liger_deploy.state import ModelShape, layer_tensors

Mode = Literal["liger", "softmax", "transfer"]
Heads = tuple[Tensor, Tensor, Tensor, Tensor]  # q [B,T,G,R,K], k [B,T,G,K], v [B,T,G,V], gate's key [B,T,G,K]


@dataclass(frozen=True)
class RopeTable:
    """A layer's rotary embedding: cos and sin [S, rotary dim] by distance, and the model's own frequencies."""

    cos: Tensor
    sin: Tensor
    inverse_frequency: Tensor
    scale: float


@dataclass
class LayerState:
    """State of one layer, laid out as `StateSpec` says: recurrence (or sinks), then the window's keys and values."""

    recurrent: tuple[Tensor, ...]
    window_k: Tensor
    window_v: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """In the order of `StateSpec`."""
        return (*self.recurrent, self.window_k, self.window_v)


@dataclass
class Segments:
    """Which tokens of a sequence belong together, [B,T].

    Attributes:
        number: documents of a row numbered from 1; 0 is padding.
        keep: False for padding; None when there is none.
        restart: True where a document begins and the state must be forgotten; None when rows hold one document each.
    """

    number: Tensor
    keep: Tensor | None
    restart: Tensor | None

    @classmethod
    def of(cls, x_BTD: Tensor, mask_BT: Tensor | None, segment_BT: Tensor | None) -> Segments:
        """From a padding mask, or from segment numbers, or from neither."""
        if segment_BT is not None:
            return cls(segment_BT, segment_BT > 0, window.starts(segment_BT))
        if mask_BT is not None:
            return cls(mask_BT.long(), mask_BT.bool(), None)
        return cls(torch.ones(x_BTD.shape[:2], dtype=torch.long, device=x_BTD.device), None, None)


@dataclass
class ModelState:
    """All layers' state on its way through one forward, handed to Hugging Face's layers as `past_key_values`.

    Attributes:
        layers: read by each layer, and replaced by its next state.
        length: [B] int64, tokens seen before this call.
        valid: [B] int64, real tokens among the T given; None when all are (a step).
    """

    layers: list[LayerState]
    length: Tensor
    valid: Tensor | None = None
    is_compileable: bool = field(default=False, init=False)
    is_sliding: tuple[bool, ...] = field(default=(), init=False)

    def keep(self, tokens: int) -> Tensor | None:
        """[B,T] bool: which of the T tokens are real; None when all are."""
        if self.valid is None:
            return None
        return torch.arange(tokens, device=self.valid.device) < self.valid[:, None]

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
    lolcats: Lolcats

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
        self.recurrence: Recurrence = recurrence.gated_chunked
        self.slot_scores: Recurrence = recurrence.slot_scores
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
        segment_ids: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Called by the Hugging Face layer. hidden [B,T,D], attention_mask [B,T] bool (False: padding) or None.

        Without a state the T tokens are a whole sequence (or several, numbered from 1 by `segment_ids` [B,T], 0 being
        padding); with one they continue it, and `past_key_values` holds the next state afterwards.
        """
        heads = self._project(hidden_states)
        if past_key_values is None:
            segments = Segments.of(hidden_states, attention_mask, segment_ids)
            out = self._in_mode(heads, segments, position_embeddings)
        elif isinstance(past_key_values, ModelState):
            out = self._continue(*heads, past_key_values)
        else:
            raise SessionError("a Liger model keeps no KV cache: pass use_cache=False, or decode through a Session")
        return self.o_proj(out.flatten(2).to(hidden_states.dtype)), None

    def _in_mode(self, heads: Heads, segments: Segments, position_embeddings: tuple[Tensor, Tensor] | None) -> Tensor:
        """`mode`: "liger"; "softmax", the base model's attention; "transfer", the latter while measuring the former
        against it (LoLCATs' first stage: mean squared error of the heads' outputs)."""
        if self.mode == "liger":
            return self._sequence(*heads, segments)
        rope = position_embeddings if self.rope_cos.shape[-1] else None
        teacher = window.attend_all(*heads[:3], segments.number, rope, self.scaling, self.base_window)
        if self.mode == "transfer":
            with torch.enable_grad():
                ours = self._sequence(*heads, segments)
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
        return q.unflatten(2, (-1, self.queries_per_key)), k, v, raw if self.liger.gate_source == "raw" else k

    def _projections(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if hasattr(self, "qkv_proj"):  # one matrix (Phi 3): R query heads for each key and value head
            groups = self.queries_per_key
            fused: Tensor = self.qkv_proj(x_BTD)
            unit = fused.shape[-1] // (groups + 2)
            q, k, v = fused.split([groups * unit, unit, unit], -1)
            return q, k, v
        return self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)

    def _gate(self, gate_key_BTGK: Tensor) -> Tensor:
        """log alpha, [B,T,G,C]: Pooling over the key's channels (Eq. 6), then the structure's row of Table 1."""
        p, width = gate_key_BTGK.float(), self.liger.row.width
        if width == "scalar":
            p = p.mean(-1, keepdim=True)
        elif width == "slot":
            p = p.unflatten(-1, (self.liger.slots, -1)).mean(-1)
        return self.liger.row.log_decay(p, self.liger)

    def _feature_map(self, x: Tensor) -> Tensor:
        return x.float().softmax(-1) if self.liger.feature_map == "softmax" else x.float()

    def _recurrent(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate_key: Tensor,
        keep_BT: Tensor | None,
        restart_BT: Tensor | None,
        state: tuple[Tensor, ...],
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Eq. 7 (or gated slot attention) over T tokens. Where `keep` is False nothing decays or is written; where
        `restart` is True the state is forgotten first."""
        g, step = self._gate(gate_key), keep_BT is None and q.shape[1] == 1
        write = 1 - g.exp() if self.liger.row.key_from_gate or self.liger.slots else self._feature_map(k)
        if keep_BT is not None:
            keep_BT11 = keep_BT[:, :, None, None].to(g.dtype)
            g, write = g * keep_BT11, write * keep_BT11
        if restart_BT is not None:
            g = g.masked_fill(restart_BT[:, :, None, None], recurrence.FORGET)
        q, v = self._feature_map(q), v.float()
        if self.liger.slots:
            k = k.float()
            if step:
                out, *slots = recurrence.slot_step(q[:, 0], k[:, 0], v[:, 0], g[:, 0], *state)
                return out[:, None], tuple(slots)
            scores, keys = self.slot_scores(q, k, write, g, state[0])
            out, values = self.recurrence(scores.softmax(-1), write, v, g, state[1])
            return out, (keys, values)
        if step:
            out, new = recurrence.gated_step(q[:, 0], write[:, 0], v[:, 0], g[:, 0], state[0])
            return out[:, None], (new,)
        out, new = self.recurrence(q, write, v, g, state[0])
        return out, (new,)

    def _mix(self, long: Tensor | None, near: Tensor) -> Tensor:
        if long is None:
            return self.liger.window_weight * near
        return self.liger.recurrent_weight * long + self.liger.window_weight * near.to(long.dtype)

    def _continue(self, q: Tensor, k: Tensor, v: Tensor, gate_key: Tensor, state: ModelState) -> Tensor:
        """T tokens after a state: [B,T,G,R,V]; replaces this layer's state."""
        layer, tokens, width = state.layers[self.layer_idx], q.shape[1], self.liger.window
        new_k, new_v = k.transpose(1, 2), v.transpose(1, 2)
        keys, values = torch.cat([layer.window_k, new_k], 2), torch.cat([layer.window_v, new_v], 2)
        visible = window.visible_after_state(state.length, tokens, width)
        keep, recurrent, sinks = state.keep(tokens), layer.recurrent, None
        if self.liger.sinks:
            first = zip(recurrent, (new_k, new_v), strict=True)
            recurrent = tuple(window.keep_first(kept, new, state.length, state.valid) for kept, new in first)
            sinks = window.sinks_after_state(recurrent, state.length, tokens, width)
        near = window.attend(q, keys, values, visible, (self.rope_cos, self.rope_sin), self.scaling, sinks)
        out: Tensor
        if self.liger.row.width == "learned":
            gone = (x[:, :, :tokens].transpose(1, 2) for x in (keys, values))
            position = state.length[:, None] + torch.arange(tokens, device=q.device)
            left = position >= width if keep is None else (position >= width) & keep
            out, recurrent = self.lolcats(q, near, *gone, position, width, left, None, recurrent, self.recurrence)
        elif self.liger.row.width == "none":
            out = self._mix(None, near[0])
        else:
            long, recurrent = self._recurrent(q, k, v, gate_key, keep, None, recurrent)
            out = self._mix(long, near[0])
        kept = (window.keep_last(x, state.valid, width) for x in (keys, values))
        state.layers[self.layer_idx] = LayerState(recurrent, *kept)
        return out

    def _sequence(self, q: Tensor, k: Tensor, v: Tensor, gate_key: Tensor, segments: Segments) -> Tensor:
        """Whole sequences from the empty state: [B,T,G,R,V]."""
        liger, rope, segment = self.liger, (self.rope_cos, self.rope_sin), segments.number
        near = window.attend_sequence(q, k, v, segment, rope, self.scaling, liger.window, liger.sinks)
        if liger.row.width == "none":
            return self._mix(None, near[0])
        zeros = self._zeros(q)
        if liger.row.width == "learned":
            gone = (window.delayed(x, liger.window) for x in (k, v))
            left = (window.delayed(segment, liger.window) == segment) & (segment > 0)
            position = torch.arange(q.shape[1], device=q.device) - window.first_of_segment(segment)
            rest = (position, liger.window, left, segments.restart, zeros, self.recurrence)
            out: Tensor
            out, _ = self.lolcats(q, near, *gone, *rest)
            return out
        long, _ = self._recurrent(q, k, v, gate_key, segments.keep, segments.restart, zeros)
        return self._mix(long, near[0])

    def _zeros(self, q_BTGRK: Tensor) -> tuple[Tensor, ...]:
        """The empty recurrence, as `StateSpec` lays it out."""
        batch, _, groups, queries, dim = q_BTGRK.shape
        tensors = layer_tensors(0, self.liger, ModelShape(1, groups * queries, groups, dim))
        return tuple(torch.zeros(batch, *spec.shape, device=q_BTGRK.device) for spec in [*tensors][:-2])


def _norms(base: nn.Module, head_dim: int) -> str:
    """Where the base module normalizes queries and keys: "", "head" or "projection"."""
    if not hasattr(base, "q_norm"):
        return ""
    width: int = base.q_norm.weight.numel()  # type: ignore[operator,union-attr]
    return "head" if width == head_dim else "projection"
