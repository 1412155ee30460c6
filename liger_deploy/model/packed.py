"""Matrices in 8 and in 4 bits, as `liger::linear_step` reads them.

Words of 32 bits, int32, hold the numbers of a row in order, the lowest bits first. A number stands for itself less half
of its range: from 0 to 255 for -128 to 127, from 0 to 15 for -8 to 7.
8 bits: [N,D/4], and a float32 scale for each row.
4 bits: [N,D/8], and a bfloat16 scale for each group of 32 columns of a row.

Shape legend: N rows, D columns, G groups of a row, W words, K numbers of a word.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 32
WORDS = GROUP // 8  # of a group, in 4 bits
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)  # tried for each group's scale: the one with the least squared error is kept


class Packed(NamedTuple):
    """The words, and the numbers' scales."""

    words: Tensor
    scale: Tensor


def pack(weight_ND: Tensor, bits: int) -> Packed:
    """Quantize a matrix to 8 or 4 bits; columns are filled up with zeros to whole words, or whole groups."""
    if bits == 8:
        signed_ND, scale_N = round_rows(F.pad(weight_ND.detach(), (0, -weight_ND.shape[1] % 4)))
        return Packed((signed_ND.to(torch.int16) + 128).to(torch.uint8).view(torch.int32), scale_N)
    exact_ND = weight_ND.detach().float()
    groups_NGC = F.pad(exact_ND, (0, -exact_ND.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    largest_NG1 = groups_NGC.gather(2, groups_NGC.abs().argmax(2, keepdim=True))  # with its sign: it becomes -8
    tried = [_rounded(groups_NGC, largest_NG1 * shrink / -8) for shrink in _SHRINK]
    errors = torch.stack([((q - 8) * scale - groups_NGC).square().sum(2) for q, scale in tried])
    best_NG11 = errors.argmin(0)[None, :, :, None]
    q_NGC, scale_NG1 = (torch.stack(x).gather(0, best_NG11.expand(1, *x[0].shape))[0] for x in zip(*tried, strict=True))
    q_ND = q_NGC.to(torch.uint8).flatten(1)
    return Packed((q_ND[:, ::2] | q_ND[:, 1::2] << 4).view(torch.int32), scale_NG1[..., 0].bfloat16())


def bits_of(words: Tensor, scale: Tensor) -> int:
    """4, where groups have the scales, or 8, where rows have them."""
    return 4 if scale.dim() == words.dim() else 8


def round_rows(weight_ND: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest int8 [N,D], and their float32 scales [N]."""
    exact_ND = weight_ND.detach().float()
    scale_N1 = (exact_ND.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
    return (exact_ND / scale_N1).round().to(torch.int8), scale_N1[:, 0]


def _rounded(groups_NGC: Tensor, scale_NG1: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers from 0 to 15, and the scale as it is kept."""
    kept_NG1 = scale_NG1.bfloat16().float()
    kept_NG1 = torch.where(kept_NG1 == 0, 1e-30, kept_NG1)
    return ((groups_NGC / kept_NG1).round() + 8).clamp(0, 15), kept_NG1


def unpack(words: Tensor, scale: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """The matrix [N,D] that a Packed stands for, or some of its rows [...,D]; D is `width`."""
    bits = bits_of(words, scale)
    shift_K = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    scaled_NGW = words.unflatten(-1, (-1, WORDS)) if bits == 4 else words  # words that share a scale
    q_NGWK = (scaled_NGW[..., None] >> shift_K) & (2**bits - 1)
    exact_NGWK = (q_NGWK - 2 ** (bits - 1)).float() * scale[..., None, None].float()
    matrix_ND: Tensor = exact_NGWK.flatten(words.dim() - 1)[..., :width].to(dtype)
    return matrix_ND


def packed_rows(words: Tensor, scale: Tensor, ids: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Rows of a packed matrix: an embedding's, [...,D]."""
    return unpack(words[ids], scale[ids], width, dtype)
