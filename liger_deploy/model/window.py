"""The sliding-window branch (arXiv 2503.01496, Eq. 10), step/prefill form and blocked form side by side.

Keys are kept before RoPE and rotated when read, by their place inside the read (0 .. S-1) and not in the text: the
scores depend on distances alone, so they are the same, no table grows with position, and token 10,000,000 is as exact
as token 10.

Shape legend: B batch, T time, G KV heads, R query heads per KV head, K key dim, V value dim, W window, S keys read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

HIDDEN = torch.finfo(torch.float32).min
Rope = tuple[Tensor, Tensor]  # cos, sin [>= S, rotary dim]; an empty table where a layer has no RoPE


@dataclass
class Sinks:
    """The first S tokens of each sequence, for queries that they have left the window of (attention sinks).

    A sink that left the window is scored as if it were W keys away, however far it is (the distance limit of
    LM-Infinite, arXiv 2308.16137): like the window's, its scores need no position.

    Shapes: k, v [B,G,S,K] or, where a row holds several documents, [B,T,G,S,K]; visible [B,T,S].
    """

    k: Tensor
    v: Tensor
    visible: Tensor
    distance: int


def attend(
    q_BTGRK: Tensor,
    k_BGSK: Tensor,
    v_BGSV: Tensor,
    visible_BTS: Tensor,
    rope: Rope,
    scale: float,
    sinks: Sinks | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of the last T of S positions, [B,T,G,R,V], and each query's largest weight, [B,T,G,R].

    `visible` broadcasts over the batch. The largest weight is 1 / sum(exp(score - largest score)).
    """
    length, keys, queries = q_BTGRK.shape[1], k_BGSK.shape[2], q_BTGRK.shape[3]
    q_BGRTK = rotate(q_BTGRK.permute(0, 2, 3, 1, 4), rope, keys - length, keys)
    k_BGSK = rotate(k_BGSK, rope, 0, keys)
    scores_BGXS = (q_BGRTK.flatten(2, 3) @ k_BGSK.mT).float() * scale  # X: R queries of T positions each
    hidden_BXS = ~visible_BTS.repeat(1, queries, 1)
    scores_BGXS = scores_BGXS.masked_fill(hidden_BXS[:, None], HIDDEN)
    if sinks:
        scores_BGXS = torch.cat([scores_BGXS, _sink_scores(q_BTGRK, sinks, rope, scale)], -1)
    weights_BGXS = scores_BGXS.softmax(-1)
    out_BGXV = weights_BGXS[..., :keys].to(v_BGSV.dtype) @ v_BGSV
    out, peak = (_split(x, queries, length) for x in (out_BGXV, weights_BGXS.amax(-1, keepdim=True)))
    if sinks:
        out = out + _split(weights_BGXS[..., keys:], queries, length).to(v_BGSV.dtype) @ _a_token(sinks.v)
    return out, peak[..., 0]


def _sink_scores(q_BTGRK: Tensor, sinks: Sinks, rope: Rope, scale: float) -> Tensor:
    """[B, G, R * T, S]."""
    q_BTGRK = rotate(q_BTGRK[..., None, :], rope, sinks.distance, sinks.distance + 1)[..., 0, :]
    scores_BTGRS = (q_BTGRK @ rotate(_a_token(sinks.k)[..., None, :], rope, 0, 1)[..., 0, :].mT).float() * scale
    scores_BTGRS = scores_BTGRS.masked_fill(~sinks.visible[:, :, None, None], HIDDEN)
    return scores_BTGRS.permute(0, 2, 3, 1, 4).flatten(2, 3)


def _a_token(x: Tensor) -> Tensor:
    return x if x.dim() == 5 else x[:, None]


def _split(x_BGXV: Tensor, queries: int, length: int) -> Tensor:
    """[B, G, R * T, V] -> [B, T, G, R, V]."""
    out: Tensor = x_BGXV.unflatten(2, (queries, length)).permute(0, 3, 1, 2, 4)
    return out


def rotate(x_SK: Tensor, rope: Rope, start: int, stop: int) -> Tensor:
    """Rotary embedding of [..., S, K] at positions start .. stop-1; channels beyond the table pass through."""
    cos, sin = (table[start:stop] for table in rope)
    return _turn(x_SK, cos, sin) if cos.shape[-1] else x_SK


def _turn(x_SK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    width, cos, sin = cos.shape[-1], cos.to(x_SK.dtype), sin.to(x_SK.dtype)
    x, rest = x_SK[..., :width], x_SK[..., width:]
    a, b = x.chunk(2, -1)
    turned = x * cos + torch.cat([-b, a], -1) * sin
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned


def visible_after_state(length_B: Tensor, tokens: int, window: int) -> Tensor:
    """[B, T, W+T]: what each of T new tokens sees of W kept keys (those filled) and T new ones, W keys in all."""
    t = torch.arange(tokens, device=length_B.device)[:, None]
    s = torch.arange(window + tokens, device=length_B.device)[None]
    in_band = (t < s) & (s <= t + window)
    filled_BS = s >= window - length_B[:, None]
    return in_band[None] & filled_BS[:, None]


def keep_last(kept_BGSK: Tensor, valid_B: Tensor | None, window: int) -> Tensor:
    """The W entries that end at each row's last valid new token. kept [B, G, W+T, K] -> [B, G, W, K]."""
    if valid_B is None:
        return kept_BGSK[:, :, -window:]
    index_BW = valid_B[:, None] + torch.arange(window, device=valid_B.device)
    return kept_BGSK.gather(2, index_BW[:, None, :, None].expand(-1, kept_BGSK.shape[1], -1, kept_BGSK.shape[3]))


def to_ring(kept_BGWK: Tensor, length_B: Tensor) -> Tensor:
    """A window, oldest first, as a ring after `length` tokens: token t in slot t mod W."""
    return _by_slot(kept_BGWK, -length_B)


def from_ring(ring_BGWK: Tensor, length_B: Tensor) -> Tensor:
    """The inverse of `to_ring`."""
    return _by_slot(ring_BGWK, length_B)


def _by_slot(x_BGWK: Tensor, shift_B: Tensor) -> Tensor:
    window = x_BGWK.shape[2]
    index_BW = (torch.arange(window, device=x_BGWK.device) + shift_B[:, None]) % window
    return x_BGWK.gather(2, index_BW[:, None, :, None].expand_as(x_BGWK))


def keep_first(kept_BGSK: Tensor, new_BGTK: Tensor, length_B: Tensor, valid_B: Tensor | None) -> Tensor:
    """The first S entries of each row after T new tokens, of which `valid` count: [B, G, S, K]."""
    count, tokens = kept_BGSK.shape[2], new_BGTK.shape[2]
    index_BS = torch.arange(count, device=length_B.device) - length_B[:, None]
    last_B1 = tokens - 1 if valid_B is None else valid_B[:, None] - 1
    taken_BS = (index_BS >= 0) & (index_BS <= last_B1)
    index_BGSK = index_BS.clamp(0, tokens - 1)[:, None, :, None].expand(-1, kept_BGSK.shape[1], -1, kept_BGSK.shape[3])
    return torch.where(taken_BS[:, None, :, None], new_BGTK.gather(2, index_BGSK), kept_BGSK)


def sinks_after_state(kept: tuple[Tensor, ...], length_B: Tensor, tokens: int, window: int) -> Sinks:
    """What T new tokens after `length` see of a row's first S keys and values [B,G,S,K]: those out of the window."""
    k, v = kept
    t = length_B[:, None, None] + torch.arange(tokens, device=length_B.device)[:, None]
    return Sinks(k, v, torch.arange(k.shape[2], device=length_B.device) <= t - window, window)


def attend_sequence(
    q_BTGRK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    segment_BT: Tensor,
    rope: Rope,
    scale: float,
    window: int,
    sinks: int = 0,
) -> tuple[Tensor, Tensor]:
    """`attend` for a whole sequence, in blocks of W queries that see two blocks of keys: memory linear in T.

    `segment` numbers the documents of a row from 1; 0 is padding. A token sees keys of its own segment only.
    """
    batch, length = segment_BT.shape
    block = min(window, length)
    q_nTGRK = _fold(q_BTGRK, block)
    k_nGSK, v_nGSV = (_with_previous(x, block).transpose(1, 2) for x in (k_BTGK, v_BTGV))
    keys_nS = _with_previous(segment_BT, block)
    t = torch.arange(block, device=segment_BT.device)[:, None]
    s = torch.arange(2 * block, device=segment_BT.device)[None]
    in_band = (t + block - window < s) & (s <= t + block)
    visible_nTS = in_band & (keys_nS[:, None] == _fold(segment_BT, block)[:, :, None]) & (keys_nS > 0)[:, None]
    extra = _sinks_of_sequence(k_BTGK, v_BTGV, segment_BT, window, sinks, block) if sinks else None
    found = attend(q_nTGRK, k_nGSK, v_nGSV, visible_nTS, rope, scale, extra)
    out, peak = (x.unflatten(0, (batch, -1)).flatten(1, 2)[:, :length] for x in found)
    return out, peak


def attend_all(
    q_BTGRK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    segment_BT: Tensor,
    rope: Rope | None,
    scale: float,
    window: int | None,
) -> Tensor:
    """The base model's own causal attention, [B,T,G,R,V]: over all of a segment, or its last `window` keys.

    `rope` is what the base model turns by: cos and sin [B,T,rotary dim].
    """
    q_BHTK, k_BGTK, v_BGTV = (x.transpose(1, 2) for x in (q_BTGRK.flatten(2, 3), k_BTGK, v_BTGV))
    if rope is not None:
        cos, sin = (table[:, None] for table in rope)
        q_BHTK, k_BGTK = (_turn(x, cos, sin) for x in (q_BHTK, k_BGTK))
    t = torch.arange(segment_BT.shape[1], device=segment_BT.device)
    near_TS = (t[:, None] >= t) & (t[:, None] - t < (window or len(t)))
    # A padded query sees itself: a row that sees nothing would be NaN.
    same_BTS = (segment_BT[:, :, None] == segment_BT[:, None]) & ((segment_BT > 0)[:, None] | (t[:, None] == t))
    mask_B1TS = (near_TS & same_BTS)[:, None]
    out_BHTV = F.scaled_dot_product_attention(q_BHTK, k_BGTK, v_BGTV, mask_B1TS, scale=scale, enable_gqa=True)
    out: Tensor = out_BHTV.transpose(1, 2).unflatten(2, q_BTGRK.shape[2:4])
    return out


def delayed(x_BT: Tensor, steps: int) -> Tensor:
    """[B, T, ...]: at each token what was `steps` tokens before it, zeros at first."""
    length = x_BT.shape[1]
    return _pad(x_BT, min(steps, length), 0)[:, :length]


def first_of_segment(segment_BT: Tensor) -> Tensor:
    """[B, T]: the index at which each token's segment begins."""
    index_T = torch.arange(segment_BT.shape[1], device=segment_BT.device)
    return torch.where(starts(segment_BT), index_T, 0).cummax(1).values


def starts(segment_BT: Tensor) -> Tensor:
    """[B, T] bool: whether a token is the first of its segment."""
    return segment_BT != F.pad(segment_BT, (1, 0), value=-1)[:, :-1]


def _sinks_of_sequence(
    k_BTGK: Tensor, v_BTGV: Tensor, segment_BT: Tensor, window: int, count: int, block: int
) -> Sinks:
    """The first `count` tokens of each token's own segment, in the blocks of `attend_sequence`."""
    first_BT, length = first_of_segment(segment_BT), segment_BT.shape[1]
    index_BTS = first_BT[:, :, None] + torch.arange(count, device=segment_BT.device)
    visible_BTS = index_BTS <= torch.arange(length, device=segment_BT.device)[:, None] - window
    rows = torch.arange(len(segment_BT), device=segment_BT.device)[:, None, None]
    at_BTS = index_BTS.clamp(max=length - 1)
    k, v = (_fold(x[rows, at_BTS].transpose(2, 3), block) for x in (k_BTGK, v_BTGV))
    return Sinks(k, v, _fold(visible_BTS, block), window)


def _pad(x_BT: Tensor, before: int, after: int) -> Tensor:
    return F.pad(x_BT, (0, 0) * (x_BT.dim() - 2) + (before, after))


def _fold(x_BT: Tensor, block: int) -> Tensor:
    """[B, T, ...] -> [B * blocks, block, ...], zero-padded at the end."""
    out: Tensor = _pad(x_BT, 0, -x_BT.shape[1] % block).unflatten(1, (-1, block)).flatten(0, 1)
    return out


def _with_previous(x_BT: Tensor, block: int) -> Tensor:
    """[B, T, ...] -> [B * blocks, 2 * block, ...]: each block after the one before it (zeros before the first)."""
    padded = _pad(x_BT, block, -x_BT.shape[1] % block).unflatten(1, (-1, block))
    return torch.cat([padded[:, :-1], padded[:, 1:]], 2).flatten(0, 1)
