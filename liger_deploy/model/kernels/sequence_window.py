"""The window's part of `liger::attention_sequence`: RoPE by place, and the gradients of q, k and v.

As in `window.py`, keys are turned by their place inside what is read, so that scores depend on distances alone.

Shape legend: B rows, T tokens, G KV heads, R query heads per KV head, K key dim, V value dim, W window, S tokens of a
sub-chunk, X = R * S rows of queries, J keys of a block. A program takes one KV head of one row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from liger_deploy.model.kernels.attention_parts import _dot


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
def _window_block(
    turned_XC, segment_X, k_ptr, v_ptr, segment_ptr, cos_ptr, sin_ptr, start, first, row, group,
    i_X, c_C, c_V, scale, G, T, KIND: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr,
    ROTARY: tl.constexpr, S: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """Scores of some queries on J keys of their window, -inf where not seen; the keys, turned; the values."""
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
    return scores_XJ, keys_JC, v_JV


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
        scores_XJ, keys_JC, v_JV = _window_block(
            turned_XC, segment_X, k_ptr, v_ptr, segment_ptr, cos_ptr, sin_ptr, start, first, row, group,
            i_X, c_C, c_V, scale, G, T, kind, K, V, W, ROTARY, S, J,
        )  # fmt: skip
        dp_XJ = _dot(do_XV, tl.trans(v_JV), kind)
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
        scores_XJ, keys_JC, v_JV = _window_block(
            turned_XC, segment_X, k_ptr, v_ptr, segment_ptr, cos_ptr, sin_ptr, start, first, row, group,
            i_X, c_C, c_V, scale, G, T, kind, K, V, W, ROTARY, S, J,
        )  # fmt: skip
        dp_XJ = _dot(do_XV, tl.trans(v_JV), kind)
        weights_XJ = tl.exp(scores_XJ - level_X[:, None])
        d_XC += _dot(weights_XJ * (dp_XJ - delta_X[:, None]), keys_JC, kind)
    dq_XC = _turned_back(d_XC * (scale * window_weight), cos_XC, sin_XC, c_C, ROTARY, kind)
    tl.store(dq_ptr + at_X1 * K + c_C[None, :], dq_XC.to(kind), in_XC)


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
