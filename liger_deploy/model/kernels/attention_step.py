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
def _phi(x_RC, in_C, SOFTMAX: tl.constexpr):
    """Feature map of each row; channels beyond K become 0."""
    if SOFTMAX:
        x_RC = tl.where(in_C[None, :], x_RC, float("-inf"))
        e_RC = tl.exp(x_RC - tl.max(x_RC, 1)[:, None])
        return e_RC / tl.sum(e_RC, 1)[:, None]
    else:
        return x_RC


@triton.jit
def _dot(a, b, KIND: tl.constexpr):
    """Product of two float32 tiles: their values rounded to the model's 16 bits, or in full float32."""
    if tl.float32 == KIND:
        return tl.dot(a, b, input_precision="ieee")
    else:
        return tl.dot(a.to(KIND), b.to(KIND))


@triton.jit
def _halves(row_X1, h_H, half, in_XH):
    """The two parts of rows of keys or queries that RoPE turns against each other."""
    return tl.load(row_X1 + h_H[None, :], in_XH, 0.0), tl.load(row_X1 + half + h_H[None, :], in_XH, 0.0)


@triton.jit
def _turn(cos_ptr, sin_ptr, place_W, h_H, ROTARY: tl.constexpr, in_WH):
    at_WH = place_W[:, None] * ROTARY + h_H[None, :]
    return tl.load(cos_ptr + at_WH, in_WH, 0.0), tl.load(sin_ptr + at_WH, in_WH, 0.0)


@triton.jit
def _attention_step(
    q_ptr, k_ptr, v_ptr, gate_ptr, length_ptr, state_ptr, ring_k_ptr, ring_v_ptr, cos_ptr, sin_ptr, out_ptr,
    q_row, k_row, v_row, gate_row,
    normalizer, lower_bound, recurrent_weight, window_weight, scale,
    G, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, ROTARY: tl.constexpr,
    GATE: tl.constexpr, SCALAR: tl.constexpr, SOFTMAX: tl.constexpr, KEY_FROM_GATE: tl.constexpr,
    BR: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BW: tl.constexpr, BH: tl.constexpr, BREST: tl.constexpr,
    BLOCKS: tl.constexpr, HALF_BLOCKS: tl.constexpr, MATRIX: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    row, group = head // G, head % G
    kind: tl.constexpr = q_ptr.dtype.element_ty
    half: tl.constexpr = ROTARY // 2
    r_R, c_C, j_W = tl.arange(0, BR), tl.arange(0, BK), tl.arange(0, BW)
    in_R, in_C, in_W = r_R < R, c_C < K, j_W < W
    h_H, rest_C = tl.arange(0, BH), ROTARY + tl.arange(0, BREST)
    in_H, in_rest = h_H < half, rest_C < K
    c_V = tl.program_id(1) * BLOCKS * BV + tl.arange(0, BV)
    # Inductor hands numbers over as float64.
    normalizer, lower_bound = tl.cast(normalizer, tl.float32), tl.cast(lower_bound, tl.float32)
    recurrent_weight, window_weight = tl.cast(recurrent_weight, tl.float32), tl.cast(window_weight, tl.float32)
    scale = tl.cast(scale, tl.float32)
    if OVERLAP:
        head += start_followers()

    # What the projections ahead do not change: loaded while they still run.
    length = tl.load(length_ptr + row)
    slot = (length % W).to(tl.int32)
    distance_W = (slot - j_W + W) % W
    is_new_W, seen_W = j_W == slot, in_W & (distance_W <= length)
    old_W = seen_W & ~is_new_W
    ring_k_W1 = ring_k_ptr + (head * W + j_W[:, None]) * K
    if ROTARY > 0:
        a_WH, b_WH = _halves(ring_k_W1, h_H, half, old_W[:, None] & in_H[None, :])
        cos_WH, sin_WH = _turn(cos_ptr, sin_ptr, W - distance_W, h_H, ROTARY, in_W[:, None] & in_H[None, :])
    if ROTARY < K:
        rest_WC = tl.load(ring_k_W1 + rest_C[None, :], old_W[:, None] & in_rest[None, :], 0.0)
    ring_v_WV = ring_v_ptr + (head * W + j_W[:, None]) * V
    values_WV = tl.load(ring_v_WV + c_V[None, :], old_W[:, None] & (c_V < V)[None, :], 0.0)
    state_CV = state_ptr + head * K * V + c_C[:, None] * V
    s_CV = tl.zeros([BK, BV], tl.float32)
    if GATE != _NO_RECURRENCE and BLOCKS == 1:
        s_CV = tl.load(state_CV + c_V[None, :], in_C[:, None] & (c_V < V)[None, :], 0.0).to(tl.float32)
    if OVERLAP:
        done = predecessor_done()
        q_ptr, k_ptr, v_ptr, gate_ptr = q_ptr + done, k_ptr + done, v_ptr + done, gate_ptr + done

    # All that the projections wrote, asked for at once: each wait for memory is a microsecond.
    query_R1 = q_ptr + row * q_row + (group * R + r_R[:, None]) * K
    new_k_ptr, new_v_ptr = k_ptr + row * k_row + group * K, v_ptr + row * v_row + group * V
    k_C = tl.load(new_k_ptr + c_C, in_C, 0.0)
    if GATE != _NO_RECURRENCE:
        p_C = tl.load(gate_ptr + row * gate_row + group * K + c_C, in_C, 0.0).to(tl.float32)
        q_RC = tl.load(query_R1 + c_C[None, :], in_R[:, None] & in_C[None, :], 0.0)
    if BLOCKS == 1:
        first_V = tl.load(new_v_ptr + c_V, c_V < V, 0.0)

    # The window's weights: softmax over keys turned by distance.
    scores_RW = tl.zeros([BR, BW], tl.float32)
    if ROTARY > 0:
        for block in tl.static_range(HALF_BLOCKS):
            if block > 0:
                h_H += BH
                in_H = h_H < half
                a_WH, b_WH = _halves(ring_k_W1, h_H, half, old_W[:, None] & in_H[None, :])
                cos_WH, sin_WH = _turn(cos_ptr, sin_ptr, W - distance_W, h_H, ROTARY, in_W[:, None] & in_H[None, :])
            new_a_H, new_b_H = tl.load(new_k_ptr + h_H, in_H, 0.0), tl.load(new_k_ptr + half + h_H, in_H, 0.0)
            key_a_WH = tl.where(is_new_W[:, None], new_a_H[None, :], a_WH).to(tl.float32)
            key_b_WH = tl.where(is_new_W[:, None], new_b_H[None, :], b_WH).to(tl.float32)
            qa_RH, qb_RH = _halves(query_R1, h_H, half, in_R[:, None] & in_H[None, :])
            qa_RH, qb_RH = qa_RH.to(tl.float32), qb_RH.to(tl.float32)
            cos_H = tl.load(cos_ptr + W * ROTARY + h_H, in_H, 0.0)
            sin_H = tl.load(sin_ptr + W * ROTARY + h_H, in_H, 0.0)
            scores_RW += _dot(qa_RH * cos_H - qb_RH * sin_H, tl.trans(key_a_WH * cos_WH - key_b_WH * sin_WH), kind)
            scores_RW += _dot(qb_RH * cos_H + qa_RH * sin_H, tl.trans(key_b_WH * cos_WH + key_a_WH * sin_WH), kind)
    if ROTARY < K:
        new_rest_C = tl.load(new_k_ptr + rest_C, in_rest, 0.0)
        rest_WC = tl.where(is_new_W[:, None], new_rest_C[None, :], rest_WC).to(tl.float32)
        q_rest_RC = tl.load(query_R1 + rest_C[None, :], in_R[:, None] & in_rest[None, :], 0.0).to(tl.float32)
        scores_RW += _dot(q_rest_RC, tl.trans(rest_WC), kind)
    scores_RW = tl.where(seen_W[None, :], scores_RW * scale, float("-inf"))
    weights_RW = tl.exp(scores_RW - tl.max(scores_RW, 1)[:, None])
    weights_RW = weights_RW * (window_weight / tl.sum(weights_RW, 1))[:, None]

    # The recurrence's gate, key and queries.
    if tl.program_id(1) == 0:
        tl.store(ring_k_ptr + (head * W + slot) * K + c_C, k_C, in_C)
    if GATE != _NO_RECURRENCE:
        if SCALAR:
            p_C = tl.sum(p_C, 0) / K + p_C * 0.0
        alpha_C = tl.exp(_log_decay(p_C, group.to(tl.float32), normalizer, lower_bound, GATE))
        if KEY_FROM_GATE:
            write_C = 1.0 - alpha_C
        else:
            write_C = tl.sum(_phi(k_C.to(tl.float32)[None, :], in_C, SOFTMAX), 0)
        write_C = tl.where(in_C, write_C, 0.0)

        q_RC = _phi(q_RC.to(tl.float32), in_C, SOFTMAX) * recurrent_weight

    for _ in range(BLOCKS):
        in_V = c_V < V
        inside_CV = in_C[:, None] & in_V[None, :]
        if BLOCKS == 1:
            v_V, old_WV = first_V, values_WV
        else:
            v_V = tl.load(new_v_ptr + c_V, in_V, 0.0)
            old_WV = tl.load(ring_v_WV + c_V[None, :], old_W[:, None] & in_V[None, :], 0.0)
        tl.store(ring_v_ptr + (head * W + slot) * V + c_V, v_V, in_V)
        near_RV = _dot(weights_RW, tl.where(is_new_W[:, None], v_V[None, :], old_WV).to(tl.float32), kind)
        out_R1 = out_ptr + (head * R + r_R[:, None]) * V
        if GATE == _NO_RECURRENCE:
            tl.store(out_R1 + c_V[None, :], near_RV.to(kind), in_R[:, None] & in_V[None, :])
        else:
            if BLOCKS == 1:
                before_CV = s_CV
            else:
                before_CV = tl.load(state_CV + c_V[None, :], inside_CV, 0.0).to(tl.float32)
            after_CV = before_CV * alpha_C[:, None] + write_C[:, None] * v_V.to(tl.float32)[None, :]
            tl.store(state_CV + c_V[None, :], after_CV.to(state_ptr.dtype.element_ty), inside_CV)
            if MATRIX:  # in three parts on the matrix units: float32's accuracy, and the shortest way
                out_RV = near_RV + tl.dot(q_RC, after_CV, input_precision="tf32x3")
                tl.store(out_R1 + c_V[None, :], out_RV.to(kind), in_R[:, None] & in_V[None, :])
            else:  # where those parts would fill the registers
                for r in tl.static_range(R):
                    q_C = tl.sum(tl.where(r_R[:, None] == r, q_RC, 0.0), 0)
                    near_V = tl.sum(tl.where(r_R[:, None] == r, near_RV, 0.0), 0)
                    far_V = tl.sum(q_C[:, None] * after_CV, 0)
                    tl.store(out_ptr + (head * R + r) * V + c_V, (near_V + far_V).to(kind), in_V)
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
        BR=_block(queries), BK=_block(dim), BV=tile.values, BW=_block(slots), BH=tile.half,
        BREST=_block(dim - rotary), BLOCKS=tile.blocks, HALF_BLOCKS=triton.cdiv(rotary // 2, tile.half),
        MATRIX=tile.matrix, OVERLAP=overlaps(), num_warps=tile.warps,
    )  # fmt: skip
    return out_BGRV


def _block(size: int) -> int:
    """Tiles are powers of two, and the matrix units take no side below 16."""
    return int(max(16, triton.next_power_of_2(max(size, 1))))


class Tiling(NamedTuple):
    """What one program takes: `blocks` times `values` of a head's values; rotary halves by `half` channels.

    `matrix`: the state is read on the matrix units.
    """

    values: int
    blocks: int
    half: int
    warps: int
    matrix: bool


def tiling(heads: int, width: int, rotary: int) -> Tiling:
    """All of a head's values where heads alone fill a GPU, else a part. Measured: `benchmarks/gpu_cuts.py`."""
    values, half = _block(width), _block(rotary // 2)
    if not isinstance(heads, int) or heads >= 128:  # a symbol in a graph for any number of rows
        values = min(32, values)
        return Tiling(values, int(triton.cdiv(width, values)), min(32, half), 2, False)
    while values > 16 and heads * triton.cdiv(width, values) < 128:
        values //= 2
    return Tiling(values, 1, half, 4, True)


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
