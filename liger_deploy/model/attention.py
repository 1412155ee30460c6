"""LigerAttention: a Hugging Face attention module whose softmax became a gated recurrence and a window.

It takes over the base module's projections, norms and biases under their own names, so a checkpoint of one loads into
the other, and knows no model family: what differs between families is read off the base module's attributes.

Shape legend: B batch, T time, D model width, G KV heads, R query heads per KV head, K key dim, V value dim (= K).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from liger_deploy.config import LigerConfig
from liger_deploy.errors import SessionError
from liger_deploy.model import recurrence, window

Recurrence = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass
class LayerState:
    """State of one layer, laid out as `StateSpec` says: the recurrence's tensors, then keys and values."""

    recurrent: tuple[Tensor, ...]
    window_k: Tensor
    window_v: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """In the order of `StateSpec`."""
        return (*self.recurrent, self.window_k, self.window_v)


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

    def __init__(self, base: nn.Module, config: LigerConfig, rope: window.Rope) -> None:
        super().__init__()
        self.layer_idx: int = base.layer_idx  # type: ignore[assignment]
        self.head_dim: int = base.head_dim  # type: ignore[assignment]
        self.scaling: float = base.scaling  # type: ignore[assignment]
        self.queries_per_key: int = base.num_key_value_groups  # type: ignore[assignment]
        self.liger = config
        self.rope_cos: Tensor
        self.rope_sin: Tensor
        self.register_buffer("rope_cos", rope[0], persistent=False)
        self.register_buffer("rope_sin", rope[1], persistent=False)
        for name, child in base.named_children():
            self.add_module(name, child)
        self.norms = _norms(base, self.head_dim)
        self.recurrence: Recurrence = recurrence.gated_chunked
        self.slot_scores: Recurrence = recurrence.slot_scores

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
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Called by the Hugging Face layer. hidden [B,T,D], attention_mask [B,T] bool (False: padding) or None.

        Without a state the T tokens are a whole sequence; with one they continue it, and `past_key_values` holds the
        next state afterwards.
        """
        q, k, v, gate_key = self._project(hidden_states)
        if past_key_values is None:
            out = self._sequence(q, k, v, gate_key, attention_mask)
        elif isinstance(past_key_values, ModelState):
            out = self._continue(q, k, v, gate_key, past_key_values)
        else:
            raise SessionError("a Liger model keeps no KV cache: pass use_cache=False, or decode through a Session")
        return self.o_proj(out.flatten(2).to(hidden_states.dtype)), None

    def _project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
        self, q: Tensor, k: Tensor, v: Tensor, gate_key: Tensor, keep_BT: Tensor | None, state: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Eq. 7 (or gated slot attention) over T tokens. Where `keep` is False nothing decays or is written."""
        g = self._gate(gate_key)
        keep = 1 if keep_BT is None else keep_BT[:, :, None, None].to(g.dtype)
        g, step = g * keep, keep_BT is None and q.shape[1] == 1
        q, v = self._feature_map(q), v.float()
        if self.liger.row.width == "slot":
            if step:
                out, *slots = recurrence.slot_step(q[:, 0], k[:, 0].float(), v[:, 0], g[:, 0], *state)
                return out[:, None], tuple(slots)
            write = (1 - g.exp()) * keep
            scores, keys = self.slot_scores(q, k.float(), write, g, state[0])
            out, values = self.recurrence(scores.softmax(-1), write, v, g, state[1])
            return out, (keys, values)
        k = (1 - g.exp() if self.liger.row.key_from_gate else self._feature_map(k)) * keep
        if step:
            out, new = recurrence.gated_step(q[:, 0], k[:, 0], v[:, 0], g[:, 0], state[0])
            return out[:, None], (new,)
        out, new = self.recurrence(q, k, v, g, state[0])
        return out, (new,)

    def _long(
        self, q: Tensor, k: Tensor, v: Tensor, gate_key: Tensor, keep_BT: Tensor | None, state: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """The recurrent branch, or None where the structure has none."""
        if self.liger.row.width == "none":
            return None, ()
        return self._recurrent(q, k, v, gate_key, keep_BT, state)

    def _mix(self, long: Tensor | None, near: Tensor) -> Tensor:
        if long is None:
            return self.liger.window_weight * near
        return self.liger.recurrent_weight * long + self.liger.window_weight * near.to(long.dtype)

    def _continue(self, q: Tensor, k: Tensor, v: Tensor, gate_key: Tensor, state: ModelState) -> Tensor:
        """T tokens after a state: [B,T,G,R,V]; replaces this layer's state."""
        layer, tokens, width = state.layers[self.layer_idx], q.shape[1], self.liger.window
        keep = None
        if state.valid is not None:
            keep = torch.arange(tokens, device=q.device) < state.valid[:, None]
        keys = torch.cat([layer.window_k, k.transpose(1, 2)], 2)
        values = torch.cat([layer.window_v, v.transpose(1, 2)], 2)
        visible = window.visible_after_state(state.length, tokens, width)
        near = window.attend(q, keys, values, visible, (self.rope_cos, self.rope_sin), self.scaling)
        long, recurrent = self._long(q, k, v, gate_key, keep, layer.recurrent)
        kept = (window.keep_last(x, state.valid, width) for x in (keys, values))
        state.layers[self.layer_idx] = LayerState(recurrent, *kept)
        return self._mix(long, near)

    def _sequence(self, q: Tensor, k: Tensor, v: Tensor, gate_key: Tensor, keep_BT: Tensor | None) -> Tensor:
        """A whole sequence from the empty state: [B,T,G,R,V]."""
        batch, tokens, groups, dim = k.shape
        slots = self.liger.slots
        shapes = [(dim, slots), (slots, dim)] if slots else [(dim, dim)]
        zeros = tuple(torch.zeros(batch, groups, *shape, device=q.device, dtype=torch.float32) for shape in shapes)
        segment = torch.ones(batch, tokens, dtype=torch.long, device=q.device) if keep_BT is None else keep_BT.long()
        near = window.attend_sequence(q, k, v, segment, (self.rope_cos, self.rope_sin), self.scaling, self.liger.window)
        long, _ = self._long(q, k, v, gate_key, keep_BT, zeros)
        return self._mix(long, near)


def _norms(base: nn.Module, head_dim: int) -> str:
    """Where the base module normalizes queries and keys: "", "head" or "projection"."""
    if not hasattr(base, "q_norm"):
        return ""
    width: int = base.q_norm.weight.numel()  # type: ignore[operator,union-attr]
    return "head" if width == head_dim else "projection"
