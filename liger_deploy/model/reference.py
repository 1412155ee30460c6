"""Float64 loops over tokens and keys, slow on purpose: the judge of every parity test. Calls no other module's maths.

Written from the paper's equations (arXiv 2503.01496: Eq. 7 recurrence, Table 1 gates, Eq. 9 mix, Eq. 10 window), one
sequence and one head at a time. Golden values come from here, never from the code they judge.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from liger_deploy.config import LigerConfig


def recurrent(q_TK: Tensor, k_TK: Tensor, v_TV: Tensor, alpha_TC: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 7 for one head: S_t = diag(alpha_t) S_{t-1} + k_t^T v_t, o_t = q_t S_t. alpha [T,K] or [T,1]."""
    state_KV = torch.zeros(k_TK.shape[1], v_TV.shape[1], dtype=torch.float64)
    outs = []
    for q_K, k_K, v_V, alpha_C in zip(q_TK.double(), k_TK.double(), v_TV.double(), alpha_TC.double(), strict=True):
        state_KV = alpha_C[:, None] * state_KV + torch.outer(k_K, v_V)
        outs.append(q_K @ state_KV)
    return torch.stack(outs), state_KV


def window(q_TK: Tensor, k_TK: Tensor, v_TV: Tensor, keys: int, scale: float, frequencies: Tensor) -> Tensor:
    """Eq. 10 for one head: softmax over the last `keys` keys, the current one included, with rotary embedding."""
    q_TK, k_TK, v_TV = q_TK.double(), k_TK.double(), v_TV.double()
    outs = []
    for t in range(len(q_TK)):
        first = max(0, t - keys + 1)
        q_K = rotate(q_TK[t], t, frequencies)
        scores = torch.stack([q_K @ rotate(k_TK[j], j, frequencies) * scale for j in range(first, t + 1)])
        outs.append(scores.softmax(0) @ v_TV[first : t + 1])
    return torch.stack(outs)


def rotate(x_K: Tensor, position: int, frequencies: Tensor) -> Tensor:
    """Rotary embedding of one vector, halves paired as Hugging Face's Llama does; frequencies [K/2] in radians."""
    angle = position * frequencies.double()
    a, b = x_K.chunk(2)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])


def alpha(p_TC: Tensor, config: LigerConfig) -> Tensor:
    """Table 1: the retention of each gate channel, in (0, 1)."""
    p = p_TC.double()
    rows = {"gla": lambda: torch.exp(-torch.logaddexp(torch.zeros_like(p), -p))}
    return rows[config.structure]() ** (1 / config.gate_normalizer)


def attention(q_TK: Tensor, k_TK: Tensor, v_TV: Tensor, config: LigerConfig, frequencies: Tensor) -> Tensor:
    """Eq. 9 for one head: recurrent_weight * Eq. 7 + window_weight * Eq. 10."""
    scale = 1 / math.sqrt(q_TK.shape[1])
    phi_q, phi_k = q_TK.double().softmax(-1), k_TK.double().softmax(-1)
    long, _ = recurrent(phi_q, phi_k, v_TV, alpha(k_TK, config))
    near = window(q_TK, k_TK, v_TV, config.window, scale, frequencies)
    return config.recurrent_weight * long + config.window_weight * near
