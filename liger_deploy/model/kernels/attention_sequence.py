"""`liger::attention_sequence`: `Mixer.sequence` for training, whole sequences forward and backward, in Triton.

With b_i the sum of log-decays from the chunk's start to token i (inclusive), S0 the state before the chunk,

    o_i  = q_i e^{b_i} S0 + sum over j <= i of (q_i . k_j e^{b_i - b_j}) v_j    (arXiv 2503.01496, Eq. 7, unrolled)

and with D the gradient of the state after the chunk, do that of the outputs and e_j the log-decay from j to the end,

    dq_i = e^{b_i} S0 do_i + sum over j <= i of e^{b_i - b_j} k_j (v_j . do_i)
    dk_j = e^{e_j} D v_j   + sum over i >= j of e^{b_i - b_j} q_i (v_j . do_i)
    dv_j = k_j e^{e_j} D   + sum over i >= j of (q_i . k_j e^{b_i - b_j}) do_i
    dg_t = sum over i >= t in the chunk of (q_i dq_i - k_i dk_i), and over the values of S1 * D

(S1: the state after the chunk). States go forward and their gradients backward, chunk by chunk. Nothing but the
inputs is kept for the backward pass. The kernels are in `sequence_recurrence.py` and `sequence_window.py`; the outputs
of both are made here, by one kernel.

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
from liger_deploy.model.kernels.attention_parts import _block, _dot, _phi
from liger_deploy.model.kernels.sequence_recurrence import (
    _bears,
    _collect,
    _decays_since,
    _earlier,
    _gates,
    _keys,
    _queries,
    _scan,
    _write,
)  # fmt: skip
from liger_deploy.model.kernels.sequence_window import (
    _table,
    _turned,
    _window_block,
    _window_keys,
    _window_queries,
)

CHUNK, SUB, KEYS = 64, 16, 32  # C, S, J
SCAN, AHEAD = 128, 8  # elements of a state that a program scans, chunks that it asks for at once
WARPS, CHUNK_WARPS, STAGES = 4, 8, 1  # measured, like the rest: benchmarks/gpu_cuts.py


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
        scores_XJ, _, v_JV = _window_block(
            turned_XC, segment_X, k_ptr, v_ptr, segment_ptr, cos_ptr, sin_ptr, start, first, row, group,
            i_X, c_C, c_V, scale, G, T, kind, K, V, W, ROTARY, S, J,
        )  # fmt: skip
        newer_X = tl.maximum(top_X, tl.max(scores_XJ, 1))
        weights_XJ, fade_X = tl.exp(scores_XJ - newer_X[:, None]), tl.exp(top_X - newer_X)
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
