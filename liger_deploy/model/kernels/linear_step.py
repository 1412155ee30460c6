"""`liger::linear_step`: a linear layer for one token, with what stands around it in a transformer.

    x' = RMSNorm(x) where a norm is given            y = W x'
    out = silu(y_gate) * y_up where W holds a gate and an up half (SwiGLU), else y;  + residual where one is given

At one token a layer is a stream of its weights, in the model's dtype or packed in 8 or 4 bits (`packed.py`). One
program takes BN rows of W and all of their D columns; their loads are issued first, so that they are under way while
the norm is computed. Of a packed W it goes on to other rows, as its inputs cost as much as theirs, and asks for them
one turn ahead.

Shape legend: D input width, N output width; of a packed row G groups of J words, S numbers of a group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from liger_deploy.model.kernels import launcher, overlaps, predecessor_done, start_followers
from liger_deploy.model.packed import WORDS, bits_of


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
def _residual(residual_ptr, n_N, N, RESIDUAL: tl.constexpr):
    if RESIDUAL:
        return tl.load(residual_ptr + n_N, n_N < N, 0.0).to(tl.float32)
    else:
        return 0.0


@triton.jit
def _store(
    y_N, up_N, squares, residual_N, out_ptr, n_N, eps,
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
        y_N = y_N.to(kind).to(tl.float32) + residual_N
    tl.store(out_ptr + n_N, y_N.to(kind), n_N < N)


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
    residual_N = _residual(residual_ptr, n_N, N, RESIDUAL)
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
    _store(y_N, up_N, tl.sum(squares_D, 0), residual_N, out_ptr, n_N, eps, N, D, NORM, SWIGLU, RESIDUAL)


@triton.jit
def _words(
    words_ptr, scale_ptr, n_N, g_G, zero, N, W: tl.constexpr, G: tl.constexpr, J: tl.constexpr, BITS: tl.constexpr
):
    """Words [BN,BG,J] of rows, W each, and their scales: [BN,BG] in 4 bits, [BN] in 8; zeros beyond row N.

    With `zero`, of which the compiler knows nothing, it loads the scales one by one, as the sums they go with lie.
    """
    in_N, at_GJ = n_N < N, g_G[:, None] * J + tl.arange(0, J)[None, :]
    at_NGJ = n_N.to(tl.int64)[:, None, None] * W + at_GJ[None, :, :]
    in_NGJ = in_N[:, None, None] & (at_GJ < W)[None, :, :]
    words_NGJ = tl.load(words_ptr + at_NGJ, in_NGJ, 0, eviction_policy="evict_first").to(tl.uint32, bitcast=True)
    if BITS == 4:
        scale_ptr += n_N.to(tl.int64)[:, None] * G + (g_G + zero)[None, :]
        scale = tl.load(scale_ptr, in_N[:, None] & (g_G < G)[None, :], 0.0)
    else:
        scale = tl.load(scale_ptr + n_N, in_N, 0.0)
    return words_NGJ, scale


@triton.jit
def _by_number(x_GS, G: tl.constexpr, J: tl.constexpr, COUNT: tl.constexpr):
    """[G,J] for each of the COUNT, 4 or 8, numbers of a word."""
    even, odd = tl.split(tl.reshape(x_GS, [G, J * COUNT // 2, 2]))
    x0, x2 = tl.split(tl.reshape(even, [G, J * COUNT // 4, 2]))
    x1, x3 = tl.split(tl.reshape(odd, [G, J * COUNT // 4, 2]))
    if COUNT == 4:
        return x0, x1, x2, x3
    else:
        x0, x4 = tl.split(tl.reshape(x0, [G, J, 2]))
        x1, x5 = tl.split(tl.reshape(x1, [G, J, 2]))
        x2, x6 = tl.split(tl.reshape(x2, [G, J, 2]))
        x3, x7 = tl.split(tl.reshape(x3, [G, J, 2]))
        return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _of_words(ptr, at_GJ, COUNT: tl.constexpr):
    """The COUNT 16-bit values from each place on, float32 [G,J] each: what goes with the words of a row.

    A thread loads the values of its own words. `tl.load` would share them out among threads in a way of its own, and
    each number then goes through shared memory and two barriers (`_by_number`): a microsecond.
    """
    address_GJ, values = (ptr + at_GJ).to(tl.int64, bitcast=True), ()
    if COUNT == 8:
        four: tl.constexpr = "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];"
        kinds: tl.constexpr = (tl.int32, tl.int32, tl.int32, tl.int32)
        pairs = tl.inline_asm_elementwise(four, "=r,=r,=r,=r,l", [address_GJ], dtype=kinds, is_pure=True, pack=1)
    else:
        two: tl.constexpr = "ld.global.v2.b32 {$0, $1}, [$2];"
        pairs = tl.inline_asm_elementwise(two, "=r,=r,l", [address_GJ], (tl.int32, tl.int32), is_pure=True, pack=1)
    for i in tl.static_range(COUNT // 2):
        for half in tl.static_range(2):
            value = (pairs[i] >> (16 * half)).to(tl.int16).to(ptr.dtype.element_ty, bitcast=True)
            values = values + (value.to(tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    return values


@triton.jit
def _ask(ptr, row, rows, BYTES: tl.constexpr):
    """Have the second-level cache load so many rows of so many bytes, where there are any; one thread asks.

    Returns 0, to be added to what must not be dropped.
    """
    text: tl.constexpr = """{
        .reg .pred asks;
        .reg .u32 thread;
        mov.u32 thread, %tid.x;
        setp.eq.u32 asks, thread, 0;
        setp.gt.and.s32 asks, $2, 0, asks;
        @asks cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, 0;
    }"""
    address = (ptr.to(tl.int64, bitcast=True) + row.to(tl.int64) * BYTES) & -16
    size = (rows * BYTES + 15) // 16 * 16
    return tl.inline_asm_elementwise(text, "=r,l,r", [address, size], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _ask_tile(
    words_ptr, scale_ptr, n, N,
    BN: tl.constexpr, W: tl.constexpr, G: tl.constexpr, BITS: tl.constexpr, SWIGLU: tl.constexpr,
):  # fmt: skip
    """`_ask` for words and scales of rows n to n + BN - 1 of N, and of the N up rows after them."""
    rows, asked = tl.minimum(N - n, BN), 0
    for half in tl.static_range(2 if SWIGLU else 1):
        asked += _ask(words_ptr, n + half * N, rows, 4 * W)
        if BITS == 4:
            asked += _ask(scale_ptr, n + half * N, rows, G * scale_ptr.dtype.element_ty.primitive_bitwidth // 8)
    return asked


@triton.jit
def _sums(words_NGJ, scale, inputs, offset_GJ, BITS: tl.constexpr):
    """Each group's part of a row's product [BN,BG] over 2**69, of inputs as `_linear_step_packed` scales them.

    A number's bits, left in place in the lower half of a word, are a float32 that need not be converted: q 2^(p - 149),
    p the place of its lowest bit.
    """
    COUNT: tl.constexpr = 32 // BITS
    sum_NGJ = -offset_GJ[None, :, :]
    for k in tl.static_range(COUNT):
        if 2 * k == COUNT:
            words_NGJ >>= 16
        number_NGJ = words_NGJ & ((2**BITS - 1) * 2 ** (k * BITS % 16))
        sum_NGJ = sum_NGJ + number_NGJ.to(tl.float32, bitcast=True) * inputs[k][None, :, :]
    if BITS == 4:
        return tl.sum(sum_NGJ, 2) * scale.to(tl.float32)
    else:
        return tl.sum(sum_NGJ, 2) * scale[:, None]


@triton.jit
def _linear_step_packed(
    x_ptr, words_ptr, scale_ptr, norm_ptr, residual_ptr, out_ptr, eps,
    N: tl.constexpr, D: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr,
    BN: tl.constexpr, BG: tl.constexpr, J: tl.constexpr,
    NORM: tl.constexpr, SWIGLU: tl.constexpr, RESIDUAL: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A program keeps the inputs, and takes BN rows in turn with the other programs; the next ones are under way."""
    COUNT: tl.constexpr = 32 // BITS
    S: tl.constexpr = COUNT * J
    G: tl.constexpr = (W + J - 1) // J
    H: tl.constexpr = 2 * N if SWIGLU else N
    SIXTEEN: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth == 16 and norm_ptr.dtype == x_ptr.dtype
    OWN: tl.constexpr = OVERLAP and SIXTEEN and D == G * S
    first, stride, g_G, zero = tl.program_id(0) * BN, tl.num_programs(0) * BN, tl.arange(0, BG), 0
    if OVERLAP:
        zero = start_followers()
        first += zero
    n_N = first + tl.arange(0, BN)
    words_NGJ, scale = _words(words_ptr, scale_ptr, n_N, g_G, zero, N, W, G, J, BITS)
    if SWIGLU:
        up_NGJ, up_scale = _words(words_ptr, scale_ptr, n_N + N, g_G, zero, H, W, G, J, BITS)
    if OVERLAP:
        first += _ask_tile(words_ptr, scale_ptr, first + stride, N, BN, W, G, BITS, SWIGLU)
    if OWN:
        at_GJ = tl.minimum(g_G, G - 1)[:, None] * S + COUNT * tl.arange(0, J)[None, :]
        if NORM:
            norms = _of_words(norm_ptr, at_GJ, COUNT)
    if OVERLAP:
        done = predecessor_done()
        x_ptr, residual_ptr = x_ptr + done, residual_ptr + done
    if OWN:
        values, by_number, squares_GJ = _of_words(x_ptr, at_GJ, COUNT), (), tl.zeros([BG, J], tl.float32)
        for k in tl.static_range(COUNT):
            x_GJ = tl.where((g_G < G)[:, None], values[k], 0.0)
            if NORM:
                squares_GJ += x_GJ * x_GJ
                x_GJ *= norms[k]
            by_number = by_number + (x_GJ,)  # type: ignore[assignment]  # noqa: RUF005
        # Words times zero: the compiler lays the sum out as the words, or it would load the inputs a second time.
        squares_NGJ = squares_GJ[None, :, :] + (words_NGJ & 1).to(tl.float32) * 0.0
        squares = tl.sum(tl.sum(squares_NGJ, 2), 1)
    else:
        x_GS, squares_GS = _input(x_ptr, norm_ptr, g_G[:, None] * S + tl.arange(0, S)[None, :], D, NORM)
        squares, by_number = tl.sum(squares_GS), _by_number(x_GS, BG, J, COUNT)
    inputs, offset_GJ = (), tl.zeros([BG, J], tl.float32)
    for k in tl.static_range(COUNT):
        offset_GJ += by_number[k] * 2.0 ** (BITS - 70)  # half of the numbers' range
        inputs = inputs + (by_number[k] * 2.0 ** (80 - k * BITS % 16),)  # type: ignore[assignment]  # noqa: RUF005
    for n in range(first, N, stride):
        ahead = n + stride
        if OVERLAP:
            ahead += _ask_tile(words_ptr, scale_ptr, ahead + stride, N, BN, W, G, BITS, SWIGLU)
        n_N, ahead_N = n + tl.arange(0, BN), ahead + tl.arange(0, BN)
        residual_N = _residual(residual_ptr, n_N, N, RESIDUAL)
        next_NGJ, next_scale = _words(words_ptr, scale_ptr, ahead_N, g_G, zero, N, W, G, J, BITS)
        if SWIGLU:
            next_up_NGJ, next_up_scale = _words(words_ptr, scale_ptr, ahead_N + N, g_G, zero, H, W, G, J, BITS)
        sum_NG = _sums(words_NGJ, scale, inputs, offset_GJ, BITS)
        if SWIGLU:
            both_NG2 = tl.join(sum_NG, _sums(up_NGJ, up_scale, inputs, offset_GJ, BITS))
            y_N, up_N = tl.split(tl.sum(both_NG2, 1) * 2.0**69)  # one way through shared memory for both
            up_NGJ, up_scale = next_up_NGJ, next_up_scale
        else:
            y_N, up_N = tl.sum(sum_NG, 1) * 2.0**69, 0.0
        _store(y_N, up_N, squares, residual_N, out_ptr, n_N, eps, N, D, NORM, SWIGLU, RESIDUAL)
        words_NGJ, scale = next_NGJ, next_scale


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

    `weight` and `scale` are a matrix in x's dtype and None, or a `Packed` matrix's words and scales.
    """
    width = x.shape[-1]
    rows = weight.shape[0] // 2 if swiglu else weight.shape[0]
    out = torch.empty((*x.shape[:-1], rows), dtype=x.dtype, device=x.device)
    others = (x if tensor is None else tensor for tensor in (norm_D, residual))
    rest = {"NORM": norm_D is not None, "SWIGLU": swiglu, "RESIDUAL": residual is not None, "OVERLAP": overlaps()}
    if scale is not None:
        bits, words = bits_of(weight, scale), weight.shape[1]
        tile = packed_tiling(words, swiglu, bits)
        grid = min(triton.cdiv(rows, tile.rows), tile.programs * _multiprocessors(x))
        launcher(_linear_step_packed, x)[(grid,)](
            x, weight, scale, *others, out, eps, N=rows, D=width, W=words, BITS=bits, BN=tile.rows,
            BG=triton.next_power_of_2(triton.cdiv(words, WORDS)), J=WORDS, **rest, num_warps=tile.warps,
        )  # fmt: skip
        return out
    block_n, block_d, warps = tiling(rows, width, swiglu)
    launcher(_linear_step, x)[(triton.cdiv(rows, block_n),)](
        x, weight, *others, out, eps, N=rows, D=width, BN=block_n, BD=block_d, **rest, num_warps=warps
    )
    return out


def _multiprocessors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


def tiling(rows: int, width: int, swiglu: bool) -> tuple[int, int, int]:
    """(rows of W a program takes, columns of one load, warps). Measured: `benchmarks/gpu_cuts.py`."""
    # Few rows where a program takes two large tiles, or its share would be too large for all of the GPU to have one.
    few = swiglu or width > 2048 or rows * width <= 1 << 22
    return (2 if few else 4), min(triton.next_power_of_2(width), 2048), (8 if width > 4096 else 4)


class PackedTiling(NamedTuple):
    """Rows of W that a program takes at once, its warps, and programs of a multiprocessor."""

    rows: int
    warps: int
    programs: int


# By bits, words of a row and SwiGLU; the layers of a 1B and an 8B model, measured: `benchmarks/gpu_cuts.py`.
_PACKED_TILINGS = {
    (4, 256, False): PackedTiling(4, 4, 2),
    (4, 256, True): PackedTiling(4, 4, 3),
    (4, 512, True): PackedTiling(2, 4, 3),
    (8, 512, False): PackedTiling(4, 4, 2),
    (8, 512, True): PackedTiling(2, 4, 5),
    (8, 1024, False): PackedTiling(2, 8, 3),
    (8, 2048, False): PackedTiling(1, 8, 4),
    (8, 4096, False): PackedTiling(1, 16, 2),
}


def packed_tiling(words: int, swiglu: bool, bits: int) -> PackedTiling:
    """For rows of so many words: as measured, else 8 words a thread and 16 warps a multiprocessor."""
    words = triton.next_power_of_2(words)
    warps = 4 if words <= 512 else 8 if words <= 2048 else 16
    rule = PackedTiling(min(max(1, 8 * 32 * warps // words), 8), warps, 16 // warps)
    return _PACKED_TILINGS.get((bits, words, swiglu), rule)
