"""The sliding-window branch (arXiv 2503.01496, Eq. 10), step/prefill form and blocked form side by side.

Keys are kept before RoPE and rotated when read, by their place inside the read (0 .. S-1) and not in the text: the
scores depend on distances alone, so they are the same, no table grows with position, and token 10,000,000 is as exact
as token 10.

Shape legend: B batch, T time, G KV heads, R query heads per KV head, K key dim, V value dim, W window, S keys read.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Rope = tuple[Tensor, Tensor]  # cos, sin [>= S, rotary dim]; an empty table where a layer has no RoPE


def attend(q_BTGRK: Tensor, k_BGSK: Tensor, v_BGSV: Tensor, visible_BTS: Tensor, rope: Rope, scale: float) -> Tensor:
    """Softmax attention of the last T of S positions, [B,T,G,R,V]. `visible` broadcasts over the batch."""
    length, keys, queries = q_BTGRK.shape[1], k_BGSK.shape[2], q_BTGRK.shape[3]
    q_BGRTK = rotate(q_BTGRK.permute(0, 2, 3, 1, 4), rope, keys - length, keys)
    k_BGSK = rotate(k_BGSK, rope, 0, keys)
    scores_BGXS = (q_BGRTK.flatten(2, 3) @ k_BGSK.mT).float() * scale  # X: R queries of T positions each
    hidden_BXS = ~visible_BTS.repeat(1, queries, 1)
    weights_BGXS = scores_BGXS.masked_fill(hidden_BXS[:, None], torch.finfo(torch.float32).min).softmax(-1)
    out_BGXV = weights_BGXS.to(v_BGSV.dtype) @ v_BGSV
    out: Tensor = out_BGXV.unflatten(2, (queries, length)).permute(0, 3, 1, 2, 4)
    return out


def rotate(x_SK: Tensor, rope: Rope, start: int, stop: int) -> Tensor:
    """Rotary embedding of [..., S, K] at positions start .. stop-1; channels beyond the table pass through."""
    cos, sin = (table[start:stop].to(x_SK.dtype) for table in rope)
    width = cos.shape[-1]
    if width == 0:
        return x_SK
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


def attend_sequence(
    q_BTGRK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, segment_BT: Tensor, rope: Rope, scale: float, window: int
) -> Tensor:
    """A whole sequence in blocks of W queries that see two blocks of keys: memory linear in T. [B,T,G,R,V].

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
    out_nTGRV = attend(q_nTGRK, k_nGSK, v_nGSV, visible_nTS, rope, scale)
    out: Tensor = out_nTGRV.unflatten(0, (batch, -1)).flatten(1, 2)[:, :length]
    return out


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
