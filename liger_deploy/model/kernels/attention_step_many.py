"""`liger::attention_step` for many heads: one warp, or two, take a KV head of one row, or BV of its values, end to end.

A warp alone waits for no other: what it sums stays in its registers, and while it computes, other warps' loads are
under way; two serve where heads are too few to fill a GPU. The window is read in blocks of keys with a running softmax,
the state in blocks of whole rows, `stages` of them under way. What a channel is multiplied with (its gate, its key and
the queries) is computed once for the head and put in memory, where the loop over the state finds it: the loop is then
loads, products and stores.

Shape legend as in `attention_step.py`; J keys of the window at once, C channels (rows of the state) at once.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from liger_deploy.model.kernels import predecessor_done, start_followers
from liger_deploy.model.kernels.attention_parts import (
    _NO_RECURRENCE,
    _dot,
    _floats,
    _gate_and_key,
    _load,
    _phi,
    _save,
    _turned,
    _turned_alike,
)


class Many(NamedTuple):
    """What one program takes: so many values of a head and channels at once, with so many warps; `stages` blocks of the
    state are under way at once, or as many as the registers hold (1)."""

    values: int
    channels: int
    warps: int
    stages: int


@triton.jit
def _attention_step_many(
    q_ptr, k_ptr, v_ptr, gate_ptr, length_ptr, state_ptr, ring_k_ptr, ring_v_ptr, cos_ptr, sin_ptr, out_ptr,
    channels_ptr, q_row, k_row, v_row, gate_row,
    normalizer, lower_bound, recurrent_weight, window_weight, scale,
    G, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, ROTARY: tl.constexpr,
    GATE: tl.constexpr, SCALAR: tl.constexpr, SOFTMAX: tl.constexpr, KEY_FROM_GATE: tl.constexpr,
    BR: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr, BREST: tl.constexpr,
    BC: tl.constexpr, BJ: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    row, group = head // G, head % G
    kind: tl.constexpr = q_ptr.dtype.element_ty
    VALUES: tl.constexpr = V % BV == 0
    WHOLE: tl.constexpr = VALUES and K == BK
    r_R, r_Q, k_K, j_J = tl.arange(0, BR), tl.arange(0, BQ), tl.arange(0, BK), tl.arange(0, BJ)
    in_R, in_Q, in_K = r_R < R, r_Q < R, k_K < K
    h_H, rest_C = tl.arange(0, BH), ROTARY + tl.arange(0, BREST)
    c_V = tl.program_id(1) * BV + tl.arange(0, BV)
    in_V = c_V < V
    normalizer, lower_bound, recurrent_weight, window_weight, scale = _floats(
        normalizer, lower_bound, recurrent_weight, window_weight, scale
    )
    if OVERLAP:
        head += start_followers()
    length = tl.load(length_ptr + row)
    slot = (length % W).to(tl.int32)
    if OVERLAP:
        done = predecessor_done()
        q_ptr, k_ptr, v_ptr, gate_ptr = q_ptr + done, k_ptr + done, v_ptr + done, gate_ptr + done
    query_1 = q_ptr + row * q_row + group * R * K
    query_R1 = query_1 + tl.minimum(r_R, R - 1)[:, None] * K
    new_k_ptr, new_v_ptr = k_ptr + row * k_row + group * K, v_ptr + row * v_row + group * V
    key_K = tl.load(new_k_ptr + k_K, in_K, 0.0)
    q_RK = tl.load(query_R1 + k_K[None, :], in_K[None, :], 0.0).to(tl.float32)
    v_V = _load(new_v_ptr + c_V, in_V, VALUES)

    # Of each channel: its gate, what is written, the queries. [2+R,K], read again below.
    if GATE != _NO_RECURRENCE:
        channels_ptr += (head * tl.num_programs(1) + tl.program_id(1)) * (2 + R) * BK
        p_K = tl.load(gate_ptr + row * gate_row + group * K + k_K, in_K, 0.0).to(tl.float32)
        alpha_K, write_K = _gate_and_key(
            p_K, key_K.to(tl.float32), in_K, group.to(tl.float32), normalizer, lower_bound, K, GATE, SCALAR, SOFTMAX,
            KEY_FROM_GATE,
        )  # fmt: skip
        phi_RK = _phi(q_RK, in_K[None, :], SOFTMAX) * recurrent_weight
        tl.store(channels_ptr + k_K, alpha_K)
        tl.store(channels_ptr + BK + k_K, write_K)
        tl.store(channels_ptr + (2 + r_R)[:, None] * BK + k_K[None, :], phi_RK, in_R[:, None])
        tl.debug_barrier()  # what other threads stored is seen

    # The window: the new token, whose key is turned as the queries are, begins the softmax; then the keys before it.
    factor_K = _turned_alike(cos_ptr + W * ROTARY, sin_ptr + W * ROTARY, k_K, ROTARY)
    if ROTARY > 0:
        qa_RH, qb_RH = _turned(query_R1, cos_ptr + W * ROTARY, sin_ptr + W * ROTARY, h_H, ROTARY, BH)
    if ROTARY < K:
        q_rest_RC = _load(query_R1 + rest_C[None, :], (rest_C < K)[None, :], K - ROTARY == BREST)
    max_R = tl.sum(q_RK * (key_K.to(tl.float32) * factor_K)[None, :], 1) * scale
    sum_R = tl.full([BR], 1.0, tl.float32)
    near_VR = v_V.to(tl.float32)[:, None] + tl.zeros([BV, BR], tl.float32)
    for j in tl.range(0, W, BJ, num_stages=2):
        slot_J = j + j_J
        at_J = slot_J % W  # within the ring, and so the tables, where the block is longer
        distance_J = (slot - at_J + W) % W
        seen_J = (slot_J < W) & (slot_J != slot) & (distance_J <= length)
        ring_k_J1, place_J1 = ring_k_ptr + (head * W + at_J)[:, None] * K, (W - distance_J)[:, None] * ROTARY
        scores_JR = tl.zeros([BJ, BR], tl.float32)
        if ROTARY > 0:
            a_JH, b_JH = _turned(ring_k_J1, cos_ptr + place_J1, sin_ptr + place_J1, h_H, ROTARY, BH)
            scores_JR += _dot(a_JH, tl.trans(qa_RH), kind)
            scores_JR += _dot(b_JH, tl.trans(qb_RH), kind)
        if ROTARY < K:
            rest_JC = _load(ring_k_J1 + rest_C[None, :], (rest_C < K)[None, :], K - ROTARY == BREST)
            scores_JR += _dot(rest_JC, tl.trans(q_rest_RC), kind)
        ring_v_JV = ring_v_ptr + (head * W + at_J)[:, None] * V + c_V[None, :]
        old_JV = tl.load(ring_v_JV, seen_J[:, None] & in_V[None, :], 0.0)
        scores_JR = tl.where(seen_J[:, None], scores_JR * scale, float("-inf"))
        larger_R = tl.maximum(max_R, tl.max(scores_JR, 0))
        weights_JR, faded_R = tl.exp(scores_JR - larger_R[None, :]), tl.exp(max_R - larger_R)
        sum_R = sum_R * faded_R + tl.sum(weights_JR, 0)
        near_VR = near_VR * faded_R[None, :] + _dot(tl.trans(old_JV), weights_JR, kind)
        max_R = larger_R
    near_VR = near_VR * tl.where(in_R, window_weight / sum_R, 0.0)[None, :]
    out_QV = tl.trans(tl.sum(tl.reshape(near_VR, [BV, BR // BQ, BQ]), 1))  # columns beyond R are zero
    if tl.program_id(1) == 0:
        tl.store(ring_k_ptr + (head * W + slot) * K + k_K, key_K, in_K)
    tl.store(ring_v_ptr + (head * W + slot) * V + c_V, v_V, in_V)

    if GATE != _NO_RECURRENCE:
        v_V = v_V.to(tl.float32)
        far = ()
        for _r in tl.static_range(R):
            far = far + (tl.zeros([BV], tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
        # A lane loads four values, of 16 bits too: a warp then has a whole row of 128, and sums none from lane to lane.
        c_V = tl.max_contiguous(c_V, 4)
        for c in tl.range(0, BK, BC, num_stages=STAGES):
            c_C = c + tl.arange(0, BC)
            state_CV = state_ptr + (head * K + c_C[:, None]) * V + c_V[None, :]
            in_CV = (c_C < K)[:, None] & in_V[None, :]
            alpha_C, write_C = tl.load(channels_ptr + c_C), tl.load(channels_ptr + BK + c_C)
            s_CV = _load(state_CV, in_CV, WHOLE).to(tl.float32)
            s_CV = s_CV * alpha_C[:, None] + write_C[:, None] * v_V[None, :]
            _save(state_CV, s_CV, in_CV, WHOLE)
            sums = ()
            for r in tl.static_range(R):
                q_C = tl.load(channels_ptr + (2 + r) * BK + c_C)
                sums = sums + (far[r] + tl.sum(q_C[:, None] * s_CV, 0),)  # type: ignore[assignment]  # noqa: RUF005
            far = sums
        for r in tl.static_range(R):
            out_QV += tl.where(r_Q[:, None] == r, far[r][None, :], 0.0)
    tl.store(out_ptr + (head * R + r_Q[:, None]) * V + c_V[None, :], out_QV.to(kind), in_Q[:, None] & in_V[None, :])
