"""Matrices in 8 and in 4 bits, as `liger::linear_step` reads them.

8 bits: int8 [N,D], and a float32 scale for each row.
4 bits: int32 [N,D/8], and a bfloat16 scale for each group of 32 columns of a row. A group is four words: column
        4 k + j of it is in bits 4 k to 4 k + 3 of word j, as a number from 0 to 15 that stands for -8 to 7.

Shape legend: N rows, D columns, G groups of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 32
WORDS = GROUP // 8
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)  # tried for each group's scale: the one with the least squared error is kept


class Packed(NamedTuple):
    """The numbers, int8 or int32, and their scales."""

    numbers: Tensor
    scale: Tensor


def pack(weight_ND: Tensor, bits: int) -> Packed:
    """Quantize a matrix to 8 or 4 bits; columns are filled up with zeros to whole groups."""
    exact_ND = weight_ND.detach().float()
    if bits == 8:
        scale_N1 = (exact_ND.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
        return Packed((exact_ND / scale_N1).round().to(torch.int8), scale_N1[:, 0])
    groups_NGC = F.pad(exact_ND, (0, -exact_ND.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    largest_NG1 = groups_NGC.gather(2, groups_NGC.abs().argmax(2, keepdim=True))  # with its sign: it becomes -8
    tried = [_rounded(groups_NGC, largest_NG1 * shrink / -8) for shrink in _SHRINK]
    errors = torch.stack([((q - 8) * scale - groups_NGC).square().sum(2) for q, scale in tried])
    best_NG11 = errors.argmin(0)[None, :, :, None]
    q_NGC, scale_NG1 = (torch.stack(x).gather(0, best_NG11.expand(1, *x[0].shape))[0] for x in zip(*tried, strict=True))
    q_NGKJ = q_NGC.to(torch.int64).unflatten(2, (8, WORDS))
    words_NGJ = (q_NGKJ << torch.arange(0, 32, 4, device=q_NGKJ.device)[:, None]).sum(2)
    words_NGJ = torch.where(words_NGJ >= 1 << 31, words_NGJ - (1 << 32), words_NGJ).to(torch.int32)
    return Packed(words_NGJ.flatten(1), scale_NG1[..., 0].bfloat16())


def _rounded(groups_NGC: Tensor, scale_NG1: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers from 0 to 15, and the scale as it is kept."""
    kept_NG1 = scale_NG1.bfloat16().float()
    kept_NG1 = torch.where(kept_NG1 == 0, 1e-30, kept_NG1)
    return ((groups_NGC / kept_NG1).round() + 8).clamp(0, 15), kept_NG1


def unpack(numbers: Tensor, scale: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """The matrix [N,D] that a Packed stands for; D is `width`."""
    if numbers.dtype == torch.int8:
        return (numbers.float() * scale[:, None]).to(dtype)
    words_NG1J = numbers.unflatten(1, (-1, 1, WORDS))
    q_NGKJ = (words_NG1J >> torch.arange(0, 32, 4, device=numbers.device)[:, None]) & 15
    filled_ND: Tensor = ((q_NGKJ - 8).float() * scale[:, :, None, None].float()).flatten(1)
    return filled_ND[:, :width].to(dtype)


def packed_rows(numbers: Tensor, scale: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a matrix in 8 bits: an embedding's, [..., D]."""
    return (numbers[ids].float() * scale[ids][..., None]).to(dtype)
