"""Mixer: what one layer does between its projections and o_proj. It has no parameters (LoLCATs' are handed in).

    out = recurrent_weight * recurrence + window_weight * window      (arXiv 2503.01496, Eq. 9)

Shape legend: B batch, T time, D model width, G KV heads, R query heads per KV head, K key dim, V value dim (= K).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from liger_deploy.config import LigerConfig
from liger_deploy.model import recurrence, window
from liger_deploy.model.lolcats import Lolcats
from liger_deploy.model.recurrence import Recurrence
from liger_deploy.model.window import Rope
from liger_deploy.state import ModelShape, layer_tensors


class Heads(NamedTuple):
    """A layer's projections, before RoPE: q [B,T,G,R,K], k [B,T,G,K], v [B,T,G,V], the gate's key [B,T,G,K]."""

    q: Tensor
    k: Tensor
    v: Tensor
    gate_key: Tensor


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


class Mixer:
    """One layer's mixing of tokens: `after_state` continues from a state, `sequence` takes whole sequences.

    `recurrence` and `slot_scores` are the forms of the linear recurrence; an exporter may put others in their place.
    """

    def __init__(self, config: LigerConfig, scaling: float) -> None:
        self.liger = config
        self.scaling = scaling
        self.recurrence: Recurrence = recurrence.gated_chunked
        self.slot_scores: Recurrence = recurrence.slot_scores

    def after_state(
        self,
        heads: Heads,
        rope: Rope,
        layer: LayerState,
        length: Tensor,
        valid: Tensor | None = None,
        lolcats: Lolcats | None = None,
    ) -> tuple[Tensor, LayerState]:
        """T tokens after a state: out [B,T,G,R,V] and this layer's next state.

        length [B]: tokens seen before. valid [B]: real tokens among the T, the first ones; None when all are.
        """
        q, k, v, gate_key = heads
        tokens, width = q.shape[1], self.liger.window
        new_k, new_v = k.transpose(1, 2), v.transpose(1, 2)
        keys, values = torch.cat([layer.window_k, new_k], 2), torch.cat([layer.window_v, new_v], 2)
        visible = window.visible_after_state(length, tokens, width)
        keep, recurrent, sinks = _keep(valid, tokens), layer.recurrent, None
        if self.liger.sinks:
            first = zip(recurrent, (new_k, new_v), strict=True)
            recurrent = tuple(window.keep_first(kept, new, length, valid) for kept, new in first)
            sinks = window.sinks_after_state(recurrent, length, tokens, width)
        near = window.attend(q, keys, values, visible, rope, self.scaling, sinks)
        out: Tensor
        if lolcats is not None:
            gone = (x[:, :, :tokens].transpose(1, 2) for x in (keys, values))
            position = length[:, None] + torch.arange(tokens, device=q.device)
            left = position >= width if keep is None else (position >= width) & keep
            out, recurrent = lolcats(q, near, *gone, position, width, left, None, recurrent, self.recurrence)
        elif self.liger.row.width == "none":
            out = self._mix(None, near[0])
        else:
            long, recurrent = self._recurrent(q, k, v, gate_key, keep, None, recurrent)
            out = self._mix(long, near[0])
        kept = (window.keep_last(x, valid, width) for x in (keys, values))
        return out, LayerState(recurrent, *kept)

    def sequence(self, heads: Heads, rope: Rope, segments: Segments, lolcats: Lolcats | None = None) -> Tensor:
        """Whole sequences from the empty state: [B,T,G,R,V]."""
        liger, segment = self.liger, segments.number
        q, k, v, gate_key = heads
        near = window.attend_sequence(q, k, v, segment, rope, self.scaling, liger.window, liger.sinks)
        if liger.row.width == "none":
            return self._mix(None, near[0])
        zeros = self._zeros(q)
        if lolcats is not None:
            gone = (window.delayed(x, liger.window) for x in (k, v))
            left = (window.delayed(segment, liger.window) == segment) & (segment > 0)
            position = torch.arange(q.shape[1], device=q.device) - window.first_of_segment(segment)
            rest = (position, liger.window, left, segments.restart, zeros, self.recurrence)
            out: Tensor
            out, _ = lolcats(q, near, *gone, *rest)
            return out
        long, _ = self._recurrent(q, k, v, gate_key, segments.keep, segments.restart, zeros)
        return self._mix(long, near[0])

    def gate(self, gate_key_BTGK: Tensor) -> Tensor:
        """log alpha, [B,T,G,C]: Pooling over the key's channels (Eq. 6), then the structure's row of Table 1."""
        p, width = gate_key_BTGK.float(), self.liger.row.width
        if width == "scalar":
            p = p.mean(-1, keepdim=True)
        elif width == "slot":
            p = p.unflatten(-1, (self.liger.slots, -1)).mean(-1)
        return self.liger.row.log_decay(p, self.liger)

    def feature_map(self, x: Tensor) -> Tensor:
        """phi of a query or key head, along its last dimension, in float32."""
        return x.float().softmax(-1) if self.liger.feature_map == "softmax" else x.float()

    def writes(
        self, k: Tensor, gate_key: Tensor, keep_BT: Tensor | None, restart_BT: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """log alpha [B,T,G,C] and the keys that are written [B,T,G,K] (or the slots' weights), float32. Where `keep` is
        False nothing decays or is written; where `restart` is True the state is forgotten first."""
        g = self.gate(gate_key)
        write = 1 - g.exp() if self.liger.row.key_from_gate or self.liger.slots else self.feature_map(k)
        if keep_BT is not None:
            keep_BT11 = keep_BT[:, :, None, None].to(g.dtype)
            g, write = g * keep_BT11, write * keep_BT11
        if restart_BT is not None:
            g = g.masked_fill(restart_BT[:, :, None, None], recurrence.FORGET)
        return g, write

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
        """Eq. 7 (or gated slot attention) over T tokens."""
        g, write = self.writes(k, gate_key, keep_BT, restart_BT)
        step = keep_BT is None and q.shape[1] == 1
        q, v = self.feature_map(q), v.float()
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

    def _zeros(self, q_BTGRK: Tensor) -> tuple[Tensor, ...]:
        """The empty recurrence, as `StateSpec` lays it out."""
        batch, _, groups, queries, dim = q_BTGRK.shape
        tensors = layer_tensors(0, self.liger, ModelShape(1, groups * queries, groups, dim))
        return tuple(torch.zeros(batch, *spec.shape, device=q_BTGRK.device) for spec in [*tensors][:-2])


def _keep(valid_B: Tensor | None, tokens: int) -> Tensor | None:
    """[B,T] bool: which of the T tokens are real; None when all are."""
    return None if valid_B is None else torch.arange(tokens, device=valid_B.device) < valid_B[:, None]
