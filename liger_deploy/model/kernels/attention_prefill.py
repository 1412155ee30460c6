"""`liger::attention_prefill`: `attention_step` for T tokens at once, chunk by chunk, in four kernels.

    write    what each chunk of C tokens writes into the state, its decays and its keys; chunks in parallel, their
             sub-chunks of S tokens one after the other
    scan     the recurrent state before every chunk; state elements in parallel
    read     all outputs; S tokens of one KV head and its query heads a program
    keep     the last W keys and values go into the ring

With b_i the sum of log-decays from the chunk's start to token i (inclusive), a token reads

    q_i e^{b_i} state  +  sum over j <= i of (q_i . k_j e^{b_i - b_j}) v_j        (arXiv 2503.01496, Eq. 7, unrolled)

No exponent of two tokens far apart is ever positive, whatever the gate: they meet at the start of the later one's
sub-chunk of S tokens. Inside a sub-chunk the two factors may be large and small, which float32 bears while the decays
there sum to less than SAFE; where a gate forgets more than that, they are taken pair by pair.

Shape legend: B rows, T tokens, G KV heads, R query heads per KV head, K key dim, V value dim, W window, N chunks,
C tokens of a chunk, S tokens of a sub-chunk, X = R * S rows of queries, J keys of a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from liger_deploy.gates import STRUCTURES
from liger_deploy.model.kernels import launcher
from liger_deploy.model.kernels.attention_parts import (
    _GATES,
    _block,
    _dot,
    _log_decay,
    _phi,
)
from liger_deploy.model.lolcats import Lolcats
from liger_deploy.model.mixer import Heads, LayerState, Mixer
from liger_deploy.model.window import Rope

CHUNK, SUB, KEYS = 64, 16, 32  # C, S, J
# Largest sum of decays in a sub-chunk that two factors bear: that of float32's range, and that of its last digits.
SAFE, SAFE_EXACT = tl.constexpr(60.0), tl.constexpr(8.0)


@triton.jit
def _halves(row_X1, h_H, half, in_XH):
    """The two parts of rows of keys or queries that RoPE turns against each other."""
    return tl.load(row_X1 + h_H[None, :], in_XH, 0.0), tl.load(row_X1 + half + h_H[None, :], in_XH, 0.0)


@triton.jit
def _gates(
    rows_T1, c_C, in_TC, group, normalizer, lower_bound, K: tl.constexpr, GATE: tl.constexpr, SCALAR: tl.constexpr
):
    """Log-decays of some tokens; 0 outside the mask."""
    p_TC = tl.load(rows_T1 + c_C[None, :], in_TC, 0.0).to(tl.float32)
    if SCALAR:
        p_TC = tl.sum(p_TC, 1)[:, None] / K + p_TC * 0.0
    return tl.where(in_TC, _log_decay(p_TC, group, normalizer, lower_bound, GATE), 0.0)


@triton.jit
def _writes(rows_T1, c_C, in_C, in_TC, g_TC, SOFTMAX: tl.constexpr, KEY_FROM_GATE: tl.constexpr):
    """The keys that are written; 0 outside the mask."""
    if KEY_FROM_GATE:
        w_TC = 1.0 - tl.exp(g_TC)
    else:
        w_TC = _phi(tl.load(rows_T1 + c_C[None, :], in_TC, 0.0).to(tl.float32), in_C, SOFTMAX)
    return tl.where(in_TC, w_TC, 0.0)


@triton.jit
def _sums(chosen_TT, g_TC, KIND: tl.constexpr):
    """For each token, the sum of the chosen tokens' log-decays."""
    if tl.float32 == KIND:
        return tl.dot(chosen_TT.to(tl.float32), g_TC, input_precision="tf32x3")
    else:  # the gate's key has fewer digits than tf32
        return tl.dot(chosen_TT.to(tl.float32), g_TC, input_precision="tf32")


@triton.jit
def _prefill_write(
    k_ptr, v_ptr, gate_ptr, valid_ptr, writes_ptr, total_ptr, prefix_ptr, key_ptr, faded_ptr,
    k_batch, k_row, v_batch, v_row, gate_batch, gate_row, normalizer, lower_bound, G, N,
    K: tl.constexpr, V: tl.constexpr, GATE: tl.constexpr, SCALAR: tl.constexpr, SOFTMAX: tl.constexpr,
    KEY_FROM_GATE: tl.constexpr, C: tl.constexpr, S: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    n, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row, group = head // G, head % G
    kind: tl.constexpr = k_ptr.dtype.element_ty
    c_C, c_V, i_S = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, S)
    in_C, in_V = c_C < K, c_V < V
    normalizer, lower_bound = tl.cast(normalizer, tl.float32), tl.cast(lower_bound, tl.float32)
    valid = tl.load(valid_ptr + row)
    k_ptr += row * k_batch + group * K
    gate_ptr += row * gate_batch + group * K
    v_ptr += row * v_batch + group * V
    # Sums of log-decays as products with 0 and 1: quicker than a scan, and no small sum is a difference of large ones.
    upto_SS, after_SS = i_S[None, :] <= i_S[:, None], i_S[None, :] > i_S[:, None]
    writes_CV, total_C = tl.zeros([BK, BV], tl.float32), tl.zeros([BK], tl.float32)
    for start in tl.range(0, C, S, num_stages=STAGES):
        t_S = n * C + start + i_S
        in_S = t_S < valid
        in_SC = in_S[:, None] & in_C[None, :]
        gate_S1, k_S1 = gate_ptr + t_S[:, None] * gate_row, k_ptr + t_S[:, None] * k_row
        g_SC = _gates(gate_S1, c_C, in_SC, group.to(tl.float32), normalizer, lower_bound, K, GATE, SCALAR)
        w_SC = _writes(k_S1, c_C, in_C, in_SC, g_SC, SOFTMAX, KEY_FROM_GATE)
        v_SV = tl.load(v_ptr + t_S[:, None] * v_row + c_V[None, :], in_S[:, None] & in_V[None, :], 0.0)
        at_SC = ((head * N + n) * C + start + i_S[:, None]) * K + c_C[None, :]
        tl.store(prefix_ptr + at_SC, _sums(upto_SS, g_SC, kind), in_C[None, :])
        tl.store(key_ptr + at_SC, w_SC.to(kind), in_C[None, :])
        w_SC *= tl.exp(_sums(after_SS, g_SC, kind))
        tl.store(faded_ptr + at_SC, w_SC.to(kind), in_C[None, :])
        sum_C = tl.sum(g_SC, 0)
        total_C += sum_C
        writes_CV *= tl.exp(sum_C)[:, None]
        if tl.float32 == kind:
            writes_CV += tl.dot(tl.trans(w_SC), v_SV, input_precision="ieee")
        else:  # a 16-bit value is exact in tf32
            writes_CV += tl.dot(tl.trans(w_SC), v_SV.to(tl.float32), input_precision="tf32")
    tl.store(total_ptr + (head * N + n) * K + c_C, total_C, in_C)
    at_CV = (head * N + n) * K * V + c_C[:, None] * V + c_V[None, :]
    tl.store(writes_ptr + at_CV, writes_CV, in_C[:, None] & in_V[None, :])


@triton.jit
def _prefill_scan(
    writes_ptr, total_ptr, state_ptr, before_ptr, N, K: tl.constexpr, V: tl.constexpr, E: tl.constexpr, A: tl.constexpr
):
    """E elements of one head's state, A chunks asked for at once."""
    head = tl.program_id(0).to(tl.int64)
    e_E = tl.program_id(1) * E + tl.arange(0, E)
    in_E = e_E < K * V
    s_E = tl.load(state_ptr + head * K * V + e_E, in_E, 0.0)
    for start in range(0, N, A):
        for i in tl.static_range(A):
            n = head * N + start + i
            there = in_E & (start + i < N)
            decay_E = tl.exp(tl.load(total_ptr + n * K + e_E // V, there, 0.0))
            writes_E = tl.load(writes_ptr + n * K * V + e_E, there, 0.0)
            tl.store(before_ptr + n * K * V + e_E, s_E.to(before_ptr.dtype.element_ty), there)
            s_E = s_E * decay_E + writes_E
    tl.store(state_ptr + head * K * V + e_E, s_E, in_E)


@triton.jit
def _prefill_read(
    q_ptr, k_ptr, v_ptr, length_ptr, valid_ptr, before_ptr, prefix_ptr, key_ptr, faded_ptr,
    ring_k_ptr, ring_v_ptr, cos_ptr, sin_ptr, out_ptr, q_batch, q_row, k_batch, k_row, v_batch, v_row,
    recurrent_weight, window_weight, scale, G, N, T,
    R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, ROTARY: tl.constexpr,
    RECURS: tl.constexpr, SOFTMAX: tl.constexpr, C: tl.constexpr, S: tl.constexpr, J: tl.constexpr,
    BR: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr, BREST: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    row, group = head // G, head % G
    kind: tl.constexpr = q_ptr.dtype.element_ty
    half: tl.constexpr = ROTARY // 2
    first = tl.program_id(0).to(tl.int64) * S  # these rows' first token
    chunk = first // C
    c_C, c_V, i_S, x_X = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, S), tl.arange(0, BR * S)
    in_C, in_V, i_X, r_X = c_C < K, c_V < V, x_X % S, x_X // S
    in_X = (r_X < R) & (first + i_X < T)
    recurrent_weight, window_weight = tl.cast(recurrent_weight, tl.float32), tl.cast(window_weight, tl.float32)
    scale = tl.cast(scale, tl.float32)
    length, valid = tl.load(length_ptr + row), tl.load(valid_ptr + row)
    query_X1 = q_ptr + row * q_batch + (first + i_X[:, None]) * q_row + (group * R + r_X[:, None]) * K
    k_ptr += row * k_batch + group * K
    v_ptr += row * v_batch + group * V

    # The window: key number u of W + S stands at u, the query at W + i.
    h_H, rest_C = tl.arange(0, BH), ROTARY + tl.arange(0, BREST)
    in_H, in_rest = h_H < half, rest_C < K
    if ROTARY > 0:
        qa_XH, qb_XH = _halves(query_X1, h_H, half, in_X[:, None] & in_H[None, :])
        qa_XH, qb_XH = qa_XH.to(tl.float32), qb_XH.to(tl.float32)
        at_XH, inside_XH = (W + i_X[:, None]) * ROTARY + h_H[None, :], in_X[:, None] & in_H[None, :]
        cos_XH, sin_XH = tl.load(cos_ptr + at_XH, inside_XH, 0.0), tl.load(sin_ptr + at_XH, inside_XH, 0.0)
        turned_a_XH = qa_XH * cos_XH - qb_XH * sin_XH
        turned_b_XH = qb_XH * cos_XH + qa_XH * sin_XH
    if ROTARY < K:
        q_rest_XC = tl.load(query_X1 + rest_C[None, :], in_X[:, None] & in_rest[None, :], 0.0).to(tl.float32)
    near_XV = tl.zeros([BR * S, BV], tl.float32)
    top_X = tl.full([BR * S], -1e30, tl.float32)
    total_X = tl.zeros([BR * S], tl.float32)
    for start in range(0, W + S, J):
        u_J = start + tl.arange(0, J)
        token_J = first - W + u_J  # below 0: kept from before
        new_J, old_J = (token_J >= 0) & (token_J < valid) & (u_J < W + S), (token_J < 0) & (length + token_J >= 0)
        there_J, old_J1 = new_J | old_J, old_J[:, None]
        slot_J1 = head * W + (length + token_J[:, None] + W) % W
        key_J1 = tl.where(old_J1, ring_k_ptr + slot_J1 * K, k_ptr + token_J[:, None] * k_row)
        scores_XJ = tl.zeros([BR * S, J], tl.float32)
        if ROTARY > 0:
            a_JH, b_JH = _halves(key_J1, h_H, half, there_J[:, None] & in_H[None, :])
            a_JH, b_JH = a_JH.to(tl.float32), b_JH.to(tl.float32)
            at_JH, inside_JH = u_J[:, None] * ROTARY + h_H[None, :], (u_J < W + S)[:, None] & in_H[None, :]
            cos_JH, sin_JH = tl.load(cos_ptr + at_JH, inside_JH, 0.0), tl.load(sin_ptr + at_JH, inside_JH, 0.0)
            scores_XJ += _dot(turned_a_XH, tl.trans(a_JH * cos_JH - b_JH * sin_JH), kind)
            scores_XJ += _dot(turned_b_XH, tl.trans(b_JH * cos_JH + a_JH * sin_JH), kind)
        if ROTARY < K:
            rest_JC = tl.load(key_J1 + rest_C[None, :], there_J[:, None] & in_rest[None, :], 0.0)
            scores_XJ += _dot(q_rest_XC, tl.trans(rest_JC.to(tl.float32)), kind)
        seen_XJ = (u_J[None, :] > i_X[:, None]) & (u_J[None, :] <= W + i_X[:, None]) & there_J[None, :]
        scores_XJ = tl.where(seen_XJ, scores_XJ * scale, float("-inf"))
        newer_X = tl.maximum(top_X, tl.max(scores_XJ, 1))
        weights_XJ, fade_X = tl.exp(scores_XJ - newer_X[:, None]), tl.exp(top_X - newer_X)
        value_J1 = tl.where(old_J1, ring_v_ptr + slot_J1 * V, v_ptr + token_J[:, None] * v_row)
        v_JV = tl.load(value_J1 + c_V[None, :], there_J[:, None] & in_V[None, :], 0.0)
        near_XV = near_XV * fade_X[:, None] + _dot(weights_XJ, v_JV.to(tl.float32), kind)
        total_X = total_X * fade_X + tl.sum(weights_XJ, 1)
        top_X = newer_X
    out_XV = near_XV * (window_weight / tl.maximum(total_X, 1e-30))[:, None]

    if RECURS:
        at_SC = (head * N * C + first + i_S[:, None]) * K + c_C[None, :]
        b_SC = tl.load(prefix_ptr + at_SC, in_C[None, :], 0.0)
        w_SC = tl.load(key_ptr + at_SC, in_C[None, :], 0.0).to(tl.float32)
        own_V = v_ptr + (first + i_S[:, None]) * v_row + c_V[None, :]
        v_SV = tl.load(own_V, (first + i_S < valid)[:, None] & in_V[None, :], 0.0).to(tl.float32)
        q_XC = tl.load(query_X1 + c_C[None, :], in_X[:, None] & in_C[None, :], 0.0).to(tl.float32)
        q_RSC = tl.reshape(_phi(q_XC, in_C, SOFTMAX) * recurrent_weight, [BR, S, BK])
        q_XC = tl.reshape(q_RSC * tl.exp(b_SC)[None, :, :], [BR * S, BK])

        # What its own tokens wrote.
        if tl.float32 == kind:
            small = tl.min(b_SC) > -SAFE_EXACT
        else:
            small = tl.min(b_SC) > -SAFE
        if small:
            w_own_SC = w_SC * tl.exp(-b_SC)
            if tl.float32 == kind:
                scores_XS = tl.dot(q_XC, tl.trans(w_own_SC), input_precision="ieee")
            else:
                scores_XS = tl.dot(q_XC, tl.trans(w_own_SC), input_precision="tf32")
            scores_XS = tl.where(i_S[None, :] <= i_X[:, None], scores_XS, 0.0)
        else:
            scores_RSS = tl.zeros([BR, S, S], tl.float32)
            for j in range(S):
                mine_SC = (i_S == j)[:, None]
                w_C, b_C = tl.sum(tl.where(mine_SC, w_SC, 0.0), 0), tl.sum(tl.where(mine_SC, b_SC, 0.0), 0)
                pair_SC = tl.exp(tl.minimum(b_SC - b_C[None, :], 0.0)) * w_C[None, :]
                pair_SC = tl.where((i_S >= j)[:, None], pair_SC, 0.0)
                scores_RS = tl.sum(q_RSC * pair_SC[None, :, :], 2)
                scores_RSS += tl.where((i_S == j)[None, None, :], scores_RS[:, :, None], 0.0)
            scores_XS = tl.reshape(scores_RSS, [BR * S, S])
        out_XV += _dot(scores_XS, v_SV, kind)

        # What the chunk's earlier sub-chunks wrote, going back; `between`: the decays from there to these rows' start.
        between_C = tl.zeros([BK], tl.float32)
        for back in range(1, (first - chunk * C) // S + 1):
            from_ = first - back * S
            w_SC = tl.load(faded_ptr + at_SC - back * S * K, in_C[None, :], 0.0).to(tl.float32)
            w_SC *= tl.exp(between_C)[None, :]
            in_SV = (from_ + i_S < valid)[:, None] & in_V[None, :]
            v_SV = tl.load(v_ptr + (from_ + i_S[:, None]) * v_row + c_V[None, :], in_SV, 0.0).to(tl.float32)
            out_XV += _dot(_dot(q_XC, tl.trans(w_SC), kind), v_SV, kind)
            between_C += tl.load(prefix_ptr + (head * N * C + from_ + S - 1) * K + c_C, in_C, 0.0)

        # What the state held.
        before_CV = before_ptr + (head * N + chunk) * K * V + c_C[:, None] * V + c_V[None, :]
        s_CV = tl.load(before_CV, in_C[:, None] & in_V[None, :], 0.0)
        out_XV += _dot(q_XC * tl.exp(between_C)[None, :], s_CV.to(tl.float32), kind)

    out_X1 = out_ptr + (((row * T + first + i_X[:, None]) * G + group) * R + r_X[:, None]) * V
    tl.store(out_X1 + c_V[None, :], out_XV.to(kind), in_X[:, None] & in_V[None, :])


@triton.jit
def _prefill_keep(
    k_ptr, v_ptr, length_ptr, valid_ptr, ring_k_ptr, ring_v_ptr, k_batch, k_row, v_batch, v_row, G,
    K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    row, group = head // G, head % G
    slot_W, c_C = tl.program_id(1) * BW + tl.arange(0, BW), tl.arange(0, BC)
    length, valid = tl.load(length_ptr + row), tl.load(valid_ptr + row)
    last = length + valid - 1
    token_W = valid - 1 - (last - slot_W + W) % W  # the newest of the new tokens that belongs into the slot
    moves_W1 = ((slot_W < W) & (token_W >= 0))[:, None]
    new_k = tl.load(k_ptr + row * k_batch + token_W[:, None] * k_row + group * K + c_C[None, :], moves_W1 & (c_C < K))
    new_v = tl.load(v_ptr + row * v_batch + token_W[:, None] * v_row + group * V + c_C[None, :], moves_W1 & (c_C < V))
    tl.store(ring_k_ptr + (head * W + slot_W[:, None]) * K + c_C[None, :], new_k, moves_W1 & (c_C < K))
    tl.store(ring_v_ptr + (head * W + slot_W[:, None]) * V + c_C[None, :], new_v, moves_W1 & (c_C < V))


@triton_op("liger::attention_prefill", mutates_args={"recurrent_BGKV", "ring_k_BGWK", "ring_v_BGWV"})
def attention_prefill(
    q_BTGRK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    gate_key_BTGK: Tensor,
    length_B: Tensor,
    valid_B: Tensor,
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
    """T tokens of one layer, [B,T,G,R,V] in q's dtype; the first `valid` of a row count, and the outputs of the others
    mean nothing. `recurrent` (float32) and the ring change in place.

    q, k, v and gate_key may be slices of wider rows. S >= W + 16. A structure without a recurrence takes any tensor.
    """
    (batch, tokens, groups, queries, dim), slots = q_BTGRK.shape, ring_k_BGWK.shape[2]
    row, width, rotary = STRUCTURES[structure], v_BTGV.shape[3], cos_SK.shape[1]
    q, k, v, gate = (x if x[0, 0].is_contiguous() else x.contiguous() for x in (q_BTGRK, k_BTGK, v_BTGV, gate_key_BTGK))
    strides = [x.stride(i) for x in (k, v, gate) for i in (0, 1)]
    out = torch.empty((batch, tokens, groups, queries, width), dtype=q.dtype, device=q.device)
    chunks, heads, recurs = triton.cdiv(tokens, CHUNK), batch * groups, row.width != "none"
    shape = {"K": dim, "V": width, "C": CHUNK, "S": SUB, "BK": _block(dim), "BV": _block(width), "SOFTMAX": softmax_map}

    def scratch(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty((batch, groups, chunks, *sizes) if recurs else (1,), dtype=dtype, device=q.device)

    before, prefix = scratch(dim, width, dtype=q.dtype), scratch(CHUNK, dim)
    keys, faded = (scratch(CHUNK, dim, dtype=q.dtype) for _ in range(2))
    if recurs:
        writes, total = scratch(dim, width), scratch(dim)
        launcher(_prefill_write, q)[(chunks, heads)](
            k, v, gate, valid_B, writes, total, prefix, keys, faded, *strides, normalizer, lower_bound, groups, chunks,
            GATE=_GATES[structure], SCALAR=row.width == "scalar", KEY_FROM_GATE=row.key_from_gate,
            STAGES=WRITE_STAGES, num_warps=WARPS, **shape,
        )  # fmt: skip
        elements = min(SCAN, int(triton.next_power_of_2(dim * width)))
        launcher(_prefill_scan, q)[(heads, triton.cdiv(dim * width, elements))](
            writes, total, recurrent_BGKV, before, chunks, K=dim, V=width, E=elements, A=AHEAD, num_warps=WARPS
        )
    launcher(_prefill_read, q)[(triton.cdiv(tokens, SUB), heads)](
        q, k, v, length_B, valid_B, before, prefix, keys, faded, ring_k_BGWK, ring_v_BGWV, cos_SK, sin_SK, out,
        q.stride(0), q.stride(1), *strides[:4], recurrent_weight, window_weight, scale, groups, chunks, tokens,
        R=queries, W=slots, ROTARY=rotary, RECURS=recurs, J=KEYS, BR=triton.next_power_of_2(queries),
        BH=_block(rotary // 2), BREST=_block(dim - rotary), num_warps=WARPS, num_stages=1, **shape,
    )  # fmt: skip
    block = min(16, _block(slots))
    launcher(_prefill_keep, q)[(heads, triton.cdiv(slots, block))](
        k, v, length_B, valid_B, ring_k_BGWK, ring_v_BGWV, *strides[:4], groups,
        K=dim, V=width, W=slots, BW=block, BC=_block(max(dim, width)), num_warps=WARPS,
    )  # fmt: skip
    return out


WARPS, WRITE_STAGES, SCAN, AHEAD = 4, 3, 1024, 8  # measured: benchmarks/gpu_cuts.py


def prefill_on_ring(
    mixer: Mixer,
    heads: Heads,
    rope: Rope,
    layer: LayerState,
    length: Tensor,
    valid: Tensor | None = None,
    lolcats: Lolcats | None = None,
) -> tuple[Tensor, LayerState]:
    """`Mixer.after_state` over a state whose window is a ring; the state's tensors change in place."""
    assert valid is not None
    config, recurrent = mixer.liger, layer.recurrent[0] if layer.recurrent else length
    out_BTGRV = attention_prefill(
        *heads, length, valid, recurrent, layer.window_k, layer.window_v, *rope, config.structure,
        config.feature_map == "softmax", config.gate_normalizer, config.lower_bound,
        config.recurrent_weight, config.window_weight, mixer.scaling,
    )  # fmt: skip
    return out_BTGRV, layer
