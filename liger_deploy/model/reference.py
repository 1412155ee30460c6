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


def window(
    q_TK: Tensor, k_TK: Tensor, v_TV: Tensor, keys: int, scale: float, frequencies: Tensor, sinks: int = 0
) -> Tensor:
    """Eq. 10 for one head: softmax over the last `keys` keys, the current one included, with rotary embedding.

    The first `sinks` keys stay visible; once out of the window they score as if `keys` tokens away (LM-Infinite,
    arXiv 2308.16137: the distance limit).
    """
    q_TK, k_TK, v_TV = q_TK.double(), k_TK.double(), v_TV.double()
    outs = []
    for t in range(len(q_TK)):
        seen = [j for j in range(t + 1) if j > t - keys or j < sinks]
        turned = [rotate(q_TK[t], min(t - j, keys), frequencies) for j in seen]
        scores = torch.stack([q_K @ k_TK[j] * scale for q_K, j in zip(turned, seen, strict=True)])
        outs.append(scores.softmax(0) @ v_TV[seen])
    return torch.stack(outs)


def lolcats(
    q_TK: Tensor,
    k_TK: Tensor,
    v_TV: Tensor,
    keys: int,
    scale: float,
    frequencies: Tensor,
    maps: tuple[Tensor, Tensor],
    gamma: float,
) -> Tensor:
    """LoLCATs (arXiv 2410.10254) for one query head: a softmax window and learned features, one denominator."""
    q_TK, k_TK = (torch.stack([rotate(x.double(), t, frequencies) for t, x in enumerate(xs)]) for xs in (q_TK, k_TK))
    q_TF, k_TF = (_features(x, m.double()) for x, m in zip((q_TK, k_TK), maps, strict=True))
    outs = []
    for t in range(len(q_TK)):
        first = max(0, t - keys + 1)
        scores = k_TK[first : t + 1] @ q_TK[t] * scale
        near = gamma * (scores - scores.max()).exp()
        far = k_TF[:first] @ q_TF[t]
        weights = torch.cat([far, near])
        outs.append(weights @ v_TV[: t + 1].double() / weights.sum())
    return torch.stack(outs)


def _features(x_TK: Tensor, map_KF: Tensor) -> Tensor:
    x_TF = x_TK @ map_KF
    return torch.cat([x_TF.softmax(-1), (-x_TF).softmax(-1)], -1).clamp(min=1e-12)


def rotate(x_K: Tensor, position: int, frequencies: Tensor) -> Tensor:
    """Rotary embedding of one vector, halves paired as Hugging Face's Llama does; frequencies [K/2] in radians."""
    angle = position * frequencies.double()
    a, b = x_K.chunk(2)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])


def alpha(p_TC: Tensor, config: LigerConfig, head: int = 0) -> Tensor:
    """Table 1: the retention of each gate channel, in (0, 1), for KV head `head`."""
    p = p_TC.double()
    sigma = torch.exp(-torch.logaddexp(torch.zeros_like(p), -p))
    rows = {
        "gla": sigma,
        "gsa": sigma,
        "hgrn2": config.lower_bound + (1 - config.lower_bound) * sigma,
        "rwkv6": torch.exp(-torch.exp(p)),
        "mamba2": torch.exp(-torch.logaddexp(torch.zeros_like(p), p)),
        "mlstm": sigma,
        "gated_retention": sigma,
        "linear": torch.ones_like(p),
        "fixed_decay": torch.full_like(p, 1 - 2.0 ** -(5 + head)),
    }
    return rows[config.structure] ** (1 / config.gate_normalizer)


def pool(k_TK: Tensor, config: LigerConfig) -> Tensor:
    """Eq. 6, Pooling: identity for key-wide gates, the head's mean for scalar ones, means of neighbours for slots."""
    width = {"scalar": 1, "slot": config.slots}.get(config.row.width, k_TK.shape[1])
    return torch.stack([part.mean(1) for part in k_TK.double().chunk(width, 1)], 1)


def slots(q_TK: Tensor, k_TK: Tensor, v_TV: Tensor, alpha_TM: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Gated slot attention (arXiv 2409.07146) for one head: slots of keys and values, read by a softmax over slots."""
    keys_MK = torch.zeros(alpha_TM.shape[1], k_TK.shape[1], dtype=torch.float64)
    values_MV = torch.zeros(alpha_TM.shape[1], v_TV.shape[1], dtype=torch.float64)
    outs = []
    for q_K, k_K, v_V, a_M in zip(q_TK.double(), k_TK.double(), v_TV.double(), alpha_TM, strict=True):
        keys_MK = a_M[:, None] * keys_MK + torch.outer(1 - a_M, k_K)
        values_MV = a_M[:, None] * values_MV + torch.outer(1 - a_M, v_V)
        outs.append((keys_MK @ q_K).softmax(0) @ values_MV)
    return torch.stack(outs), (keys_MK, values_MV)


def attention(
    q_TK: Tensor, k_TK: Tensor, v_TV: Tensor, config: LigerConfig, frequencies: Tensor, head: int = 0
) -> Tensor:
    """Eq. 9 for one head: recurrent_weight * Eq. 7 + window_weight * Eq. 10. `head` numbers the KV head."""
    near = window(q_TK, k_TK, v_TV, config.window, 1 / math.sqrt(q_TK.shape[1]), frequencies, config.sinks)
    if config.structure == "window":
        return config.window_weight * near
    decay = alpha(pool(k_TK, config), config, head)
    if config.structure == "gsa":
        long, _ = slots(q_TK, k_TK, v_TV, decay)
    else:
        phi_q, phi_k = (x.double().softmax(-1) if config.feature_map == "softmax" else x for x in (q_TK, k_TK))
        long, _ = recurrent(phi_q, 1 - decay if config.structure == "hgrn2" else phi_k, v_TV, decay)
    return config.recurrent_weight * long + config.window_weight * near
