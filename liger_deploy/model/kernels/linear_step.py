"""`liger::linear_step`: a linear layer for one token, with what stands around it in a transformer.

    x' = RMSNorm(x) where a norm is given            y = W x'
    out = silu(y_gate) * y_up where W holds a gate and an up half (SwiGLU), else y;  + residual where one is given

At one token a layer is a stream of its weights. One program takes BN rows of W and all of their D columns; their loads
are issued first, so that they are under way while the norm is computed.

Shape legend: D input width, N output width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from liger_deploy.model.kernels import launcher, overlaps, predecessor_done, start_followers


@triton.jit
def _tile(weight_ptr, n_N, d_D, in_ND, D: tl.constexpr):
    return tl.load(weight_ptr + n_N.to(tl.int64)[:, None] * D + d_D[None, :], in_ND, 0.0, eviction_policy="evict_first")


@triton.jit
def _normed(x_D, scale, norm_ptr, d_D, in_D, NORM: tl.constexpr):
    """RMSNorm as Hugging Face computes it: float32, rounded to the model's dtype before its weight."""
    if NORM:
        weight_D = tl.load(norm_ptr + d_D, in_D, 0.0)
        return ((x_D.to(tl.float32) * scale).to(weight_D.dtype) * weight_D).to(weight_D.dtype).to(tl.float32)
    else:
        return x_D.to(tl.float32)


@triton.jit
def _linear_step(
    x_ptr, weight_ptr, norm_ptr, residual_ptr, out_ptr, eps,
    N: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    NORM: tl.constexpr, SWIGLU: tl.constexpr, RESIDUAL: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    n_N, d_D = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BD)
    if OVERLAP:
        n_N += start_followers()
    in_N, in_D = n_N < N, d_D < D
    w_ND = _tile(weight_ptr, n_N, d_D, in_N[:, None] & in_D[None, :], D)
    if SWIGLU:
        u_ND = _tile(weight_ptr, n_N + N, d_D, in_N[:, None] & in_D[None, :], D)
    if OVERLAP:
        done = predecessor_done()
        x_ptr, residual_ptr = x_ptr + done, residual_ptr + done
    x_D = tl.load(x_ptr + d_D, in_D, 0.0)
    scale = 1.0
    if NORM:
        squares_D = x_D.to(tl.float32) * x_D.to(tl.float32)
        for start in range(BD, D, BD):
            more_D = tl.load(x_ptr + start + d_D, start + d_D < D, 0.0).to(tl.float32)
            squares_D += more_D * more_D
        scale = tl.rsqrt(tl.sum(squares_D, 0) / D + tl.cast(eps, tl.float32))  # Inductor hands eps over as float64
    x_D = _normed(x_D, scale, norm_ptr, d_D, in_D, NORM)
    sum_ND = w_ND.to(tl.float32) * x_D[None, :]
    if SWIGLU:
        up_ND = u_ND.to(tl.float32) * x_D[None, :]
    for start in range(BD, D, BD):
        at_D = start + d_D
        in_D = at_D < D
        x_D = _normed(tl.load(x_ptr + at_D, in_D, 0.0), scale, norm_ptr, at_D, in_D, NORM)
        w_ND = _tile(weight_ptr, n_N, at_D, in_N[:, None] & in_D[None, :], D)
        sum_ND += w_ND.to(tl.float32) * x_D[None, :]
        if SWIGLU:
            u_ND = _tile(weight_ptr, n_N + N, at_D, in_N[:, None] & in_D[None, :], D)
            up_ND += u_ND.to(tl.float32) * x_D[None, :]
    y_N = tl.sum(sum_ND, 1)
    kind = out_ptr.dtype.element_ty
    if SWIGLU:
        gate_N = y_N.to(kind).to(tl.float32)
        y_N = (gate_N / (1.0 + tl.exp(-gate_N))).to(kind).to(tl.float32) * tl.sum(up_ND, 1).to(kind).to(tl.float32)
    if RESIDUAL:
        y_N = y_N.to(kind).to(tl.float32) + tl.load(residual_ptr + n_N, in_N, 0.0).to(tl.float32)
    tl.store(out_ptr + n_N, y_N.to(kind), in_N)


@triton_op("liger::linear_step", mutates_args=())
def linear_step(
    x: Tensor, weight_ND: Tensor, norm_D: Tensor | None, eps: float, swiglu: bool, residual: Tensor | None
) -> Tensor:
    """One row: x [1,...,D] -> [1,...,N] in x's dtype; with `swiglu` the weight is [2N,D], gate rows first."""
    rows, width = weight_ND.shape
    rows = rows // 2 if swiglu else rows
    out = torch.empty((*x.shape[:-1], rows), dtype=x.dtype, device=x.device)
    block_n, block_d, warps = tiling(rows, width, swiglu)
    launcher(_linear_step, x)[(triton.cdiv(rows, block_n),)](
        x, weight_ND, x if norm_D is None else norm_D, x if residual is None else residual, out, eps,
        N=rows, D=width, BN=block_n, BD=block_d,
        NORM=norm_D is not None, SWIGLU=swiglu, RESIDUAL=residual is not None, OVERLAP=overlaps(), num_warps=warps,
    )  # fmt: skip
    return out


def tiling(rows: int, width: int, swiglu: bool) -> tuple[int, int, int]:
    """(rows of W a program takes, columns of one load, warps)."""
    block_d = min(triton.next_power_of_2(width), 2048)
    few = swiglu or width > 2048 or rows * width <= 1 << 22  # then a program's share is smaller, or it takes two tiles
    return (2 if few else 4), block_d, (8 if width > 4096 else 4)
