"""`liger::attention_sequence`: `Mixer.sequence` for training, whole sequences forward and backward, in Triton.

With b_i the sum of log-decays from the chunk's start to token i (inclusive), S0 the state before the chunk,

    o_i  = q_i e^{b_i} S0 + sum over j <= i of (q_i . k_j e^{b_i - b_j}) v_j    (arXiv 2503.01496, Eq. 7, unrolled)

and with D the gradient of the state after the chunk, do that of the outputs and e_j the log-decay from j to the end,

    dq_i = e^{b_i} S0 do_i + sum over j <= i of e^{b_i - b_j} k_j (v_j . do_i)
    dk_j = e^{e_j} D v_j   + sum over i >= j of e^{b_i - b_j} q_i (v_j . do_i)
    dv_j = k_j e^{e_j} D   + sum over i >= j of (q_i . k_j e^{b_i - b_j}) do_i
    dg_t = sum over i >= t in the chunk of (q_i dq_i - k_i dk_i), and over the values of S1 * D

(S1: the state after the chunk). States go forward and their gradients backward, chunk by chunk. Nothing but the
inputs is kept for the backward pass. As in `attention_prefill`, exponents meet at the start of the later token's
sub-chunk, so that none is positive, and inside a sub-chunk two factors stand for the decay between two tokens while
float32 bears them; beyond, pairs are taken one by one.

Shape legend: B rows, T tokens, G KV heads, R query heads per KV head, K key dim, V value dim, W window, N chunks,
C tokens of a chunk, S tokens of a sub-chunk, X = R * S rows of queries, J keys of a block, L channels of the gate.
A program takes one KV head of one row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from liger_deploy.config import LigerConfig
from liger_deploy.model.kernels.attention_prefill import _sums
from liger_deploy.model.kernels.attention_step import _block, _dot, _phi

CHUNK, SUB, KEYS = 64, 16, 32  # C, S, J
SCAN, AHEAD = 128, 8  # elements of a state that a program scans, chunks that it asks for at once
WARPS, CHUNK_WARPS, STAGES = 4, 8, 1  # measured, like the rest: benchmarks/gpu.py sequence_tilings
# Largest sum of decays in a sub-chunk that two factors bear: bfloat16's range, and float32's last digits.
SAFE, SAFE_EXACT = tl.constexpr(60.0), tl.constexpr(8.0)


@triton.jit
def _bears(b_SC, KIND: tl.constexpr):
    if tl.bfloat16 == KIND:
        return tl.min(b_SC) > -SAFE
    else:
        return tl.min(b_SC) > -SAFE_EXACT


@triton.jit
def _partner(c_C, ROTARY: tl.constexpr):
    """The channel that RoPE turns a channel against."""
    half: tl.constexpr = ROTARY // 2
    return tl.where(c_C < half, c_C + half, tl.where(c_C < ROTARY, c_C - half, c_C))


@triton.jit
def _table(cos_ptr, sin_ptr, place_X, in_X, c_C, ROTARY: tl.constexpr):
    """cos, and sin with the sign of its channel, at each row's place: 1 and 0 beyond the rotary channels."""
    at_XC, in_XC = place_X[:, None] * ROTARY + c_C[None, :], in_X[:, None] & (c_C < ROTARY)[None, :]
    sin_XC = tl.load(sin_ptr + at_XC, in_XC, 0.0)
    return tl.load(cos_ptr + at_XC, in_XC, 1.0), tl.where((c_C < ROTARY // 2)[None, :], -sin_XC, sin_XC)


@triton.jit
def _turned(x_X1, cos_XC, sin_XC, in_XC, c_C, ROTARY: tl.constexpr):
    x_XC = tl.load(x_X1 + c_C[None, :], in_XC, 0.0).to(tl.float32)
    other_XC = tl.load(x_X1 + _partner(c_C, ROTARY)[None, :], in_XC, 0.0).to(tl.float32)
    return x_XC * cos_XC + other_XC * sin_XC


@triton.jit
def _turned_back(d_XC, cos_XC, sin_XC, c_C, ROTARY: tl.constexpr, KIND: tl.constexpr):
    """The gradient of `_turned`."""
    swap_CC = tl.where(_partner(c_C, ROTARY)[:, None] == c_C[None, :], 1.0, 0.0)
    return d_XC * cos_XC + _dot(d_XC * sin_XC, swap_CC, KIND)


@triton.jit
def _write(
    g_ptr, w_ptr, v_ptr, writes_ptr, total_ptr, prefix_ptr, suffix_ptr, G, N, T,
    K: tl.constexpr, V: tl.constexpr, L: tl.constexpr, C: tl.constexpr, S: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """What a chunk writes into the state, its decay, and its tokens' log-decays from and to their sub-chunk's ends."""
    n, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row, group = head // G, head % G
    kind: tl.constexpr = v_ptr.dtype.element_ty
    c_C, c_V, i_T = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, C)
    in_C, in_V, t_T = c_C < K, c_V < V, n * C + i_T
    in_TC, in_TV = (t_T < T)[:, None] & in_C[None, :], (t_T < T)[:, None] & in_V[None, :]
    at_T1 = (row * T + t_T[:, None]) * G + group
    g_TC = tl.load(g_ptr + at_T1 * L + (c_C % L)[None, :], in_TC, 0.0)
    w_TC = tl.load(w_ptr + at_T1 * K + c_C[None, :], in_TC, 0.0)
    v_TV = tl.load(v_ptr + at_T1 * V + c_V[None, :], in_TV, 0.0).to(tl.float32)
    # Sums of log-decays as products with 0 and 1: quicker than a scan, and no small sum is a difference of large ones.
    same_TT, after_TT = i_T[None, :] // S == i_T[:, None] // S, i_T[None, :] > i_T[:, None]
    prefix_TC = _sums(same_TT & ~after_TT, g_TC, kind)
    suffix_TC = _sums(same_TT & after_TT, g_TC, kind)
    to_end_TC = _sums(after_TT, g_TC, kind)
    at_TC = ((head * N + n) * C + i_T[:, None]) * K + c_C[None, :]
    tl.store(prefix_ptr + at_TC, prefix_TC, in_C[None, :])
    tl.store(suffix_ptr + at_TC, suffix_TC, in_C[None, :])
    tl.store(total_ptr + (head * N + n) * K + c_C, tl.sum(g_TC, 0), in_C)
    writes_CV = _dot(tl.trans(w_TC * tl.exp(to_end_TC)), v_TV, kind)
    at_CV = (head * N + n) * K * V + c_C[:, None] * V + c_V[None, :]
    tl.store(writes_ptr + at_CV, writes_CV, in_C[:, None] & in_V[None, :])


@triton.jit
def _scan(
    writes_ptr, total_ptr, held_ptr, N, K: tl.constexpr, V: tl.constexpr, E: tl.constexpr, A: tl.constexpr,
    BACKWARD: tl.constexpr,
):  # fmt: skip
    """The state before every chunk from what each writes; or, BACKWARD, its gradient after every chunk from what each
    reads. E elements of one head's state, A chunks asked for at once."""
    head = tl.program_id(0).to(tl.int64)
    e_E = tl.program_id(1) * E + tl.arange(0, E)
    in_E = e_E < K * V
    s_E = tl.zeros([E], tl.float32)
    for start in range(0, N, A):
        for i in tl.static_range(A):
            step = start + i
            n = head * N + (N - 1 - step if BACKWARD else step)
            there = in_E & (step < N)
            decay_E = tl.exp(tl.load(total_ptr + n * K + e_E // V, there, 0.0))
            writes_E = tl.load(writes_ptr + n * K * V + e_E, there, 0.0)
            tl.store(held_ptr + n * K * V + e_E, s_E.to(held_ptr.dtype.element_ty), there)
            s_E = s_E * decay_E + writes_E


@triton.jit
def _read(
    q_ptr, k_ptr, v_ptr, w_ptr, segment_ptr, before_ptr, prefix_ptr, suffix_ptr, cos_ptr, sin_ptr, out_ptr,
    recurrent_weight, window_weight, scale, G, N, T,
    R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, ROTARY: tl.constexpr, SOFTMAX: tl.constexpr,
    C: tl.constexpr, S: tl.constexpr, J: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Outputs of S tokens."""
    first, head = tl.program_id(0).to(tl.int64) * S, tl.program_id(1).to(tl.int64)
    row, group, chunk = head // G, head % G, first // C
    kind: tl.constexpr = q_ptr.dtype.element_ty
    c_C, c_V, i_S, x_X = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, S), tl.arange(0, BR * S)
    in_C, in_V, i_X, r_X = c_C < K, c_V < V, x_X % S, x_X // S
    in_X = (r_X < R) & (first + i_X < T)
    in_XC, in_XV, in_SV = in_X[:, None] & in_C, in_X[:, None] & in_V, (first + i_S < T)[:, None] & in_V
    at_X1 = ((row * T + first + i_X[:, None]) * G + group) * R + r_X[:, None]
    at_S1 = (row * T + first + i_S[:, None]) * G + group

    # The window: key number u of W + S stands at u, the query at W + i.
    cos_XC, sin_XC = _table(cos_ptr, sin_ptr, W + i_X, in_X, c_C, ROTARY)
    turned_XC = _turned(q_ptr + at_X1 * K, cos_XC, sin_XC, in_XC, c_C, ROTARY)
    segment_X = tl.load(segment_ptr + row * T + first + i_X, in_X, -1)
    near_XV, total_X = tl.zeros([BR * S, BV], tl.float32), tl.zeros([BR * S], tl.float32)
    top_X = tl.full([BR * S], -1e30, tl.float32)
    for start in range(0, W + S, J):
        u_J = start + tl.arange(0, J)
        token_J = first - W + u_J
        in_J = (token_J >= 0) & (token_J < T) & (u_J < W + S)
        at_J1 = (row * T + token_J[:, None]) * G + group
        cos_JC, sin_JC = _table(cos_ptr, sin_ptr, u_J, in_J, c_C, ROTARY)
        keys_JC = _turned(k_ptr + at_J1 * K, cos_JC, sin_JC, in_J[:, None] & in_C, c_C, ROTARY)
        segment_J = tl.load(segment_ptr + row * T + token_J, in_J, 0)
        seen_XJ = (u_J[None, :] > i_X[:, None]) & (u_J[None, :] <= W + i_X[:, None])
        seen_XJ = seen_XJ & (segment_X[:, None] == segment_J[None, :]) & (segment_J > 0)[None, :]
        scores_XJ = tl.where(seen_XJ, _dot(turned_XC, tl.trans(keys_JC), kind) * scale, float("-inf"))
        newer_X = tl.maximum(top_X, tl.max(scores_XJ, 1))
        weights_XJ, fade_X = tl.exp(scores_XJ - newer_X[:, None]), tl.exp(top_X - newer_X)
        v_JV = tl.load(v_ptr + at_J1 * V + c_V[None, :], in_J[:, None] & in_V, 0.0).to(tl.float32)
        near_XV = near_XV * fade_X[:, None] + _dot(weights_XJ, v_JV, kind)
        total_X = total_X * fade_X + tl.sum(weights_XJ, 1)
        top_X = newer_X
    out_XV = near_XV * (window_weight / tl.maximum(total_X, 1e-30))[:, None]

    at_SC = (head * N * C + first + i_S[:, None]) * K + c_C[None, :]
    in_SC = (first + i_S < T)[:, None] & in_C
    b_SC = tl.load(prefix_ptr + at_SC, in_C[None, :], 0.0)
    w_SC = tl.load(w_ptr + at_S1 * K + c_C[None, :], in_SC, 0.0)
    v_SV = tl.load(v_ptr + at_S1 * V + c_V[None, :], in_SV, 0.0).to(tl.float32)
    q_XC = tl.load(q_ptr + at_X1 * K + c_C[None, :], in_XC, 0.0).to(tl.float32)
    q_RSC = tl.reshape(_phi(q_XC, in_C, SOFTMAX) * recurrent_weight, [BR, S, BK])
    q_XC = tl.reshape(q_RSC * tl.exp(b_SC)[None, :, :], [BR * S, BK])

    # What its own tokens wrote.
    if _bears(b_SC, kind):
        scores_XS = tl.where(i_S[None, :] <= i_X[:, None], _dot(q_XC, tl.trans(w_SC * tl.exp(-b_SC)), kind), 0.0)
    else:
        scores_RSS = tl.zeros([BR, S, S], tl.float32)
        for j in range(S):
            w_C = tl.sum(tl.where((i_S == j)[:, None], w_SC, 0.0), 0)
            pair_SC = _decays_since(b_SC, i_S, j) * w_C[None, :]
            scores_RS = tl.sum(q_RSC * pair_SC[None, :, :], 2)
            scores_RSS += tl.where((i_S == j)[None, None, :], scores_RS[:, :, None], 0.0)
        scores_XS = tl.reshape(scores_RSS, [BR * S, S])
    out_XV += _dot(scores_XS, v_SV, kind)

    # What the chunk's earlier sub-chunks wrote, going back; `between`: the decays from there to these rows' start.
    between_C = tl.zeros([BK], tl.float32)
    for back in range(1, (first - chunk * C) // S + 1):
        w_SC, v_SV, between_C = _earlier(
            w_ptr + (at_S1 - back * S * G) * K + c_C[None, :], v_ptr + (at_S1 - back * S * G) * V + c_V[None, :],
            prefix_ptr + at_SC - back * S * K, suffix_ptr + at_SC - back * S * K, between_C, i_S, in_C, in_V, S,
        )  # fmt: skip
        out_XV += _dot(_dot(q_XC, tl.trans(w_SC), kind), v_SV, kind)

    # What the state held.
    before_CV = before_ptr + (head * N + chunk) * K * V + c_C[:, None] * V + c_V[None, :]
    s_CV = tl.load(before_CV, in_C[:, None] & in_V[None, :], 0.0).to(tl.float32)
    out_XV += _dot(q_XC * tl.exp(between_C)[None, :], s_CV, kind)
    tl.store(out_ptr + at_X1 * V + c_V[None, :], out_XV.to(kind), in_XV)


@triton.jit
def _decays_since(b_SC, i_S, j):
    """exp of the log-decays between token j of a sub-chunk and each later one; 0 at those before it."""
    b_C = tl.sum(tl.where((i_S == j)[:, None], b_SC, 0.0), 0)
    return tl.where((i_S >= j)[:, None], tl.exp(tl.minimum(b_SC - b_C[None, :], 0.0)), 0.0)


@triton.jit
def _earlier(w_SC, v_SV, prefix_SC, suffix_SC, between_C, i_S, in_C, in_V, S: tl.constexpr):
    """An earlier sub-chunk's keys, faded to where the reading one begins, its values, and the decays from its start."""
    keys_SC = tl.load(w_SC, in_C[None, :], 0.0)
    keys_SC *= tl.exp(tl.load(suffix_SC, in_C[None, :], 0.0) + between_C[None, :])
    last_SC = tl.load(prefix_SC, (i_S == S - 1)[:, None] & in_C[None, :], 0.0)
    return keys_SC, tl.load(v_SV, in_V[None, :], 0.0).to(tl.float32), between_C + tl.sum(last_SC, 0)


@triton.jit
def _collect(
    q_ptr, grad_ptr, prefix_ptr, reads_ptr, recurrent_weight, G, N, T,
    R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, SOFTMAX: tl.constexpr, C: tl.constexpr, S: tl.constexpr,
    BR: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The gradient of the state before a chunk, from the chunk's own outputs: sum over i of (q_i e^{b_i})^T do_i."""
    n, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row, group = head // G, head % G
    kind: tl.constexpr = q_ptr.dtype.element_ty
    c_C, c_V, i_S, x_X = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, S), tl.arange(0, BR * S)
    in_C, in_V, i_X, r_X = c_C < K, c_V < V, x_X % S, x_X // S
    reads_CV, between_C = tl.zeros([BK, BV], tl.float32), tl.zeros([BK], tl.float32)
    for sub in range(C // S):
        first = n * C + sub * S
        in_X = (r_X < R) & (first + i_X < T)
        at_X1 = ((row * T + first + i_X[:, None]) * G + group) * R + r_X[:, None]
        b_SC = tl.load(prefix_ptr + (head * N * C + first + i_S[:, None]) * K + c_C[None, :], in_C[None, :], 0.0)
        q_XC = tl.load(q_ptr + at_X1 * K + c_C[None, :], in_X[:, None] & in_C, 0.0).to(tl.float32)
        q_RSC = tl.reshape(_phi(q_XC, in_C, SOFTMAX) * recurrent_weight, [BR, S, BK])
        q_XC = tl.reshape(q_RSC * tl.exp(b_SC + between_C[None, :])[None, :, :], [BR * S, BK])
        do_XV = tl.load(grad_ptr + at_X1 * V + c_V[None, :], in_X[:, None] & in_V, 0.0).to(tl.float32)
        reads_CV += _dot(tl.trans(q_XC), do_XV, kind)
        between_C += tl.sum(tl.where((i_S == S - 1)[:, None], b_SC, 0.0), 0)
    at_CV = (head * N + n) * K * V + c_C[:, None] * V + c_V[None, :]
    tl.store(reads_ptr + at_CV, reads_CV, in_C[:, None] & in_V[None, :])


@triton.jit
def _window_block(
    turned_XC, do_XV, segment_X, k_ptr, v_ptr, segment_ptr, cos_ptr, sin_ptr, start, first, row, group,
    i_X, c_C, c_V, scale, G, T, KIND: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr,
    ROTARY: tl.constexpr, S: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """Scores of some queries on J keys of their window, -inf where not seen; the gradient of their weights; the keys,
    turned."""
    in_C, in_V = c_C < K, c_V < V
    u_J = start + tl.arange(0, J)
    token_J = first - W + u_J
    in_J = (token_J >= 0) & (token_J < T) & (u_J < W + S)
    at_J1 = (row * T + token_J[:, None]) * G + group
    cos_JC, sin_JC = _table(cos_ptr, sin_ptr, u_J, in_J, c_C, ROTARY)
    keys_JC = _turned(k_ptr + at_J1 * K, cos_JC, sin_JC, in_J[:, None] & in_C, c_C, ROTARY)
    v_JV = tl.load(v_ptr + at_J1 * V + c_V[None, :], in_J[:, None] & in_V, 0.0).to(tl.float32)
    segment_J = tl.load(segment_ptr + row * T + token_J, in_J, 0)
    seen_XJ = (u_J[None, :] > i_X[:, None]) & (u_J[None, :] <= W + i_X[:, None])
    seen_XJ = seen_XJ & (segment_X[:, None] == segment_J[None, :]) & (segment_J > 0)[None, :]
    scores_XJ = tl.where(seen_XJ, _dot(turned_XC, tl.trans(keys_JC), KIND) * scale, float("-inf"))
    return scores_XJ, _dot(do_XV, tl.trans(v_JV), KIND), keys_JC


@triton.jit
def _window_queries(
    q_ptr, k_ptr, v_ptr, grad_ptr, segment_ptr, cos_ptr, sin_ptr, dq_ptr, level_ptr, delta_ptr,
    window_weight, scale, G, N, T,
    R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, ROTARY: tl.constexpr,
    S: tl.constexpr, J: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The window's dq of S tokens; each query's log-sum-exp (`level`) and sum of p dp (`delta`)."""
    first, head = tl.program_id(0).to(tl.int64) * S, tl.program_id(1).to(tl.int64)
    row, group = head // G, head % G
    kind: tl.constexpr = q_ptr.dtype.element_ty
    c_C, c_V, x_X = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BR * S)
    i_X, r_X = x_X % S, x_X // S
    in_X = (r_X < R) & (first + i_X < T)
    in_XC, in_XV = in_X[:, None] & (c_C < K), in_X[:, None] & (c_V < V)
    at_X1 = ((row * T + first + i_X[:, None]) * G + group) * R + r_X[:, None]
    do_XV = tl.load(grad_ptr + at_X1 * V + c_V[None, :], in_XV, 0.0).to(tl.float32)
    cos_XC, sin_XC = _table(cos_ptr, sin_ptr, W + i_X, in_X, c_C, ROTARY)
    turned_XC = _turned(q_ptr + at_X1 * K, cos_XC, sin_XC, in_XC, c_C, ROTARY)
    segment_X = tl.load(segment_ptr + row * T + first + i_X, in_X, -1)
    top_X, total_X = tl.full([BR * S], -1e30, tl.float32), tl.zeros([BR * S], tl.float32)
    delta_X = tl.zeros([BR * S], tl.float32)
    for start in range(0, W + S, J):
        scores_XJ, dp_XJ, keys_JC = _window_block(
            turned_XC, do_XV, segment_X, k_ptr, v_ptr, segment_ptr, cos_ptr, sin_ptr, start, first, row, group,
            i_X, c_C, c_V, scale, G, T, kind, K, V, W, ROTARY, S, J,
        )  # fmt: skip
        newer_X = tl.maximum(top_X, tl.max(scores_XJ, 1))
        weights_XJ, fade_X = tl.exp(scores_XJ - newer_X[:, None]), tl.exp(top_X - newer_X)
        total_X = total_X * fade_X + tl.sum(weights_XJ, 1)
        delta_X = delta_X * fade_X + tl.sum(weights_XJ * dp_XJ, 1)
        top_X = newer_X
    total_X = tl.maximum(total_X, 1e-30)
    level_X, delta_X = top_X + tl.log(total_X), delta_X / total_X
    at_X = tl.sum(at_X1, 1)
    tl.store(level_ptr + at_X, level_X, in_X)
    tl.store(delta_ptr + at_X, delta_X, in_X)
    d_XC = tl.zeros([BR * S, BK], tl.float32)
    for start in range(0, W + S, J):
        scores_XJ, dp_XJ, keys_JC = _window_block(
            turned_XC, do_XV, segment_X, k_ptr, v_ptr, segment_ptr, cos_ptr, sin_ptr, start, first, row, group,
            i_X, c_C, c_V, scale, G, T, kind, K, V, W, ROTARY, S, J,
        )  # fmt: skip
        weights_XJ = tl.exp(scores_XJ - level_X[:, None])
        d_XC += _dot(weights_XJ * (dp_XJ - delta_X[:, None]), keys_JC, kind)
    dq_XC = _turned_back(d_XC * (scale * window_weight), cos_XC, sin_XC, c_C, ROTARY, kind)
    tl.store(dq_ptr + at_X1 * K + c_C[None, :], dq_XC.to(kind), in_XC)


@triton.jit
def _queries(
    q_ptr, v_ptr, w_ptr, grad_ptr, before_ptr, prefix_ptr, suffix_ptr, dq_ptr, spent_ptr, recurrent_weight, G, N, T,
    R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, SOFTMAX: tl.constexpr,
    C: tl.constexpr, S: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The recurrence's dq of S tokens, added to the window's; sum over R of q dq (`spent`)."""
    first, head = tl.program_id(0).to(tl.int64) * S, tl.program_id(1).to(tl.int64)
    row, group, chunk = head // G, head % G, first // C
    kind: tl.constexpr = q_ptr.dtype.element_ty
    c_C, c_V, i_S, x_X = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, S), tl.arange(0, BR * S)
    in_C, in_V, i_X, r_X = c_C < K, c_V < V, x_X % S, x_X // S
    in_X = (r_X < R) & (first + i_X < T)
    in_XC, in_XV, in_SV = in_X[:, None] & in_C, in_X[:, None] & in_V, (first + i_S < T)[:, None] & in_V
    at_X1 = ((row * T + first + i_X[:, None]) * G + group) * R + r_X[:, None]
    at_S1 = (row * T + first + i_S[:, None]) * G + group
    at_SC = (head * N * C + first + i_S[:, None]) * K + c_C[None, :]
    do_XV = tl.load(grad_ptr + at_X1 * V + c_V[None, :], in_XV, 0.0).to(tl.float32)
    d_XC, between_C = tl.zeros([BR * S, BK], tl.float32), tl.zeros([BK], tl.float32)
    for back in range(1, (first - chunk * C) // S + 1):
        w_SC, v_SV, between_C = _earlier(
            w_ptr + (at_S1 - back * S * G) * K + c_C[None, :], v_ptr + (at_S1 - back * S * G) * V + c_V[None, :],
            prefix_ptr + at_SC - back * S * K, suffix_ptr + at_SC - back * S * K, between_C, i_S, in_C, in_V, S,
        )  # fmt: skip
        d_XC += _dot(_dot(do_XV, tl.trans(v_SV), kind), w_SC, kind)
    before_CV = before_ptr + (head * N + chunk) * K * V + c_C[:, None] * V + c_V[None, :]
    s_CV = tl.load(before_CV, in_C[:, None] & in_V[None, :], 0.0).to(tl.float32)
    d_XC += _dot(do_XV, tl.trans(s_CV), kind) * tl.exp(between_C)[None, :]

    b_SC = tl.load(prefix_ptr + at_SC, in_C[None, :], 0.0)
    w_SC = tl.load(w_ptr + at_S1 * K + c_C[None, :], (first + i_S < T)[:, None] & in_C, 0.0)
    v_SV = tl.load(v_ptr + at_S1 * V + c_V[None, :], in_SV, 0.0).to(tl.float32)
    weights_XS = tl.where(i_S[None, :] <= i_X[:, None], _dot(do_XV, tl.trans(v_SV), kind), 0.0)
    if _bears(b_SC, kind):
        d_XC += _dot(weights_XS, w_SC * tl.exp(-b_SC), kind)
        d_RSC = tl.reshape(d_XC, [BR, S, BK]) * tl.exp(b_SC)[None, :, :]
    else:
        d_RSC = tl.reshape(d_XC, [BR, S, BK]) * tl.exp(b_SC)[None, :, :]
        weights_RSS = tl.reshape(weights_XS, [BR, S, S])
        for j in range(S):
            w_C = tl.sum(tl.where((i_S == j)[:, None], w_SC, 0.0), 0)
            weights_RS = tl.sum(tl.where((i_S == j)[None, None, :], weights_RSS, 0.0), 2)
            d_RSC += weights_RS[:, :, None] * (_decays_since(b_SC, i_S, j) * w_C[None, :])[None, :, :]
    d_XC = tl.reshape(d_RSC, [BR * S, BK]) * recurrent_weight

    q_XC = _phi(tl.load(q_ptr + at_X1 * K + c_C[None, :], in_XC, 0.0).to(tl.float32), in_C, SOFTMAX)
    qd_XC = tl.where(in_X[:, None], q_XC * d_XC, 0.0)
    tl.store(spent_ptr + at_SC, tl.sum(tl.reshape(qd_XC, [BR, S, BK]), 0), in_C[None, :])
    if SOFTMAX:
        d_XC = qd_XC - q_XC * tl.sum(qd_XC, 1)[:, None]
    dq_XC = dq_ptr + at_X1 * K + c_C[None, :]
    tl.store(dq_XC, (tl.load(dq_XC, in_XC, 0.0).to(tl.float32) + d_XC).to(kind), in_XC)


@triton.jit
def _window_keys(
    q_ptr, k_ptr, v_ptr, grad_ptr, segment_ptr, cos_ptr, sin_ptr, level_ptr, delta_ptr, dk_ptr, dv_ptr,
    window_weight, scale, G, N, T,
    R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, ROTARY: tl.constexpr,
    S: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The window's dk and dv of S tokens: the key stands at j, the query at its distance from the first key."""
    first, head = tl.program_id(0).to(tl.int64) * S, tl.program_id(1).to(tl.int64)
    row, group = head // G, head % G
    kind: tl.constexpr = q_ptr.dtype.element_ty
    c_C, c_V, j_S, x_X = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, S), tl.arange(0, BR * S)
    in_C, in_V, i_X, r_X = c_C < K, c_V < V, x_X % S, x_X // S
    in_S = first + j_S < T
    in_SC, in_SV = in_S[:, None] & in_C, in_S[:, None] & in_V
    at_S1 = (row * T + first + j_S[:, None]) * G + group
    v_SV = tl.load(v_ptr + at_S1 * V + c_V[None, :], in_SV, 0.0).to(tl.float32)
    cos_SC, sin_SC = _table(cos_ptr, sin_ptr, j_S, in_S, c_C, ROTARY)
    keys_SC = _turned(k_ptr + at_S1 * K, cos_SC, sin_SC, in_SC, c_C, ROTARY)
    segment_S = tl.load(segment_ptr + row * T + first + j_S, in_S, 0)
    dk_SC, dv_SV = tl.zeros([S, BK], tl.float32), tl.zeros([S, BV], tl.float32)
    for ahead in range(0, W + S - 1, S):
        u_X = ahead + i_X
        in_X = (r_X < R) & (first + u_X < T) & (u_X < W + S)
        at_X1 = ((row * T + first + u_X[:, None]) * G + group) * R + r_X[:, None]
        cos_XC, sin_XC = _table(cos_ptr, sin_ptr, u_X, in_X, c_C, ROTARY)
        turned_XC = _turned(q_ptr + at_X1 * K, cos_XC, sin_XC, in_X[:, None] & in_C, c_C, ROTARY)
        do_XV = tl.load(grad_ptr + at_X1 * V + c_V[None, :], in_X[:, None] & in_V, 0.0).to(tl.float32)
        at_X = tl.sum(at_X1, 1)
        level_X, delta_X = tl.load(level_ptr + at_X, in_X, 0.0), tl.load(delta_ptr + at_X, in_X, 0.0)
        segment_X = tl.load(segment_ptr + row * T + first + u_X, in_X, -1)
        seen_XS = (j_S[None, :] <= u_X[:, None]) & (j_S[None, :] > u_X[:, None] - W)
        seen_XS = seen_XS & (segment_X[:, None] == segment_S[None, :]) & (segment_S > 0)[None, :]
        scores_XS = tl.where(seen_XS, _dot(turned_XC, tl.trans(keys_SC), kind) * scale, float("-inf"))
        weights_XS = tl.exp(scores_XS - level_X[:, None])
        dv_SV += _dot(tl.trans(weights_XS), do_XV, kind)
        d_XS = weights_XS * (_dot(do_XV, tl.trans(v_SV), kind) - delta_X[:, None])
        dk_SC += _dot(tl.trans(d_XS), turned_XC, kind)
    dk_SC = _turned_back(dk_SC * (scale * window_weight), cos_SC, sin_SC, c_C, ROTARY, kind)
    tl.store(dk_ptr + at_S1 * K + c_C[None, :], dk_SC.to(kind), in_SC)
    tl.store(dv_ptr + at_S1 * V + c_V[None, :], (dv_SV * window_weight).to(kind), in_SV)


@triton.jit
def _keys(
    q_ptr, v_ptr, w_ptr, grad_ptr, after_ptr, prefix_ptr, suffix_ptr, spent_ptr, dv_ptr, dw_ptr, recurrent_weight,
    G, N, T,
    R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, SOFTMAX: tl.constexpr,
    C: tl.constexpr, S: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The recurrence's dw and dv of S tokens, the latter added to the window's; w dw is taken from `spent`."""
    first, head = tl.program_id(0).to(tl.int64) * S, tl.program_id(1).to(tl.int64)
    row, group, chunk = head // G, head % G, first // C
    kind: tl.constexpr = q_ptr.dtype.element_ty
    c_C, c_V, j_S, x_X = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, S), tl.arange(0, BR * S)
    in_C, in_V, i_X, r_X = c_C < K, c_V < V, x_X % S, x_X // S
    in_S = first + j_S < T
    in_SC, in_SV = in_S[:, None] & in_C, in_S[:, None] & in_V
    at_S1 = (row * T + first + j_S[:, None]) * G + group
    v_SV = tl.load(v_ptr + at_S1 * V + c_V[None, :], in_SV, 0.0).to(tl.float32)

    # Reads by this sub-chunk's own queries.
    at_SC = (head * N * C + first + j_S[:, None]) * K + c_C[None, :]
    b_SC = tl.load(prefix_ptr + at_SC, in_C[None, :], 0.0)
    w_SC = tl.load(w_ptr + at_S1 * K + c_C[None, :], in_SC, 0.0)
    q_XC, do_XV = _queries_at(q_ptr, grad_ptr, first, row, group, i_X, r_X, c_C, c_V, recurrent_weight, G, T, R, K, V,
                              SOFTMAX)  # fmt: skip
    q_RSC = tl.reshape(q_XC, [BR, S, BK])
    past_XS = j_S[None, :] <= i_X[:, None]
    weights_XS = tl.where(past_XS, _dot(do_XV, tl.trans(v_SV), kind), 0.0)
    if _bears(b_SC, kind):
        q_XC = tl.reshape(q_RSC * tl.exp(b_SC)[None, :, :], [BR * S, BK])
        scores_XS = tl.where(past_XS, _dot(q_XC, tl.trans(w_SC * tl.exp(-b_SC)), kind), 0.0)
        dw_SC = _dot(tl.trans(weights_XS), q_XC, kind) * tl.exp(-b_SC)
    else:
        weights_RSS = tl.reshape(weights_XS, [BR, S, S])
        dw_SC, scores_RSS = tl.zeros([S, BK], tl.float32), tl.zeros([BR, S, S], tl.float32)
        for j in range(S):
            w_C = tl.sum(tl.where((j_S == j)[:, None], w_SC, 0.0), 0)
            pairs_RSC = q_RSC * _decays_since(b_SC, j_S, j)[None, :, :]
            scores_RS = tl.sum(pairs_RSC * w_C[None, None, :], 2)
            scores_RSS += tl.where((j_S == j)[None, None, :], scores_RS[:, :, None], 0.0)
            weights_RS = tl.sum(tl.where((j_S == j)[None, None, :], weights_RSS, 0.0), 2)
            d_C = tl.sum(tl.sum(pairs_RSC * weights_RS[:, :, None], 0), 0)
            dw_SC += tl.where((j_S == j)[:, None], d_C[None, :], 0.0)
        scores_XS = tl.reshape(scores_RSS, [BR * S, S])
    dv_SV = _dot(tl.trans(scores_XS), do_XV, kind)

    # By the chunk's later sub-chunks, going ahead; `fade`: the decays from each of these tokens to their start.
    fade_SC = tl.load(suffix_ptr + at_SC, in_C[None, :], 0.0)
    for ahead in range(1, (chunk * C + C - first) // S):
        start = first + ahead * S
        q_XC, do_XV = _queries_at(q_ptr, grad_ptr, start, row, group, i_X, r_X, c_C, c_V, recurrent_weight, G, T, R, K,
                                  V, SOFTMAX)  # fmt: skip
        b_SC = tl.load(prefix_ptr + at_SC + ahead * S * K, in_C[None, :], 0.0)
        q_XC = tl.reshape(tl.reshape(q_XC, [BR, S, BK]) * tl.exp(b_SC)[None, :, :], [BR * S, BK])
        decay_SC = tl.exp(fade_SC)
        dv_SV += _dot(tl.trans(_dot(q_XC, tl.trans(w_SC * decay_SC), kind)), do_XV, kind)
        dw_SC += _dot(tl.trans(_dot(do_XV, tl.trans(v_SV), kind)), q_XC, kind) * decay_SC
        fade_SC += tl.sum(tl.where((j_S == S - 1)[:, None], b_SC, 0.0), 0)[None, :]

    # By later chunks, through the state.
    after_CV = after_ptr + (head * N + chunk) * K * V + c_C[:, None] * V + c_V[None, :]
    d_CV = tl.load(after_CV, in_C[:, None] & in_V[None, :], 0.0).to(tl.float32)
    decay_SC = tl.exp(fade_SC)
    dv_SV += _dot(w_SC * decay_SC, d_CV, kind)
    dw_SC += _dot(v_SV, tl.trans(d_CV), kind) * decay_SC
    dv_SV += tl.load(dv_ptr + at_S1 * V + c_V[None, :], in_SV, 0.0).to(tl.float32)
    tl.store(dv_ptr + at_S1 * V + c_V[None, :], dv_SV.to(kind), in_SV)
    tl.store(dw_ptr + at_S1 * K + c_C[None, :], dw_SC, in_SC)
    spent_SC = tl.load(spent_ptr + at_SC, in_C[None, :], 0.0)
    tl.store(spent_ptr + at_SC, spent_SC - w_SC * dw_SC, in_C[None, :])


@triton.jit
def _queries_at(
    q_ptr, grad_ptr, first, row, group, i_X, r_X, c_C, c_V, recurrent_weight, G, T,
    R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, SOFTMAX: tl.constexpr,
):  # fmt: skip
    """S tokens' queries, through the feature map, and the gradient of their outputs."""
    in_X = (r_X < R) & (first + i_X < T)
    at_X1 = ((row * T + first + i_X[:, None]) * G + group) * R + r_X[:, None]
    q_XC = tl.load(q_ptr + at_X1 * K + c_C[None, :], in_X[:, None] & (c_C < K), 0.0).to(tl.float32)
    do_XV = tl.load(grad_ptr + at_X1 * V + c_V[None, :], in_X[:, None] & (c_V < V), 0.0).to(tl.float32)
    return _phi(q_XC, c_C < K, SOFTMAX) * recurrent_weight, do_XV


@triton.jit
def _gates(
    before_ptr, after_ptr, spent_ptr, dg_ptr, G, N, T,
    K: tl.constexpr, V: tl.constexpr, L: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """dg of a chunk; the channels of a scalar gate add up."""
    n, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row, group = head // G, head % G
    c_C, c_V, i_T = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, C)
    in_C, t_T = c_C < K, n * C + i_T
    at_TC = ((head * N + n) * C + i_T[:, None]) * K + c_C[None, :]
    spent_TC = tl.load(spent_ptr + at_TC, (t_T < T)[:, None] & in_C[None, :], 0.0)
    dg_TC = _sums(i_T[None, :] >= i_T[:, None], spent_TC, before_ptr.dtype.element_ty)
    at_CV = (head * N + n) * K * V + c_C[:, None] * V + c_V[None, :]
    in_CV = in_C[:, None] & (c_V < V)[None, :]
    d_CV = tl.load(after_ptr + at_CV, in_CV, 0.0).to(tl.float32)
    s_CV = tl.load(before_ptr + at_CV + K * V, in_CV & (n + 1 < N), 0.0).to(tl.float32)
    dg_TC += tl.sum(s_CV * d_CV, 1)[None, :]
    at_T = (row * T + t_T) * G + group
    if L == 1:
        tl.store(dg_ptr + at_T, tl.sum(tl.where(in_C[None, :], dg_TC, 0.0), 1), t_T < T)
    else:
        tl.store(dg_ptr + at_T[:, None] * L + c_C[None, :], dg_TC, (t_T < T)[:, None] & in_C[None, :])


class _Launch:
    """The grids and the tile sizes of one layer's kernels, and what its chunks write: shared by both passes."""

    def __init__(self, q_BTGRK: Tensor, v_BTGV: Tensor, write_BTGK: Tensor, g_BTGL: Tensor) -> None:
        batch, tokens, groups, queries, dim = q_BTGRK.shape
        width, heads = v_BTGV.shape[3], batch * groups
        self.chunks, self.device = triton.cdiv(tokens, CHUNK), q_BTGRK.device
        self.leading, self.kind = (batch, groups, self.chunks), q_BTGRK.dtype
        self.by_chunk, self.by_sub_chunk = (self.chunks, heads), (triton.cdiv(tokens, SUB), heads)
        elements = min(SCAN, int(triton.next_power_of_2(dim * width)))
        self.by_element = (heads, triton.cdiv(dim * width, elements))
        self.counts = (groups, self.chunks, tokens)
        self.tile: dict[str, Any] = {"K": dim, "V": width, "C": CHUNK, "BK": _block(dim), "BV": _block(width)}
        self.rows: dict[str, Any] = {"R": queries, "S": SUB, "BR": triton.next_power_of_2(queries)}
        self.scan: dict[str, Any] = {"K": dim, "V": width, "E": elements, "A": AHEAD, "num_warps": 4}
        self.options: dict[str, Any] = {"num_warps": WARPS, "num_stages": STAGES, **self.tile, **self.rows}
        self.prefix, self.suffix = self.scratch(CHUNK, dim), self.scratch(CHUNK, dim)
        self.total, writes = self.scratch(dim), self.scratch(dim, width)
        self.before = self.scratch(dim, width, dtype=self.kind)
        _write[self.by_chunk](
            g_BTGL, write_BTGK, v_BTGV, writes, self.total, self.prefix, self.suffix, *self.counts,
            L=g_BTGL.shape[3], S=SUB, num_warps=CHUNK_WARPS, **self.tile,
        )  # fmt: skip
        _scan[self.by_element](writes, self.total, self.before, self.chunks, BACKWARD=False, **self.scan)

    def scratch(self, *sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """[B, G, N, sizes], uninitialized."""
        return torch.empty((*self.leading, *sizes), dtype=dtype, device=self.device)


@torch.library.custom_op("liger::attention_sequence", mutates_args=())
def attention_sequence(
    q_BTGRK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    write_BTGK: Tensor,
    g_BTGL: Tensor,
    segment_BT: Tensor,
    cos_SK: Tensor,
    sin_SK: Tensor,
    softmax_map: bool,
    recurrent_weight: float,
    window_weight: float,
    scale: float,
    window: int,
) -> Tensor:
    """Whole sequences of one layer from the empty state, [B,T,G,R,V] in q's dtype, with a gradient for the first five.

    q, k, v share a dtype; q and k are before RoPE, and q before its feature map. write (the keys that the recurrence
    writes) and g (log-decays, L = K channels or 1) are float32: g is very negative where a document begins, both are 0
    at padding. segment (int64) numbers the documents of a row from 1, 0 being padding. S >= W + 16.
    """
    q, k, v, write, g, segment = _contiguous(q_BTGRK, k_BTGK, v_BTGV, write_BTGK, g_BTGL, segment_BT)
    launch, out = _Launch(q, v, write, g), torch.empty_like(q)
    _read[launch.by_sub_chunk](
        q, k, v, write, segment, launch.before, launch.prefix, launch.suffix, cos_SK, sin_SK, out,
        recurrent_weight, window_weight, scale, *launch.counts,
        W=window, ROTARY=cos_SK.shape[1], SOFTMAX=softmax_map, J=KEYS, **launch.options,
    )  # fmt: skip
    return out


@attention_sequence.register_fake
def _(q_BTGRK: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(q_BTGRK, memory_format=torch.contiguous_format)


@torch.library.custom_op("liger::attention_sequence_backward", mutates_args=())
def attention_sequence_backward(
    grad_BTGRV: Tensor,
    q_BTGRK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    write_BTGK: Tensor,
    g_BTGL: Tensor,
    segment_BT: Tensor,
    cos_SK: Tensor,
    sin_SK: Tensor,
    softmax_map: bool,
    recurrent_weight: float,
    window_weight: float,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, write and g."""
    grad, q, k, v, write, g, segment = _contiguous(grad_BTGRV, q_BTGRK, k_BTGK, v_BTGV, write_BTGK, g_BTGL, segment_BT)
    launch = _Launch(q, v, write, g)
    dim, width = q.shape[4], v.shape[3]
    reads, after, spent = launch.scratch(dim, width), torch.empty_like(launch.before), launch.scratch(CHUNK, dim)
    dq, dk, dv, dw, dg = (torch.empty_like(x) for x in (q, k, v, write, g))
    level, delta = (torch.empty(q.shape[:4], dtype=torch.float32, device=q.device) for _ in range(2))
    options = {"SOFTMAX": softmax_map, **launch.options}
    _collect[launch.by_chunk](q, grad, launch.prefix, reads, recurrent_weight, *launch.counts, **options)
    _scan[launch.by_element](reads, launch.total, after, launch.chunks, BACKWARD=True, **launch.scan)
    windows = {"W": window, "ROTARY": cos_SK.shape[1], **launch.options}
    del windows["C"]
    tables, both = (segment, cos_SK, sin_SK), (window_weight, scale)
    _window_queries[launch.by_sub_chunk](
        q, k, v, grad, *tables, dq, level, delta, *both, *launch.counts, J=KEYS, **windows
    )
    _window_keys[launch.by_sub_chunk](q, k, v, grad, *tables, level, delta, dk, dv, *both, *launch.counts, **windows)
    decays = (launch.prefix, launch.suffix)
    _queries[launch.by_sub_chunk](
        q, v, write, grad, launch.before, *decays, dq, spent, recurrent_weight, *launch.counts, **options
    )
    _keys[launch.by_sub_chunk](
        q, v, write, grad, after, *decays, spent, dv, dw, recurrent_weight, *launch.counts, **options
    )
    _gates[launch.by_chunk](
        launch.before, after, spent, dg, *launch.counts, L=g.shape[3], num_warps=CHUNK_WARPS, **launch.tile
    )
    return dq, dk, dv, dw, dg


@attention_sequence_backward.register_fake
def _(grad_BTGRV: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors[:5])


def _contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in tensors)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.rest = inputs[8:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *attention_sequence_backward(grad, *ctx.saved_tensors, *ctx.rest), *([None] * 8)


attention_sequence.register_autograd(_backward, setup_context=_save)


def supports(config: LigerConfig) -> bool:
    """Whether the kernels train a layer: one recurrence with a gate of its own, no sinks."""
    return config.row.width in ("key", "scalar") and not config.sinks
