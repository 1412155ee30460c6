"""The recurrence's part of `liger::attention_sequence`: states forward, their gradients backward, and those of q, k, v
and g. The equations are in `attention_sequence.py`.

As in `attention_prefill`, exponents meet at the start of the later token's sub-chunk, so that none is positive, and
inside a sub-chunk two factors stand for the decay between two tokens while float32 bears them; beyond, pairs are taken
one by one.

Shape legend: B rows, T tokens, G KV heads, R query heads per KV head, K key dim, V value dim, N chunks, C tokens of a
chunk, S tokens of a sub-chunk, X = R * S rows of queries, L channels of the gate. A program takes one KV head of one
row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from liger_deploy.model.kernels.attention_parts import _dot, _phi
from liger_deploy.model.kernels.attention_prefill import SAFE, SAFE_EXACT, _sums


@triton.jit
def _bears(b_SC, KIND: tl.constexpr):
    """Whether two factors bear a sub-chunk's decays: bfloat16 has float32's range, float16 has not."""
    if tl.bfloat16 == KIND:
        return tl.min(b_SC) > -SAFE
    else:
        return tl.min(b_SC) > -SAFE_EXACT


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
        q_XC, do_XV = _queries_at(q_ptr, grad_ptr, first, row, group, i_X, r_X, c_C, c_V, recurrent_weight, G, T, R, K,
                                  V, SOFTMAX)  # fmt: skip
        b_SC = tl.load(prefix_ptr + (head * N * C + first + i_S[:, None]) * K + c_C[None, :], in_C[None, :], 0.0)
        q_RSC = tl.reshape(q_XC, [BR, S, BK])
        q_XC = tl.reshape(q_RSC * tl.exp(b_SC + between_C[None, :])[None, :, :], [BR * S, BK])
        reads_CV += _dot(tl.trans(q_XC), do_XV, kind)
        between_C += tl.sum(tl.where((i_S == S - 1)[:, None], b_SC, 0.0), 0)
    at_CV = (head * N + n) * K * V + c_C[:, None] * V + c_V[None, :]
    tl.store(reads_ptr + at_CV, reads_CV, in_C[:, None] & in_V[None, :])


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
