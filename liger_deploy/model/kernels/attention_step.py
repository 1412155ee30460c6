"""`liger::attention_step`: all that a layer does between its projections and o_proj for one token, in one kernel.

    state = exp(g) state + phi(k) v        far = phi(q) state           (arXiv 2503.01496, Eq. 7)
    near = softmax attention over the last W keys, turned by their distance to the token
    out = recurrent_weight * far + window_weight * near                 (Eq. 9)

State and window are updated in place. The window is a ring: token t lies in slot t mod W, and the key at distance d
(0: the token itself) is read as if it stood at position W - d and the query at W, as in `window.py`.

Shape legend: B rows, G KV heads, R query heads per KV head, K key dim, V value dim, W window, S RoPE table rows.
One program takes one KV head of one row, and BV of its values. This is the form for few heads, whose time is the
latency of one program: all is loaded at once, and what the projections do not change while they still run. For many
heads, whose time is the memory's: `attention_step_many.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from liger_deploy.config import LigerConfig
from liger_deploy.gates import STRUCTURES
from liger_deploy.model.kernels import launcher, overlaps, predecessor_done, start_followers
from liger_deploy.model.kernels.attention_parts import (
    _GATES,
    _NO_RECURRENCE,
    _block,
    _dot,
    _floats,
    _gate_and_key,
    _load,
    _phi,
    _save,
    _turned,
    _turned_alike,
)
from liger_deploy.model.kernels.attention_step_many import Many, _attention_step_many
from liger_deploy.model.lolcats import Lolcats
from liger_deploy.model.mixer import Heads, LayerState, Mixer
from liger_deploy.model.window import Rope

_LARGEST = 16384  # elements of a tile of state or window that one program holds


@triton.jit
def _attention_step(
    q_ptr, k_ptr, v_ptr, gate_ptr, length_ptr, state_ptr, ring_k_ptr, ring_v_ptr, cos_ptr, sin_ptr, out_ptr,
    q_row, k_row, v_row, gate_row,
    normalizer, lower_bound, recurrent_weight, window_weight, scale,
    G, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, ROTARY: tl.constexpr,
    GATE: tl.constexpr, SCALAR: tl.constexpr, SOFTMAX: tl.constexpr, KEY_FROM_GATE: tl.constexpr,
    BR: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BW: tl.constexpr, BH: tl.constexpr,
    BREST: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    row, group = head // G, head % G
    kind: tl.constexpr = q_ptr.dtype.element_ty
    WHOLE: tl.constexpr = K == BK and V % BV == 0
    r_R, r_Q, c_C, j_W = tl.arange(0, BR), tl.arange(0, BQ), tl.arange(0, BK), tl.arange(0, BW)
    in_R, in_Q, in_C = r_R < R, r_Q < R, c_C < K
    h_H, rest_C = tl.arange(0, BH), ROTARY + tl.arange(0, BREST)
    c_V = tl.program_id(1) * BV + tl.arange(0, BV)
    in_V = c_V < V
    in_CV = in_C[:, None] & in_V[None, :]
    normalizer, lower_bound, recurrent_weight, window_weight, scale = _floats(
        normalizer, lower_bound, recurrent_weight, window_weight, scale
    )
    if OVERLAP:
        head += start_followers()

    # What the projections ahead do not change: loaded, and turned, while they still run. Keys of slots that hold
    # nothing yet, or are about to be written, are read too: their scores are not used.
    length = tl.load(length_ptr + row)
    slot = (length % W).to(tl.int32)
    at_W = j_W % W  # within the ring, and so the tables, where the tile is longer
    distance_W = (slot - at_W + W) % W
    is_new_W, seen_W = j_W == slot, (j_W < W) & (distance_W <= length)
    ring_k_W1 = ring_k_ptr + (head * W + at_W)[:, None] * K
    place_W1 = (W - distance_W)[:, None] * ROTARY
    if ROTARY > 0:
        key_a_WH, key_b_WH = _turned(ring_k_W1, cos_ptr + place_W1, sin_ptr + place_W1, h_H, ROTARY, BH)
    factor_C = _turned_alike(cos_ptr + W * ROTARY, sin_ptr + W * ROTARY, c_C, ROTARY)
    if ROTARY < K:
        rest_WC = _load(ring_k_W1 + rest_C[None, :], (rest_C < K)[None, :], K - ROTARY == BREST)
    ring_v_WV = ring_v_ptr + (head * W + at_W)[:, None] * V + c_V[None, :]
    state_CV = state_ptr + head * K * V + c_C[:, None] * V + c_V[None, :]
    old_WV = tl.load(ring_v_WV, seen_W[:, None] & in_V[None, :], 0.0)
    if GATE != _NO_RECURRENCE:
        s_CV = _load(state_CV, in_CV, WHOLE).to(tl.float32)
    if OVERLAP:
        done = predecessor_done()
        q_ptr, k_ptr, v_ptr, gate_ptr = q_ptr + done, k_ptr + done, v_ptr + done, gate_ptr + done

    # All that the projections wrote, asked for at once: each wait for memory is a microsecond.
    query_1 = q_ptr + row * q_row + group * R * K
    query_R1, query_Q1 = query_1 + tl.minimum(r_R, R - 1)[:, None] * K, query_1 + r_Q[:, None] * K
    new_k_ptr, new_v_ptr = k_ptr + row * k_row + group * K, v_ptr + row * v_row + group * V
    k_C = tl.load(new_k_ptr + c_C, in_C, 0.0)
    q_QC = tl.load(query_Q1 + c_C[None, :], in_Q[:, None] & in_C[None, :], 0.0).to(tl.float32)
    if GATE != _NO_RECURRENCE:
        p_C = tl.load(gate_ptr + row * gate_row + group * K + c_C, in_C, 0.0).to(tl.float32)
    v_V = tl.load(new_v_ptr + c_V, in_V, 0.0)

    # The window's weights: softmax over keys turned by distance. The new key and the queries are turned alike.
    scores_WR = tl.zeros([BW, BR], tl.float32)
    if ROTARY > 0:
        qa_RH, qb_RH = _turned(query_R1, cos_ptr + W * ROTARY, sin_ptr + W * ROTARY, h_H, ROTARY, BH)
        scores_WR += _dot(key_a_WH, tl.trans(qa_RH), kind)
        scores_WR += _dot(key_b_WH, tl.trans(qb_RH), kind)
    if ROTARY < K:
        q_rest_RC = _load(query_R1 + rest_C[None, :], (rest_C < K)[None, :], K - ROTARY == BREST)
        scores_WR += _dot(rest_WC, tl.trans(q_rest_RC), kind)
    new_Q = tl.sum(q_QC * (k_C.to(tl.float32) * factor_C)[None, :], 1)
    new_R = tl.sum(tl.where((r_R % BQ)[None, :] == r_Q[:, None], new_Q[:, None], 0.0), 0)
    scores_WR = tl.where(is_new_W[:, None], new_R[None, :], scores_WR) * scale
    scores_WR = tl.where(seen_W[:, None], scores_WR, float("-inf"))
    weights_WR = tl.exp(scores_WR - tl.max(scores_WR, 0)[None, :])
    weights_WR = weights_WR * tl.where(in_R, window_weight / tl.sum(weights_WR, 0), 0.0)[None, :]

    tl.store(ring_v_ptr + (head * W + slot) * V + c_V, v_V, in_V)
    if tl.program_id(1) == 0:
        tl.store(ring_k_ptr + (head * W + slot) * K + c_C, k_C, in_C)
    near_VR = _dot(tl.trans(tl.where(is_new_W[:, None], v_V[None, :], old_WV)), weights_WR, kind)
    out_QV = tl.trans(tl.sum(tl.reshape(near_VR, [BV, BR // BQ, BQ]), 1))  # columns beyond R are zero

    if GATE != _NO_RECURRENCE:
        alpha_C, write_C = _gate_and_key(
            p_C, k_C.to(tl.float32), in_C, group.to(tl.float32), normalizer, lower_bound, K, GATE, SCALAR, SOFTMAX,
            KEY_FROM_GATE,
        )  # fmt: skip
        s_CV = s_CV * alpha_C[:, None] + write_C[:, None] * v_V.to(tl.float32)[None, :]
        _save(state_CV, s_CV, in_CV, WHOLE)
        q_QC = _phi(q_QC, in_C[None, :], SOFTMAX) * recurrent_weight
        out_QV += tl.sum(q_QC[:, :, None] * s_CV[None, :, :], 1)
    tl.store(out_ptr + (head * R + r_Q[:, None]) * V + c_V[None, :], out_QV.to(kind), in_Q[:, None] & in_V[None, :])


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
    tensors = (q_BGRK, k_BGK, v_BGV, gate_key_BGK, length_B, recurrent_BGKV, ring_k_BGWK, ring_v_BGWV, cos_SK, sin_SK)
    strides = (q_BGRK.stride(0), k_BGK.stride(0), v_BGV.stride(0), gate_key_BGK.stride(0))
    numbers = (normalizer, lower_bound, recurrent_weight, window_weight, scale)
    sizes = {
        "R": queries, "K": dim, "V": width, "W": slots, "ROTARY": rotary,
        "GATE": _GATES[structure], "SCALAR": row.width == "scalar", "SOFTMAX": softmax_map,
        "KEY_FROM_GATE": row.key_from_gate, "BQ": triton.next_power_of_2(queries), "BK": _block(dim),
        "BH": _block(rotary // 2), "BREST": _block(dim - rotary), "OVERLAP": overlaps(),
    }  # fmt: skip
    tile = tiling(batch * groups, width)
    if isinstance(tile, Many):
        values = min(tile.values, _block(width))
        cuts = triton.cdiv(width, values)
        channels = out_BGRV.new_empty((batch * groups * cuts, 2 + queries, _block(dim)), dtype=torch.float32)
        launcher(_attention_step_many, q_BGRK)[(batch * groups, cuts)](
            *tensors, out_BGRV, channels, *strides, *numbers, groups, **sizes,
            BR=max(8, triton.next_power_of_2(queries)), BV=values, BC=min(tile.channels, _block(dim)), BJ=16,
            STAGES=tile.stages, num_warps=tile.warps, num_stages=1,
        )  # fmt: skip
    else:
        launcher(_attention_step, q_BGRK)[(batch * groups, triton.cdiv(width, tile))](
            *tensors, out_BGRV, *strides, *numbers, groups, **sizes, BR=_block(queries), BV=tile, BW=_block(slots),
            num_warps=4, num_stages=1,
        )  # fmt: skip
    return out_BGRV


def tiling(heads: int, width: int) -> int | Many:
    """How so many heads are cut: what a program takes of many, or the values of a head that it takes of few.

    Measured at an 8B model's layer: `benchmarks/gpu_cuts.py`. 512 heads of two warps are what an H100 holds at once.
    """
    if not isinstance(heads, int) or heads > 512:  # a symbol in a graph for any number of rows
        return Many(128, 32, 1, 2)
    if heads >= 128:
        return Many(128, 64, 2, 1)
    values = _block(width)
    while values > 16 and heads * triton.cdiv(width, values) < 128:
        values //= 2
    return values


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
