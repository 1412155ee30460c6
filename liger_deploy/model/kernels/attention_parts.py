"""What the attention kernels share: gates, feature map, products, RoPE; and how their tiles are sized.

Shape legend: R query heads, C channels of a key, X keys or queries, H channels of a half of the rotary ones.
"""

from __future__ import annotations

import triton
import triton.language as tl

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
def _gate_and_key(
    p_C, k_C, in_C, head, normalizer, lower_bound, K: tl.constexpr, GATE: tl.constexpr, SCALAR: tl.constexpr,
    SOFTMAX: tl.constexpr, KEY_FROM_GATE: tl.constexpr,
):  # fmt: skip
    """One token's gate, and the key that it is written with, 0 beyond K; float32, of float32.

    Sums over one row: each channel's gate is then computed once, and not by every thread that needs it.
    """
    if SCALAR:
        p_C = tl.sum(p_C, 0) / K + p_C * 0.0
    alpha_C = tl.sum(tl.exp(_log_decay(p_C[None, :], head, normalizer, lower_bound, GATE)), 0)
    if KEY_FROM_GATE:
        write_C = 1.0 - alpha_C
    else:
        write_C = tl.sum(_phi(k_C[None, :], in_C[None, :], SOFTMAX), 0)
    return alpha_C, tl.where(in_C, write_C, 0.0)


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
def _save(at, value, inside, WHOLE: tl.constexpr):
    """`_load`'s counterpart, rounded to what the tensor holds."""
    if WHOLE:
        tl.store(at, value.to(at.dtype.element_ty))
    else:
        tl.store(at, value.to(at.dtype.element_ty), inside)


@triton.jit
def _floats(normalizer, lower_bound, recurrent_weight, window_weight, scale):
    """An op's numbers in float32: Inductor hands them over as float64."""
    normalizer, lower_bound = tl.cast(normalizer, tl.float32), tl.cast(lower_bound, tl.float32)
    recurrent_weight, window_weight = tl.cast(recurrent_weight, tl.float32), tl.cast(window_weight, tl.float32)
    return normalizer, lower_bound, recurrent_weight, window_weight, tl.cast(scale, tl.float32)


@triton.jit
def _turned_alike(cos_1, sin_1, c_C, ROTARY: tl.constexpr):
    """What RoPE makes of each channel's product where key and query are turned alike: 1, or the square of YaRN's."""
    factor_C = tl.where(c_C < ROTARY, 0.0, 1.0)
    if ROTARY > 0:
        cos_C, sin_C = tl.load(cos_1 + c_C, c_C < ROTARY, 0.0), tl.load(sin_1 + c_C, c_C < ROTARY, 0.0)
        factor_C += cos_C * cos_C + sin_C * sin_C
    return factor_C


@triton.jit
def _turned(row_X1, cos_X1, sin_X1, h_H, ROTARY: tl.constexpr, BH: tl.constexpr):
    """Rows of keys or queries after RoPE, each half of their rotary channels: [X,H] twice, float32."""
    half: tl.constexpr = ROTARY // 2
    WHOLE: tl.constexpr = half % BH == 0
    in_XH, h_XH = (h_H < half)[None, :], h_H[None, :]
    a_XH, b_XH = _load(row_X1 + h_XH, in_XH, WHOLE), _load(row_X1 + half + h_XH, in_XH, WHOLE)
    cos_XH, sin_XH = _load(cos_X1 + h_XH, in_XH, WHOLE), _load(sin_X1 + h_XH, in_XH, WHOLE)
    a_XH, b_XH = a_XH.to(tl.float32), b_XH.to(tl.float32)
    return a_XH * cos_XH - b_XH * sin_XH, b_XH * cos_XH + a_XH * sin_XH


def _block(size: int) -> int:
    """Tiles are powers of two, and the matrix units take no side below 16."""
    return int(max(16, triton.next_power_of_2(max(size, 1))))
