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

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from liger_deploy.config import LigerConfig
from liger_deploy.gates import STRUCTURES
from liger_deploy.model.kernels import launcher, overlaps, predecessor_done, start_followers
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
def _phi(x_RC, in_RC, SOFTMAX: tl.constexpr):
    """Feature map of each row; channels beyond K become 0."""
    if SOFTMAX:
        x_RC = tl.where(in_RC, x_RC, float("-inf"))
        e_RC = tl.exp(x_RC - tl.max(x_RC, 1)[:, None])
        return e_RC / tl.sum(e_RC, 1)[:, None]
    else:
        return x_RC


@triton.jit
def _dot(a, b, KIND: tl.constexpr):
    """Product of two tiles: their values rounded to the model's 16 bits, or in full float32."""
    if tl.float32 == KIND:
        return tl.dot(a, b, input_precision="ieee")
    else:
        return tl.dot(a.to(KIND), b.to(KIND))


@triton.jit
def _load(at, inside, WHOLE: tl.constexpr):
    """A tile, or zeros outside; masks cost where there is no outside."""
    if WHOLE:
        return tl.load(at)
    else:
        return tl.load(at, inside, 0.0)


@triton.jit
def _turned(row_X1, cos_X1, sin_X1, h_H, ROTARY: tl.constexpr, BH: tl.constexpr):
    """Rows of keys or queries after RoPE, a part of each half of their rotary channels: [X,H] twice, float32."""
    half: tl.constexpr = ROTARY // 2
    WHOLE: tl.constexpr = half % BH == 0
    in_XH, h_XH = (h_H < half)[None, :], h_H[None, :]
    a_XH, b_XH = _load(row_X1 + h_XH, in_XH, WHOLE), _load(row_X1 + half + h_XH, in_XH, WHOLE)
    cos_XH, sin_XH = _load(cos_X1 + h_XH, in_XH, WHOLE), _load(sin_X1 + h_XH, in_XH, WHOLE)
    a_XH, b_XH = a_XH.to(tl.float32), b_XH.to(tl.float32)
    return a_XH * cos_XH - b_XH * sin_XH, b_XH * cos_XH + a_XH * sin_XH


@triton.jit
def _attention_step(
    q_ptr, k_ptr, v_ptr, gate_ptr, length_ptr, state_ptr, ring_k_ptr, ring_v_ptr, cos_ptr, sin_ptr, out_ptr,
    q_row, k_row, v_row, gate_row,
    normalizer, lower_bound, recurrent_weight, window_weight, scale,
    G, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, ROTARY: tl.constexpr,
    GATE: tl.constexpr, SCALAR: tl.constexpr, SOFTMAX: tl.constexpr, KEY_FROM_GATE: tl.constexpr,
    BR: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BW: tl.constexpr, BH: tl.constexpr,
    BREST: tl.constexpr, BLOCKS: tl.constexpr, TOGETHER: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    row, group = head // G, head % G
    kind: tl.constexpr = q_ptr.dtype.element_ty
    KEYS: tl.constexpr = K == BK
    VALUES: tl.constexpr = V % BV == 0
    r_R, r_Q, c_C, j_W = tl.arange(0, BR), tl.arange(0, BQ), tl.arange(0, BK), tl.arange(0, BW)
    in_R, in_Q, in_C = r_R < R, r_Q < R, c_C < K
    h_H, rest_C = tl.arange(0, BH), ROTARY + tl.arange(0, BREST)
    c_V = tl.program_id(1) * BLOCKS * BV + tl.arange(0, BV)
    # Inductor hands numbers over as float64.
    normalizer, lower_bound = tl.cast(normalizer, tl.float32), tl.cast(lower_bound, tl.float32)
    recurrent_weight, window_weight = tl.cast(recurrent_weight, tl.float32), tl.cast(window_weight, tl.float32)
    scale = tl.cast(scale, tl.float32)
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
    factor_C = tl.where(c_C < ROTARY, 0.0, 1.0)  # what RoPE makes of a product of channels turned alike: 1, or YaRN's
    if ROTARY > 0:
        key_a_WH, key_b_WH = _turned(ring_k_W1, cos_ptr + place_W1, sin_ptr + place_W1, h_H, ROTARY, BH)
        cos_C = tl.load(cos_ptr + W * ROTARY + c_C, c_C < ROTARY, 0.0)
        sin_C = tl.load(sin_ptr + W * ROTARY + c_C, c_C < ROTARY, 0.0)
        factor_C += cos_C * cos_C + sin_C * sin_C
    if ROTARY < K:
        rest_WC = _load(ring_k_W1 + rest_C[None, :], (rest_C < K)[None, :], K - ROTARY == BREST)
    ring_v_WV = ring_v_ptr + (head * W + at_W)[:, None] * V
    state_CV = state_ptr + head * K * V + c_C[:, None] * V
    if BLOCKS == 1:
        old_WV = tl.load(ring_v_WV + c_V[None, :], seen_W[:, None] & (c_V < V)[None, :], 0.0)
        if GATE != _NO_RECURRENCE:
            s_CV = _load(state_CV + c_V[None, :], in_C[:, None] & (c_V < V)[None, :], KEYS and VALUES).to(tl.float32)
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
    if BLOCKS == 1:
        v_V = tl.load(new_v_ptr + c_V, c_V < V, 0.0)

    # The window's weights: softmax over keys turned by distance. The new key and the queries are turned alike.
    scores_WR = tl.zeros([BW, BR], tl.float32)
    if ROTARY > 0:
        for block in tl.static_range((ROTARY // 2 + BH - 1) // BH):
            if block > 0:
                h_H += BH
                key_a_WH, key_b_WH = _turned(ring_k_W1, cos_ptr + place_W1, sin_ptr + place_W1, h_H, ROTARY, BH)
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

    # The recurrence's gate, key and queries.
    if tl.program_id(1) == 0:
        tl.store(ring_k_ptr + (head * W + slot) * K + c_C, k_C, in_C)
    if GATE != _NO_RECURRENCE:
        if SCALAR:
            p_C = tl.sum(p_C, 0) / K + p_C * 0.0
        # Sums over one row: each channel's gate is then computed once, and not by every thread that needs it.
        decay_1C = _log_decay(p_C[None, :], group.to(tl.float32), normalizer, lower_bound, GATE)
        alpha_C = tl.sum(tl.exp(decay_1C), 0)
        if KEY_FROM_GATE:
            write_C = 1.0 - alpha_C
        else:
            write_C = tl.sum(_phi(k_C.to(tl.float32)[None, :], in_C[None, :], SOFTMAX), 0)
        write_C = tl.where(in_C, write_C, 0.0)
        q_QC = _phi(q_QC, in_C[None, :], SOFTMAX) * recurrent_weight
        queries = ()
        if not TOGETHER:
            for r in tl.static_range(R):
                queries = queries + (tl.sum(tl.where(r_Q[:, None] == r, q_QC, 0.0), 0),)  # type: ignore[assignment]  # noqa: RUF005

    for _ in tl.range(BLOCKS, num_stages=STAGES):
        in_V = c_V < V
        if BLOCKS > 1:
            v_V = _load(new_v_ptr + c_V, in_V, VALUES)
            old_WV = tl.load(ring_v_WV + c_V[None, :], seen_W[:, None] & in_V[None, :], 0.0)
        tl.store(ring_v_ptr + (head * W + slot) * V + c_V, v_V, in_V)
        near_VR = _dot(tl.trans(tl.where(is_new_W[:, None], v_V[None, :], old_WV)), weights_WR, kind)
        out_QV = tl.trans(tl.sum(tl.reshape(near_VR, [BV, BR // BQ, BQ]), 1))  # columns beyond R are zero
        if GATE != _NO_RECURRENCE:
            in_CV = in_C[:, None] & in_V[None, :]
            if BLOCKS > 1:
                s_CV = _load(state_CV + c_V[None, :], in_CV, KEYS and VALUES).to(tl.float32)
            s_CV = s_CV * alpha_C[:, None] + write_C[:, None] * v_V.to(tl.float32)[None, :]
            if KEYS and VALUES:
                tl.store(state_CV + c_V[None, :], s_CV.to(state_ptr.dtype.element_ty))
            else:
                tl.store(state_CV + c_V[None, :], s_CV.to(state_ptr.dtype.element_ty), in_CV)
            if TOGETHER:
                out_QV += tl.sum(q_QC[:, :, None] * s_CV[None, :, :], 1)
            else:
                for r in tl.static_range(R):
                    far_V = tl.sum(queries[r][:, None] * s_CV, 0)
                    out_QV += tl.where(r_Q[:, None] == r, far_V[None, :], 0.0)
        tl.store(out_ptr + (head * R + r_Q[:, None]) * V + c_V[None, :], out_QV.to(kind), in_Q[:, None] & in_V[None, :])
        c_V += BV


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
    tile = tiling(batch * groups, width, rotary)
    launcher(_attention_step, q_BGRK)[(batch * groups, triton.cdiv(width, tile.values * tile.blocks))](
        q_BGRK, k_BGK, v_BGV, gate_key_BGK, length_B, recurrent_BGKV, ring_k_BGWK, ring_v_BGWV, cos_SK, sin_SK,
        out_BGRV,
        q_BGRK.stride(0), k_BGK.stride(0), v_BGV.stride(0), gate_key_BGK.stride(0),
        normalizer, lower_bound, recurrent_weight, window_weight, scale,
        groups, R=queries, K=dim, V=width, W=slots, ROTARY=rotary,
        GATE=_GATES[structure], SCALAR=row.width == "scalar", SOFTMAX=softmax_map, KEY_FROM_GATE=row.key_from_gate,
        BR=_block(queries), BQ=triton.next_power_of_2(queries), BK=_block(dim), BV=tile.values, BW=_block(slots),
        BH=tile.half, BREST=_block(dim - rotary), BLOCKS=tile.blocks, TOGETHER=tile.together, STAGES=tile.stages,
        OVERLAP=overlaps(),
        num_warps=tile.warps, num_stages=1,
    )  # fmt: skip
    return out_BGRV


def _block(size: int) -> int:
    """Tiles are powers of two, and the matrix units take no side below 16."""
    return int(max(16, triton.next_power_of_2(max(size, 1))))


class Tiling(NamedTuple):
    """What one program takes: `blocks` times `values` of a head's values; rotary halves by `half` channels.

    `together`: one sum reads the state for all queries, the shortest way and the most registers. `stages`: blocks under
    way at once.
    """

    values: int
    blocks: int
    half: int
    warps: int
    together: bool
    stages: int


def tiling(heads: int, width: int, rotary: int) -> Tiling:
    """All of a head's values where heads alone fill a GPU, else a part. Measured: `benchmarks/gpu_cuts.py`."""
    values, half = _block(width), _block(rotary // 2)
    if not isinstance(heads, int) or heads >= 256:  # a symbol in a graph for any number of rows
        return Tiling(min(32, values), triton.cdiv(width, min(32, values)), min(32, half), 2, False, 3)
    if heads >= 128:
        return Tiling(min(64, values), triton.cdiv(width, min(64, values)), half, 4, False, 1)
    while values > 16 and heads * triton.cdiv(width, values) < 128:
        values //= 2
    return Tiling(values, 1, half, 4, True, 1)


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
