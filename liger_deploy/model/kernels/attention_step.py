"""`liger::attention_step`: all that a layer does between its projections and o_proj for one token, in one kernel.

    state = exp(g) state + phi(k) v        far = phi(q) state           (arXiv 2503.01496, Eq. 7)
    near = softmax attention over the last W keys, turned by their distance to the token
    out = recurrent_weight * far + window_weight * near                 (Eq. 9)

State and window are updated in place. The window is a ring: token t lies in slot t mod W, and the key at distance d
(0: the token itself) is read as if it stood at position W - d and the query at W, as in `window.py`.

Shape legend: B rows, G KV heads, R query heads per KV head, K key dim, V value dim, W window, S RoPE table rows.
One program takes one KV head of one row, and BV of its values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from liger_deploy.config import LigerConfig
from liger_deploy.gates import STRUCTURES
from liger_deploy.model import window
from liger_deploy.model.kernels import launcher
from liger_deploy.model.lolcats import Lolcats
from liger_deploy.model.mixer import Heads, LayerState, Mixer
from liger_deploy.model.window import Rope

# The gates of `gates.STRUCTURES`, as `_log_decay` numbers them.
_GATES = {
    "gla": 0,
    "mlstm": 0,
    "gated_retention": 0,
    "hgrn2": 1,
    "rwkv6": 2,
    "mamba2": 3,
    "linear": 4,
    "fixed_decay": 5,
    "window": 6,
}
_LARGEST = 16384  # elements of a tile of state or window that one program holds
_NO_RECURRENCE = tl.constexpr(6)


@triton.jit
def _log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _log_decay(p, head, normalizer, lower_bound, GATE: tl.constexpr):
    """`gates.py`, in the same order."""
    if GATE == 0:
        return _log_sigmoid(p) / normalizer
    elif GATE == 1:
        return tl.log(lower_bound + (1.0 - lower_bound) * tl.exp(_log_sigmoid(p))) / normalizer
    elif GATE == 2:
        return -tl.exp(tl.minimum(p - tl.log(normalizer), 3.0))
    elif GATE == 3:
        return _log_sigmoid(-p) / normalizer
    elif GATE == 4:
        return p * 0.0
    else:
        return p * 0.0 + tl.log(1.0 - tl.exp2(-5.0 - head)) / normalizer


@triton.jit
def _phi(x_C, in_C, SOFTMAX: tl.constexpr):
    """Feature map of one head; channels beyond K are 0."""
    if SOFTMAX:
        x_C = tl.where(in_C, x_C, float("-inf"))
        e_C = tl.exp(x_C - tl.max(x_C, 0))
        return e_C / tl.sum(e_C, 0)
    else:
        return x_C


@triton.jit
def _attention_step(
    q_ptr, k_ptr, v_ptr, gate_ptr, length_ptr, state_ptr, ring_k_ptr, ring_v_ptr, cos_ptr, sin_ptr, out_ptr,
    q_row, k_row, v_row, gate_row,
    normalizer, lower_bound, recurrent_weight, window_weight, scale,
    G, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, ROTARY: tl.constexpr,
    GATE: tl.constexpr, SCALAR: tl.constexpr, SOFTMAX: tl.constexpr, KEY_FROM_GATE: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BW: tl.constexpr, BH: tl.constexpr, BREST: tl.constexpr,
):  # fmt: skip
    head, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, group = head // G, head % G
    half: tl.constexpr = ROTARY // 2
    c_C, c_V, j_W = tl.arange(0, BK), block * BV + tl.arange(0, BV), tl.arange(0, BW)
    in_C, in_V, in_W = c_C < K, c_V < V, j_W < W
    length = tl.load(length_ptr + row)
    slot = (length % W).to(tl.int32)
    distance_W = (slot - j_W + W) % W
    is_new_W, seen_W = j_W == slot, in_W & (distance_W <= length)

    v_V = tl.load(v_ptr + row * v_row + group * V + c_V, in_V, 0.0)
    window_VW = ring_v_ptr + (head * W + j_W[:, None]) * V + c_V[None, :]
    values_WV = tl.load(window_VW, (seen_W & ~is_new_W)[:, None] & in_V[None, :], 0.0)
    values_WV = tl.where(is_new_W[:, None], v_V[None, :], values_WV).to(tl.float32)
    tl.store(ring_v_ptr + (head * W + slot) * V + c_V, v_V, in_V)

    # Keys in three parts: the two halves that turn against each other, and the channels that do not turn.
    h_H, rest_C = tl.arange(0, BH), ROTARY + tl.arange(0, BREST)
    in_H, in_rest = h_H < half, rest_C < K
    ring_k_W1 = ring_k_ptr + (head * W + j_W[:, None]) * K
    old_W1 = (seen_W & ~is_new_W)[:, None]
    new_k_ptr = k_ptr + row * k_row + group * K
    if ROTARY > 0:
        first_H, second_H = tl.load(new_k_ptr + h_H, in_H, 0.0), tl.load(new_k_ptr + half + h_H, in_H, 0.0)
        a_WH = tl.load(ring_k_W1 + h_H[None, :], old_W1 & in_H[None, :], 0.0)
        b_WH = tl.load(ring_k_W1 + half + h_H[None, :], old_W1 & in_H[None, :], 0.0)
        a_WH = tl.where(is_new_W[:, None], first_H[None, :], a_WH).to(tl.float32)
        b_WH = tl.where(is_new_W[:, None], second_H[None, :], b_WH).to(tl.float32)
        place_WH = (W - distance_W)[:, None] * ROTARY + h_H[None, :]
        cos_WH = tl.load(cos_ptr + place_WH, in_W[:, None] & in_H[None, :], 0.0)
        sin_WH = tl.load(sin_ptr + place_WH, in_W[:, None] & in_H[None, :], 0.0)
        turned_a_WH, turned_b_WH = a_WH * cos_WH - b_WH * sin_WH, b_WH * cos_WH + a_WH * sin_WH
        cos_H, sin_H = tl.load(cos_ptr + W * ROTARY + h_H, in_H, 0.0), tl.load(sin_ptr + W * ROTARY + h_H, in_H, 0.0)
    if ROTARY < K:
        new_rest_C = tl.load(new_k_ptr + rest_C, in_rest, 0.0)
        rest_WC = tl.load(ring_k_W1 + rest_C[None, :], old_W1 & in_rest[None, :], 0.0)
        rest_WC = tl.where(is_new_W[:, None], new_rest_C[None, :], rest_WC).to(tl.float32)

    k_C = tl.load(new_k_ptr + c_C, in_C, 0.0)
    if block == 0:
        tl.store(ring_k_ptr + (head * W + slot) * K + c_C, k_C, in_C)
    if GATE != _NO_RECURRENCE:
        p_C = tl.load(gate_ptr + row * gate_row + group * K + c_C, in_C, 0.0).to(tl.float32)
        if SCALAR:
            p_C = tl.sum(p_C, 0) / K + p_C * 0.0
        g_C = _log_decay(p_C, group.to(tl.float32), normalizer, lower_bound, GATE)
        alpha_C = tl.exp(g_C)
        write_C = 1.0 - alpha_C if KEY_FROM_GATE else _phi(k_C.to(tl.float32), in_C, SOFTMAX)
        write_C = tl.where(in_C, write_C, 0.0)
        state_CV = state_ptr + head * K * V + c_C[:, None] * V + c_V[None, :]
        inside_CV = in_C[:, None] & in_V[None, :]
        s_CV = tl.load(state_CV, inside_CV, 0.0).to(tl.float32)
        s_CV = s_CV * alpha_C[:, None] + write_C[:, None] * v_V.to(tl.float32)[None, :]
        tl.store(state_CV, s_CV.to(state_ptr.dtype.element_ty), inside_CV)

    for r in tl.static_range(R):
        query_ptr = q_ptr + row * q_row + (group * R + r) * K
        scores_W = tl.zeros([BW], tl.float32)
        if ROTARY > 0:
            qa_H = tl.load(query_ptr + h_H, in_H, 0.0).to(tl.float32)
            qb_H = tl.load(query_ptr + half + h_H, in_H, 0.0).to(tl.float32)
            turned_H, other_H = qa_H * cos_H - qb_H * sin_H, qb_H * cos_H + qa_H * sin_H
            scores_W += tl.sum(turned_a_WH * turned_H[None, :] + turned_b_WH * other_H[None, :], 1)
        if ROTARY < K:
            scores_W += tl.sum(rest_WC * tl.load(query_ptr + rest_C, in_rest, 0.0).to(tl.float32)[None, :], 1)
        scores_W = tl.where(seen_W, scores_W * scale, float("-inf"))
        e_W = tl.exp(scores_W - tl.max(scores_W, 0))
        out_V = window_weight * (tl.sum(e_W[:, None] * values_WV, 0) / tl.sum(e_W, 0))
        if GATE != _NO_RECURRENCE:
            q_C = _phi(tl.load(query_ptr + c_C, in_C, 0.0).to(tl.float32), in_C, SOFTMAX)
            out_V += recurrent_weight * tl.sum(q_C[:, None] * s_CV, 0)
        tl.store(out_ptr + (head * R + r) * V + c_V, out_V.to(out_ptr.dtype.element_ty), in_V)


@triton_op("liger::attention_step", mutates_args={"recurrent_BGKV", "ring_k_BGWK", "ring_v_BGWV"})
def attention_step(
    q_BGRK: Tensor,
    k_BGK: Tensor,
    v_BGV: Tensor,
    gate_key_BGK: Tensor,
    length_B: Tensor,
    recurrent_BGKV: Tensor,
    ring_k_BGWK: Tensor,
    ring_v_BGWV: Tensor,
    cos_SK: Tensor,
    sin_SK: Tensor,
    structure: str,
    softmax_map: bool,
    normalizer: float,
    lower_bound: float,
    recurrent_weight: float,
    window_weight: float,
    scale: float,
) -> Tensor:
    """One token of one layer, [B,G,R,V] in q's dtype; `recurrent` (float32 or narrower) and the ring change in place.

    q, k, v and gate_key may be slices of wider rows. S >= W + 1. A structure without a recurrence takes any tensor.
    """
    (batch, groups, queries, dim), slots = q_BGRK.shape, ring_k_BGWK.shape[2]
    row, width, rotary = STRUCTURES[structure], v_BGV.shape[2], cos_SK.shape[1]
    q_BGRK, k_BGK, v_BGV, gate_key_BGK = (
        x if x[0].is_contiguous() else x.contiguous() for x in (q_BGRK, k_BGK, v_BGV, gate_key_BGK)
    )
    out_BGRV = torch.empty((batch, groups, queries, width), dtype=q_BGRK.dtype, device=q_BGRK.device)
    block_v = _value_block(batch * groups, width)
    launcher(_attention_step)[(batch * groups, triton.cdiv(width, block_v))](
        q_BGRK, k_BGK, v_BGV, gate_key_BGK, length_B, recurrent_BGKV, ring_k_BGWK, ring_v_BGWV, cos_SK, sin_SK,
        out_BGRV,
        q_BGRK.stride(0), k_BGK.stride(0), v_BGV.stride(0), gate_key_BGK.stride(0),
        normalizer, lower_bound, recurrent_weight, window_weight, scale,
        groups, R=queries, K=dim, V=width, W=slots, ROTARY=rotary,
        GATE=_GATES[structure], SCALAR=row.width == "scalar", SOFTMAX=softmax_map, KEY_FROM_GATE=row.key_from_gate,
        BK=triton.next_power_of_2(dim), BV=block_v, BW=triton.next_power_of_2(slots),
        BH=triton.next_power_of_2(max(rotary // 2, 1)), BREST=triton.next_power_of_2(max(dim - rotary, 1)),
        num_warps=8 if block_v >= 128 else 4,
    )  # fmt: skip
    return out_BGRV


def _value_block(heads: int, width: int) -> int:
    """All of a head's values in one program where heads alone fill a GPU, else a part."""
    block = triton.next_power_of_2(width)
    while block > 16 and heads * triton.cdiv(width, block) < 128:
        block //= 2
    return int(block)


def supports(config: LigerConfig, head_dim: int) -> bool:
    """Whether the kernel carries a layer: one recurrence with a gate of its own, or none; no sinks; a short window."""
    largest = triton.next_power_of_2(config.window) * triton.next_power_of_2(head_dim)
    return config.structure in _GATES and not config.sinks and largest <= _LARGEST


def step_on_ring(
    mixer: Mixer,
    heads: Heads,
    rope: Rope,
    layer: LayerState,
    length: Tensor,
    valid: Tensor | None = None,
    lolcats: Lolcats | None = None,
) -> tuple[Tensor, LayerState]:
    """`Mixer.after_state` for one token, over a state whose window is a ring; the state's tensors change in place."""
    config = mixer.liger
    q, k, v, gate_key = (x[:, 0] for x in heads)
    recurrent = layer.recurrent[0] if layer.recurrent else length
    out_BGRV = attention_step(
        q, k, v, gate_key, length, recurrent, layer.window_k, layer.window_v, *rope, config.structure,
        config.feature_map == "softmax", config.gate_normalizer, config.lower_bound,
        config.recurrent_weight, config.window_weight, mixer.scaling,
    )  # fmt: skip
    return out_BGRV[:, None], layer


def tokens_on_ring(
    mixer: Mixer,
    heads: Heads,
    rope: Rope,
    layer: LayerState,
    length: Tensor,
    valid: Tensor | None = None,
    lolcats: Lolcats | None = None,
) -> tuple[Tensor, LayerState]:
    """`Mixer.after_state` over a state whose window is a ring."""
    assert valid is not None
    straight = LayerState(layer.recurrent, *(window.from_ring(x, length) for x in (layer.window_k, layer.window_v)))
    out, new = mixer.after_state(heads, rope, straight, length, valid, lolcats)
    return out, LayerState(new.recurrent, *(window.to_ring(x, length + valid) for x in (new.window_k, new.window_v)))
