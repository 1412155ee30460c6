"""`liger::linear_step`: a linear layer for one token, with what stands around it in a transformer.

    x' = RMSNorm(x) where a norm is given            y = W x'
    out = silu(y_gate) * y_up where W holds a gate and an up half (SwiGLU), else y;  + residual where one is given

At one token a layer is a stream of its weights, in the model's dtype or packed in 8 or 4 bits (`packed.py`). One
program takes BN rows of W and all of their D columns; their loads are issued first, so that they are under way while
the norm is computed. In 4 bits it goes on to other rows, as its inputs cost as much as theirs.

Shape legend: D input width, N output width, G groups of 32 columns, J words of a group, K numbers of a word.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from liger_deploy.model.kernels import launcher, overlaps, predecessor_done, start_followers
from liger_deploy.model.packed import GROUP, WORDS


@triton.jit
def _tile(weight_ptr, n_N, d_D, in_ND, D: tl.constexpr):
    return tl.load(weight_ptr + n_N.to(tl.int64)[:, None] * D + d_D[None, :], in_ND, 0.0, eviction_policy="evict_first")


@triton.jit
def _input(x_ptr, norm_ptr, at, D: tl.constexpr, NORM: tl.constexpr):
    """Inputs times the norm's weight, and their squares; the norm's root is left for the sums made of them."""
    x = tl.load(x_ptr + at, at < D, 0.0).to(tl.float32)
    if NORM:
        return x * tl.load(norm_ptr + at, at < D, 0.0).to(tl.float32), x * x
    else:
        return x, x


@triton.jit
def _store(
    y_N, up_N, squares, residual_ptr, out_ptr, n_N, eps,
    N: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr, SWIGLU: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """What comes after the product, each step rounded to the model's dtype as the model's own layers do."""
    kind = out_ptr.dtype.element_ty
    if NORM:
        root = tl.rsqrt(squares / D + tl.cast(eps, tl.float32))  # Inductor hands eps over as float64
        y_N, up_N = y_N * root, up_N * root
    if SWIGLU:
        gate_N = y_N.to(kind).to(tl.float32)
        y_N = (gate_N / (1.0 + tl.exp(-gate_N))).to(kind).to(tl.float32) * up_N.to(kind).to(tl.float32)
    if RESIDUAL:
        y_N = y_N.to(kind).to(tl.float32) + tl.load(residual_ptr + n_N, n_N < N, 0.0).to(tl.float32)
    tl.store(out_ptr + n_N, y_N.to(kind), n_N < N)


@triton.jit
def _linear_step(
    x_ptr, weight_ptr, scale_ptr, norm_ptr, residual_ptr, out_ptr, eps,
    N: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, SCALED: tl.constexpr,
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
    x_D, squares_D = _input(x_ptr, norm_ptr, d_D, D, NORM)
    sum_ND = w_ND.to(tl.float32) * x_D[None, :]
    if SWIGLU:
        up_ND = u_ND.to(tl.float32) * x_D[None, :]
    for start in range(BD, D, BD):
        at_D = start + d_D
        in_D = at_D < D
        w_ND = _tile(weight_ptr, n_N, at_D, in_N[:, None] & in_D[None, :], D)
        if SWIGLU:
            u_ND = _tile(weight_ptr, n_N + N, at_D, in_N[:, None] & in_D[None, :], D)
        x_D, more_D = _input(x_ptr, norm_ptr, at_D, D, NORM)
        squares_D += more_D
        sum_ND += w_ND.to(tl.float32) * x_D[None, :]
        if SWIGLU:
            up_ND += u_ND.to(tl.float32) * x_D[None, :]
    y_N, up_N = tl.sum(sum_ND, 1), 0.0
    if SWIGLU:
        up_N = tl.sum(up_ND, 1)
    if SCALED:
        y_N *= tl.load(scale_ptr + n_N, in_N, 0.0)
        if SWIGLU:
            up_N *= tl.load(scale_ptr + N + n_N, in_N, 0.0)
    _store(y_N, up_N, tl.sum(squares_D, 0), residual_ptr, out_ptr, n_N, eps, N, D, NORM, SWIGLU, RESIDUAL)


@triton.jit
def _words(words_ptr, scale_ptr, n_N, g_G, N, G: tl.constexpr, J: tl.constexpr):
    """Words [BN,BG,J] of rows, and their groups' scales [BN,BG]; zeros beyond row N."""
    in_NG = (n_N < N)[:, None] & (g_G < G)[None, :]
    row_N1 = n_N.to(tl.int64)[:, None] * G
    words_NGJ = (row_N1 + g_G[None, :])[:, :, None] * J + tl.arange(0, J)[None, None, :]
    loaded_NGJ = tl.load(words_ptr + words_NGJ, in_NG[:, :, None], 0, eviction_policy="evict_first")
    scale_NG = tl.load(scale_ptr + row_N1 + g_G[None, :], in_NG, 0.0)
    return loaded_NGJ.to(tl.uint32, bitcast=True), scale_NG


@triton.jit
def _number(words, k: tl.constexpr):
    """Number k, from 0 to 3, of each word. Its bits, left in place, are the float32 number q 16^k 2^-149."""
    return (words & (15 * 16**k)).to(tl.float32, bitcast=True)


@triton.jit
def _product(words_NGJ, scale_NG, inputs, eight_G):
    """Sums over the columns [BN], of inputs as `_linear_step_4bit` scales them."""
    sum_NGJ = _number(words_NGJ, 0) * inputs[0][None, :, :]
    for k in tl.static_range(1, 8):
        if k == 4:
            words_NGJ >>= 16
        sum_NGJ += _number(words_NGJ, k % 4) * inputs[k][None, :, :]
    return tl.sum((tl.sum(sum_NGJ, 2) * 2.0**69 - eight_G[None, :]) * scale_NG.to(tl.float32), 1)


@triton.jit
def _linear_step_4bit(
    x_ptr, words_ptr, scale_ptr, norm_ptr, residual_ptr, out_ptr, eps,
    N: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BG: tl.constexpr, J: tl.constexpr,
    NORM: tl.constexpr, SWIGLU: tl.constexpr, RESIDUAL: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A program keeps the inputs, and takes BN rows in turn with the other programs; the next ones are under way."""
    SIZE: tl.constexpr = 8 * J
    G: tl.constexpr = (D + SIZE - 1) // SIZE
    H: tl.constexpr = 2 * N if SWIGLU else N
    n_N, g_G = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BG)
    if OVERLAP:
        n_N += start_followers()
    words_NGJ, scale_NG = _words(words_ptr, scale_ptr, n_N, g_G, N, G, J)
    if SWIGLU:
        up_NGJ, up_scale_NG = _words(words_ptr, scale_ptr, n_N + N, g_G, H, G, J)
    if OVERLAP:
        done = predecessor_done()
        x_ptr, residual_ptr = x_ptr + done, residual_ptr + done
    inputs = ()
    x_sum_GJ, squares_GJ = tl.zeros([BG, J], tl.float32), tl.zeros([BG, J], tl.float32)
    for k in tl.static_range(8):
        x_GJ, more_GJ = _input(x_ptr, norm_ptr, g_G[:, None] * SIZE + J * k + tl.arange(0, J)[None, :], D, NORM)
        x_sum_GJ, squares_GJ = x_sum_GJ + x_GJ, squares_GJ + more_GJ
        inputs = inputs + (x_GJ * 2.0 ** (80 - 4 * (k % 4)),)  # type: ignore[assignment]  # noqa: RUF005
    eight_G, squares = 8.0 * tl.sum(x_sum_GJ, 1), tl.sum(tl.sum(squares_GJ, 1), 0)
    for _ in range(tl.program_id(0), tl.cdiv(N, BN), tl.num_programs(0)):
        ahead_N = n_N + BN * tl.num_programs(0)
        next_NGJ, next_scale_NG = _words(words_ptr, scale_ptr, ahead_N, g_G, N, G, J)
        y_N, up_N = _product(words_NGJ, scale_NG, inputs, eight_G), 0.0
        if SWIGLU:
            next_up_NGJ, next_up_scale_NG = _words(words_ptr, scale_ptr, ahead_N + N, g_G, H, G, J)
            up_N = _product(up_NGJ, up_scale_NG, inputs, eight_G)
            up_NGJ, up_scale_NG = next_up_NGJ, next_up_scale_NG
        _store(y_N, up_N, squares, residual_ptr, out_ptr, n_N, eps, N, D, NORM, SWIGLU, RESIDUAL)
        n_N, words_NGJ, scale_NG = ahead_N, next_NGJ, next_scale_NG


@triton_op("liger::linear_step", mutates_args=())
def linear_step(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    norm_D: Tensor | None,
    eps: float,
    swiglu: bool,
    residual: Tensor | None,
) -> Tensor:
    """One row: x [1,...,D] -> [1,...,N] in x's dtype; with `swiglu` the weight is [2N,D], gate rows first.

    `weight` and `scale` are a matrix in x's dtype and None, or a `Packed` matrix.
    """
    width = x.shape[-1]
    rows = weight.shape[0] // 2 if swiglu else weight.shape[0]
    out = torch.empty((*x.shape[:-1], rows), dtype=x.dtype, device=x.device)
    bits = {torch.int8: 8, torch.int32: 4}.get(weight.dtype, 16)
    pointers = (weight, *(x if tensor is None else tensor for tensor in (scale, norm_D, residual)))
    rest = {"NORM": norm_D is not None, "SWIGLU": swiglu, "RESIDUAL": residual is not None, "OVERLAP": overlaps()}
    if bits == 4:
        block_g = triton.next_power_of_2(triton.cdiv(width, GROUP))
        block_n, warps, programs = tiling_4bit(block_g)
        grid = min(triton.cdiv(rows, block_n), programs * _multiprocessors(x))
        launcher(_linear_step_4bit, x)[(grid,)](
            x, *pointers, out, eps, N=rows, D=width, BN=block_n, BG=block_g, J=WORDS, **rest, num_warps=warps
        )
        return out
    block_n, block_d, warps = tiling(rows, width, swiglu, bits)
    launcher(_linear_step, x)[(triton.cdiv(rows, block_n),)](
        x, *pointers, out, eps, N=rows, D=width, BN=block_n, BD=block_d, SCALED=scale is not None, **rest,
        num_warps=warps,
    )  # fmt: skip
    return out


def _multiprocessors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


def tiling(rows: int, width: int, swiglu: bool, bits: int = 16) -> tuple[int, int, int]:
    """(rows of W a program takes, columns of one load, warps). Measured: `benchmarks/gpu_cuts.py`."""
    if bits == 8 and 2048 < width <= 4096:
        return 4, 4096, 4
    block_d = min(triton.next_power_of_2(width), 2048)
    # Few rows where a program takes two large tiles, or its share would be too large for all of the GPU to have one.
    few = (swiglu and bits == 16) or width > 2048 or rows * width <= 1 << 22
    return (2 if few else 4), block_d, (8 if width > 4096 else 4)


def tiling_4bit(block_g: int) -> tuple[int, int, int]:
    """(rows of W a program takes at once, warps, programs of a multiprocessor): 16 KB of a matrix under way on each.

    Measured at 4,096 and 14,336 columns: `benchmarks/gpu_cuts.py`.
    """
    warps = max(1, min(block_g // 16, 16))
    programs = min(2, 16 // warps)
    return max(1, min(1024 // (block_g * programs), 8)), warps, programs
