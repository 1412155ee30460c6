"""The linear recurrences, step form and chunked form side by side (arXiv 2503.01496, Eq. 7 and section 3.2).

    S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t        o_t = q_t S_t        (a token sees itself)

Shape legend: B batch, T time, G KV heads, R query heads per KV head, K key dim, V value dim, N chunks, C chunk,
S sub-chunk. The log-decay g is at most 0 and has C_gate channels: K (per channel) or 1 (scalar); both broadcast.
All arithmetic is float32 (or float64 when the inputs are), as the paper's code does.

The chunked form is stable for any gate: every exponent is a sum of log-decays between two positions, hence never
positive, and it is summed directly rather than taken as a difference of cumulative sums, which loses the small sums.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# q, k, v, log-decay, state -> output, state
Recurrence = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
CHUNK = 64
SUB_CHUNK = 16
MANY = 16  # chunks from which their states are found by doubling
FORGET = -100.0  # a log-decay that empties the state: its exponential is 4e-44


def gated_step(
    q_BGRK: Tensor, k_BGK: Tensor, v_BGV: Tensor, g_BGC: Tensor, state_BGKV: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: returns (out [B,G,R,V], new state [B,G,K,V])."""
    state_BGKV = state_BGKV * g_BGC.exp()[..., None] + k_BGK[..., None] * v_BGV[..., None, :]
    return q_BGRK @ state_BGKV, state_BGKV


def gated_chunked(
    q_BTGRK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, g_BTGC: Tensor, state_BGKV: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """T tokens at once: returns (out [B,T,G,R,V], state after them [B,G,K,V]).

    Equal to T `gated_step`s. Memory grows linearly in T. A token with g = 0 and k = 0 leaves the state untouched.
    """
    length = q_BTGRK.shape[1]
    size = min(chunk, _round_up(length, SUB_CHUNK))
    q_BGNRCK = _blocks(q_BTGRK, size).transpose(3, 4)
    k_BGNCK, v_BGNCV, g_BGNCC = (_blocks(x, size) for x in (k_BTGK, v_BTGV, g_BTGC))
    intra_BGNRCV, suffix_BGNCC = _intra(q_BGNRCK, k_BGNCK, v_BGNCV, g_BGNCC)
    writes_BGNKV = (k_BGNCK * suffix_BGNCC.exp()).mT @ v_BGNCV
    before_BGNKV, state_BGKV = _scan(g_BGNCC.sum(3).exp()[..., None], writes_BGNKV, state_BGKV)
    prefix_BGNCC = g_BGNCC.cumsum(3)
    inter_BGNRCV = (q_BGNRCK * prefix_BGNCC.exp()[:, :, :, None]) @ before_BGNKV[:, :, :, None]
    return _unblocks(intra_BGNRCV + inter_BGNRCV, length), state_BGKV


def _intra(q_BGNRCK: Tensor, k_BGNCK: Tensor, v_BGNCV: Tensor, g_BGNCC: Tensor) -> tuple[Tensor, Tensor]:
    """Reads of what the chunk itself wrote, and the log-decay from each token to the chunk's end.

    Row sub-chunk by row sub-chunk: earlier sub-chunks through two factors that meet at the sub-chunk's start (both
    exponents at most 0), the diagonal block through its explicit [S, S] decays.
    """
    outs: list[Tensor] = []
    suffix = g_BGNCC[:, :, :, :0]  # log-decay from each earlier token to the current sub-chunk's start
    for start in range(0, k_BGNCK.shape[3], SUB_CHUNK):
        rows = slice(start, start + SUB_CHUNK)
        q, k, v, g = q_BGNRCK[..., rows, :], k_BGNCK[..., rows, :], v_BGNCV[..., rows, :], g_BGNCC[..., rows, :]
        out = _diagonal(q, k, g) @ v[:, :, :, None]
        if start:
            near = q * g.cumsum(3).exp()[:, :, :, None]
            far = (k_BGNCK[..., :start, :] * suffix.exp()).mT
            out = out + (near @ far[:, :, :, None]) @ v_BGNCV[:, :, :, None, :start]
        outs.append(out)
        suffix = torch.cat([suffix + g.sum(3, keepdim=True), _exclusive_suffix(g)], 3)
    return torch.cat(outs, -2), suffix


def _diagonal(q_BGNRSK: Tensor, k_BGNSK: Tensor, g_BGNSC: Tensor) -> Tensor:
    """Causal scores inside one sub-chunk, [B,G,N,R,S,S]: sum_c q_ic k_jc exp(sum of g between j and i)."""
    decay_BGNSSC = (_between(g_BGNSC)).exp()
    if g_BGNSC.shape[-1] == 1:
        scores = (q_BGNRSK @ k_BGNSK.mT[:, :, :, None]) * decay_BGNSSC[..., 0][:, :, :, None]
    else:
        kd_BGNSSK = decay_BGNSSC * k_BGNSK[:, :, :, None]
        scores = (kd_BGNSSK @ q_BGNRSK.permute(0, 1, 2, 4, 5, 3)).permute(0, 1, 2, 5, 3, 4)
    return scores.tril()


def _between(g_BGNSC: Tensor) -> Tensor:
    """D[i, j] = sum of g_l for j < l <= i (0 where j >= i), as one product with a constant 0/1 mask."""
    size = g_BGNSC.shape[-2]
    i, j, step = (
        torch.arange(size, device=g_BGNSC.device).view(shape) for shape in ((-1, 1, 1), (1, -1, 1), (1, 1, -1))
    )
    mask_SSS = ((j < step) & (step <= i)).to(g_BGNSC.dtype)
    out: Tensor = (mask_SSS.view(size * size, size) @ g_BGNSC).unflatten(-2, (size, size))
    return out


def _exclusive_suffix(g_BGNSC: Tensor) -> Tensor:
    """Sum of the log-decays after each position, up to the sub-chunk's end."""
    size = g_BGNSC.shape[-2]
    upper_SS = torch.ones(size, size, dtype=g_BGNSC.dtype, device=g_BGNSC.device).triu(1)
    return upper_SS @ g_BGNSC


def _scan(decay_BGNC1: Tensor, writes_BGNKV: Tensor, state_BGKV: Tensor) -> tuple[Tensor, Tensor]:
    """The states before each chunk [B,G,N,K,V], and the one after the last."""
    if writes_BGNKV.shape[2] > MANY:
        return _scan_by_doubling(decay_BGNC1, writes_BGNKV, state_BGKV)
    before = []
    for n in range(writes_BGNKV.shape[2]):
        before.append(state_BGKV)
        state_BGKV = decay_BGNC1[:, :, n] * state_BGKV + writes_BGNKV[:, :, n]
    return torch.stack(before, 2), state_BGKV


def _scan_by_doubling(decay_BGNC1: Tensor, writes_BGNKV: Tensor, state_BGKV: Tensor) -> tuple[Tensor, Tensor]:
    """`_scan` in log2(N) passes over all chunks, instead of N small steps (Hillis and Steele, 1986)."""
    chunks, reach = writes_BGNKV.shape[2], 1
    after = torch.cat([state_BGKV[:, :, None], writes_BGNKV], 2)  # after chunk n - 1; the given state is chunk 0's
    decay = F.pad(decay_BGNC1, (0, 0, 0, 0, 1, 0))
    while reach <= chunks:
        earlier = after[:, :, :-reach]
        after = torch.cat([after[:, :, :reach], after[:, :, reach:] + decay[:, :, reach:] * earlier], 2)
        decay = torch.cat([decay[:, :, :reach], decay[:, :, reach:] * decay[:, :, :-reach]], 2)
        reach *= 2
    return after[:, :, :-1], after[:, :, -1]


def slot_step(
    q_BGRK: Tensor, k_BGK: Tensor, v_BGV: Tensor, g_BGM: Tensor, keys_BGKM: Tensor, values_BGMV: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One token of gated slot attention: (out [B,G,R,V], slots of keys, slots of values). Writes weigh 1 - alpha."""
    decay, write = g_BGM.exp(), 1 - g_BGM.exp()
    keys_BGKM = keys_BGKM * decay[:, :, None] + k_BGK[..., None] * write[:, :, None]
    values_BGMV = values_BGMV * decay[..., None] + write[..., None] * v_BGV[:, :, None]
    return (q_BGRK @ keys_BGKM).softmax(-1) @ values_BGMV, keys_BGKM, values_BGMV


def slot_scores(
    q_BTGRK: Tensor, k_BTGK: Tensor, s_BTGM: Tensor, g_BTGM: Tensor, keys_BGKM: Tensor, chunk: int = SUB_CHUNK
) -> tuple[Tensor, Tensor]:
    """First pass of gated slot attention over T tokens: q_t times the slots of keys at t, [B,T,G,R,M], and the slots
    after them. `gated_chunked` with the softmax of these as queries and s as keys is the second pass.

    As in `gated_chunked`, but the decay sits on the side that is read; `chunk` tokens take [chunk, chunk, M] memory.
    """
    length = q_BTGRK.shape[1]
    q_BGNRCK = _blocks(q_BTGRK, chunk).transpose(3, 4)
    k_BGNCK, s_BGNCM, g_BGNCM = (_blocks(x, chunk) for x in (k_BTGK, s_BTGM, g_BTGM))
    weights_BGNCCM = _between(g_BGNCM).exp() * s_BGNCM[:, :, :, None]
    products_BGNRCC = (q_BGNRCK @ k_BGNCK.mT[:, :, :, None]).tril()
    intra_BGNCRM = products_BGNRCC.transpose(3, 4) @ weights_BGNCCM
    writes_BGNKM = k_BGNCK.mT @ (s_BGNCM * _exclusive_suffix(g_BGNCM).exp())
    before_BGNKM, keys_BGKM = _scan(g_BGNCM.sum(3).exp()[..., None, :], writes_BGNKM, keys_BGKM)
    inter_BGNRCM = (q_BGNRCK @ before_BGNKM[:, :, :, None]) * g_BGNCM.cumsum(3).exp()[:, :, :, None]
    return _unblocks(intra_BGNCRM.transpose(3, 4) + inter_BGNRCM, length), keys_BGKM


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _blocks(x_BTG: Tensor, size: int) -> Tensor:
    """[B, T, G, ...] -> [B, G, N, C, ...], padded with zeros (which leave a state untouched)."""
    pad = -x_BTG.shape[1] % size
    if pad:
        x_BTG = F.pad(x_BTG, (0, 0) * (x_BTG.dim() - 2) + (0, pad))
    out: Tensor = x_BTG.unflatten(1, (-1, size)).permute(0, 3, 1, 2, *range(4, x_BTG.dim() + 1))
    return out


def _unblocks(out_BGNRCV: Tensor, length: int) -> Tensor:
    """[B, G, N, R, C, V] -> [B, T, G, R, V], padding dropped."""
    return out_BGNRCV.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)[:, :length]
