"""The model written for delegates: the same function in operators that XNNPACK takes whole.

No comparison, gather, where, expand, split or mean, and three-dimensional products only: each of them would cut the
layer stack into pieces. Masks are arithmetic on `length` and `valid`, made once for all layers. Sums of log-decays are
products with constant triangles, and T tokens are one block with explicit decays [T, T, C] (`recurrence.py` says why
differences of cumulative sums are not used), so T should be small: 64 at most. Means are products with a constant row.

Shape legend: B batch, T time, G KV heads, R query heads per KV head, K key dim, V value dim (= K), W window, S = W + T,
C gate channels (K, or 1), N = B * G, X = R * T.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from liger_deploy.export.executorch_ops import fused
from liger_deploy.model import window
from liger_deploy.model.attention import LigerAttention
from liger_deploy.model.lolcats import Lolcats
from liger_deploy.model.mixer import Heads, LayerState, Mixer
from liger_deploy.model.ops import has_one_node
from liger_deploy.model.step import PrefillModel, StepModel
from liger_deploy.model.window import Rope

LARGE = 1e30  # taken from a hidden score
SELECTED = 512  # widest window whose last entries are taken by a product with a one-hot matrix


class Delegated(nn.Module):
    """A `StepModel` or `PrefillModel` whose layers run, and are traced, in this form, for exactly `tokens` tokens.

    Layers that have no such form (GSA, LoLCATs, attention sinks) keep their own. `core_ml`: that compiler
    fails on a mean as a product with a constant row, and on a gather by a computed index. `operator`: layers with a
    recurrence are this project's operator.
    """

    def __init__(
        self, program: StepModel | PrefillModel, tokens: int, core_ml: bool = False, operator: bool = False
    ) -> None:
        super().__init__()
        self.program = program
        self.constants = Constants()
        self._sums = _sums(self.constants, tokens)
        layers = [x for x in program.modules() if isinstance(x, LigerAttention) and has_one_node(x.liger)]
        self._layers = [
            (x, None if operator and x.liger.row.width != "none" else _layer_constants(self.constants, x, tokens))
            for x in layers
        ]
        weights = [x for x in program.parameters() if x.dim() == 1]
        widths = {x.numel() for x in weights} | {x.head_dim for x in layers} if not core_ml else set()
        dtypes = {torch.float32, *(x.dtype for x in weights)}
        rows = {(width, dtype): torch.full((1, width), 1 / width, dtype=dtype) for width in widths for dtype in dtypes}
        self._places = self.constants.add(torch.arange(float(tokens))) if core_ml else ""
        self._means = {key: self.constants.add(row) for key, row in rows.items()}

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """As the program's."""
        read, masks = self.constants.read, Masks()
        before = [layer.after_state for layer, _ in self._layers]
        sums = Sums(*map(read, self._sums))
        for layer, names in self._layers:
            layer.after_state = _Form(masks, sums, LayerConstants(*map(read, names))) if names else _Fused(masks)
        try:
            places = read(self._places) if self._places else None
            with _Replaced({key: read(name) for key, name in self._means.items()}, places):
                out: tuple[Tensor, ...] = self.program(*inputs)
        finally:
            for (layer, _), after_state in zip(self._layers, before, strict=True):
                layer.after_state = after_state
        return out


class Constants(nn.Module):
    """Tensors as buffers, equal ones once: a delegate packs buffers, and takes what a trace makes as an input."""

    def add(self, tensor: Tensor) -> str:
        """Keep a tensor; returns its name."""
        for name, other in self.named_buffers():
            if other.shape == tensor.shape and other.dtype == tensor.dtype and torch.equal(other, tensor):
                return name
        name = f"constant_{len(self._buffers)}"
        self.register_buffer(name, tensor.contiguous())
        return name

    def read(self, name: str) -> Tensor:
        """The tensor of this name."""
        tensor: Tensor = getattr(self, name)
        return tensor


class Sums(NamedTuple):
    """Rows of 0 and 1 that pick which of T log-decays are summed.

    up_to [T,T]: those up to a token; after [T,T]: those after it; every [1,T]: all; between [T*T,T]: row (t, s) those
    after s up to t.
    """

    up_to: Tensor
    after: Tensor
    every: Tensor
    between: Tensor


class LayerConstants(NamedTuple):
    """What a layer's window needs: RoPE of its T queries and S keys, the band [T,S] that each query sees, the distance
    of each key's place from each kept one's, [W,S], and the number of tokens after which a key's place is filled, [S].
    """

    query_cos: Tensor
    query_sin: Tensor
    key_cos: Tensor
    key_sin: Tensor
    band: Tensor
    place: Tensor
    due: Tensor
    tokens: Tensor


def _sums(constants: Constants, tokens: int) -> list[str]:
    ones = torch.ones(tokens, tokens)
    t, s, step = (torch.arange(tokens).view(shape) for shape in ((-1, 1, 1), (1, -1, 1), (1, 1, -1)))
    between_TTT = ((s < step) & (step <= t)).float()
    return [constants.add(x) for x in (ones.tril(), ones.triu(1), ones[:1], between_TTT.flatten(0, 1))]


def _layer_constants(constants: Constants, layer: LigerAttention, tokens: int) -> list[str]:
    width, dtype = layer.liger.window, next(layer.parameters()).dtype
    total = width + tokens
    queries, keys = slice(width, total), slice(0, total)
    ropes = [table[place].to(dtype) for place in (queries, keys) for table in (layer.rope_cos, layer.rope_sin)]
    t, s, w = torch.arange(tokens)[:, None], torch.arange(total), torch.arange(width)[:, None]
    band_TS = ((t < s) & (s <= t + width)).float()
    rest = (band_TS, (s - w).float(), (s - width + 1).float(), torch.arange(float(tokens)))
    return [constants.add(x) for x in (*ropes, *rest)]


class Masks:
    """What all layers of one forward share, made by the first that asks; keyed by the window's width."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, int], Tensor] = {}

    def once(self, name: str, width: int, make: Callable[[], Tensor]) -> Tensor:
        """The mask of this name and width."""
        if (name, width) not in self._made:
            self._made[name, width] = make()
        return self._made[name, width]


class _Fused:
    """`Mixer.after_state` of one layer as this project's operator."""

    def __init__(self, masks: Masks) -> None:
        self._masks = masks

    def __call__(
        self,
        mixer: Mixer,
        heads: Heads,
        rope: Rope,
        layer: LayerState,
        length: Tensor,
        valid: Tensor | None = None,
        lolcats: Lolcats | None = None,
    ) -> tuple[Tensor, LayerState]:
        """See `Mixer.after_state`."""
        assert lolcats is None
        if valid is None:
            valid = self._masks.once("all", 0, lambda: torch.ones_like(length))
        return fused(mixer, heads, rope, layer, length, valid)


class _Form:
    """`Mixer.after_state` of one layer that `has_one_node`."""

    def __init__(self, masks: Masks, sums: Sums, constants: LayerConstants) -> None:
        self._masks = masks
        self._sums = sums
        self._constants = constants

    def __call__(
        self,
        mixer: Mixer,
        heads: Heads,
        rope: Rope,
        layer: LayerState,
        length: Tensor,
        valid: Tensor | None = None,
        lolcats: Lolcats | None = None,
    ) -> tuple[Tensor, LayerState]:
        """See `Mixer.after_state`."""
        assert lolcats is None
        config = mixer.liger
        keys, values = (
            torch.cat([old, new.transpose(1, 2)], 2)
            for old, new in ((layer.window_k, heads.k), (layer.window_v, heads.v))
        )
        hidden = self._masks.once("hidden", config.window, lambda: self._hidden(length))
        near = _window(heads.q, keys, values, hidden, self._constants, mixer.scaling)
        kept = [self._keep_last(x, valid, config.window) for x in (keys, values)]
        if config.row.width == "none":
            return config.window_weight * near, LayerState((), *kept)
        far, state = _recurrent(mixer, heads, self._keep(valid), layer.recurrent[0], self._sums)
        out = config.recurrent_weight * far + config.window_weight * near.to(far.dtype)
        return out, LayerState((state,), *kept)

    def _hidden(self, length_B: Tensor) -> Tensor:
        """[B, 1, 1, T, S]: 0 for a key that is seen, -LARGE for one that is not. A float32 `length` is exact to 2^24,
        and beyond it is large enough."""
        filled_BS = (length_B.float()[:, None] + self._constants.due).clamp(0, 1)
        return ((self._constants.band * filled_BS[:, None] - 1) * LARGE)[:, None, None]

    def _keep(self, valid_B: Tensor | None) -> Tensor | None:
        """[B, T, 1, 1]: 1 for a real token, 0 for the rest; None when all are real."""
        if valid_B is None:
            return None
        keep = self._masks.once("keep", 0, lambda: (valid_B.float()[:, None] - self._constants.tokens).clamp(0, 1))
        return keep[:, :, None, None]

    def _keep_last(self, kept_BGSK: Tensor, valid_B: Tensor | None, width: int) -> Tensor:
        """`window.keep_last` as a product with a one-hot [B, W, S]; exact, since the rest is times zero."""
        if valid_B is None or width > SELECTED:
            return window.keep_last(kept_BGSK, valid_B, width)
        last_BWS = self._masks.once("last", width, lambda: self._last(valid_B))
        batch, groups, length, dim = kept_BGSK.shape
        flat_BSX = kept_BGSK.permute(0, 2, 1, 3).reshape(batch, length, groups * dim)
        out_BWX = torch.bmm(last_BWS.to(flat_BSX.dtype), flat_BSX)
        return out_BWX.view(batch, width, groups, dim).permute(0, 2, 1, 3)

    def _last(self, valid_B: Tensor) -> Tensor:
        return 1 - (self._constants.place - valid_B.float()[:, None, None]).abs().clamp(max=1)


def _window(
    q_BTGRK: Tensor, k_BGSK: Tensor, v_BGSV: Tensor, hidden: Tensor, constants: LayerConstants, scale: float
) -> Tensor:
    """`window.attend` without sinks: [B,T,G,R,V]."""
    batch, tokens, groups, queries, _ = q_BTGRK.shape
    length = k_BGSK.shape[2]
    q_BGRTK = _turn(q_BTGRK.permute(0, 2, 3, 1, 4), constants.query_cos, constants.query_sin)
    k_BGSK = _turn(k_BGSK, constants.key_cos, constants.key_sin)
    k_NSK, v_NSV = k_BGSK.flatten(0, 1), v_BGSV.flatten(0, 1)
    scores_NXS = torch.bmm(q_BGRTK.reshape(batch * groups, queries * tokens, -1), k_NSK.transpose(1, 2)).float()
    scores = scores_NXS.view(batch, groups, queries, tokens, length) * scale + hidden
    weights_NXS = scores.softmax(-1).view(batch * groups, queries * tokens, length)
    out_NXV = torch.bmm(weights_NXS.to(v_NSV.dtype), v_NSV)
    return _split(out_NXV, batch, groups, queries, tokens)


def _turn(x_SK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`window.rotate` by slices and sums alone."""
    half, width = cos.shape[-1] // 2, cos.shape[-1]
    if not width:
        return x_SK
    a, b = x_SK[..., :half], x_SK[..., half:width]
    parts = [a * cos[:, :half] - b * sin[:, :half], b * cos[:, half:] + a * sin[:, half:]]
    return torch.cat([*parts, x_SK[..., width:]] if width < x_SK.shape[-1] else parts, -1)


def _recurrent(
    mixer: Mixer, heads: Heads, keep_BT11: Tensor | None, state_BGKV: Tensor, sums: Sums
) -> tuple[Tensor, Tensor]:
    """`Mixer._recurrent` over one block of T tokens: out [B,T,G,R,V] and the next state."""
    batch, tokens, groups, queries, _ = heads.q.shape
    g_BTGC = mixer.gate(heads.gate_key)
    write_BTGK = 1 - g_BTGC.exp() if mixer.liger.row.key_from_gate else mixer.feature_map(heads.k)
    if keep_BT11 is not None:
        g_BTGC, write_BTGK = g_BTGC * keep_BT11, write_BTGK * keep_BT11
    q_NRTK = mixer.feature_map(heads.q).permute(0, 2, 3, 1, 4).flatten(0, 1)
    k_NKT, g_NCT = (x.permute(0, 2, 3, 1).flatten(0, 1) for x in (write_BTGK, g_BTGC))
    v_NTV, state_NKV = heads.v.float().transpose(1, 2).flatten(0, 1), state_BGKV.flatten(0, 1)
    if tokens == 1:
        state_NKV = state_NKV * g_NCT.exp() + k_NKT * v_NTV
        out_NXV = torch.bmm(q_NRTK.flatten(1, 2), state_NKV)
    else:
        up_to_NCT, after_NCT, all_NC1 = (F.linear(g_NCT, x) for x in (sums.up_to, sums.after, sums.every))
        read_NRTK = q_NRTK * up_to_NCT.exp().transpose(1, 2)[:, None]
        out_NXV = torch.bmm(_scores(q_NRTK, k_NKT, g_NCT, sums), v_NTV)
        out_NXV = out_NXV + torch.bmm(read_NRTK.flatten(1, 2), state_NKV)
        state_NKV = state_NKV * all_NC1.exp() + torch.bmm(k_NKT * after_NCT.exp(), v_NTV)
    return _split(out_NXV, batch, groups, queries, tokens), state_NKV.view(state_BGKV.shape)


def _scores(q_NRTK: Tensor, k_NKT: Tensor, g_NCT: Tensor, sums: Sums) -> Tensor:
    """Causal scores of a block, [N, X, S = T]: sum_c q_tc k_sc exp(sum of g between s and t)."""
    rows, queries, tokens, dim = q_NRTK.shape
    between_NCX = F.linear(g_NCT, sums.between)
    if g_NCT.shape[1] == 1:
        decay_N1TS = between_NCX.view(rows, 1, tokens, tokens).exp() * sums.up_to
        products_NXS = torch.bmm(q_NRTK.flatten(1, 2), k_NKT)
        return (products_NXS.view(rows, queries, tokens, tokens) * decay_N1TS).flatten(1, 2)
    decay_NTSK = between_NCX.transpose(1, 2).reshape(rows, tokens, tokens, dim).exp()
    keys_YSK = (decay_NTSK * k_NKT.transpose(1, 2)[:, None]).flatten(0, 1)  # Y = N * T
    q_YKR = q_NRTK.permute(0, 2, 3, 1).reshape(rows * tokens, dim, queries)
    scores_NTSR = torch.bmm(keys_YSK, q_YKR).view(rows, tokens, tokens, queries)
    return (scores_NTSR.permute(0, 3, 1, 2) * sums.up_to).flatten(1, 2)


def _split(out_NXV: Tensor, batch: int, groups: int, queries: int, tokens: int) -> Tensor:
    """[N, R * T, V] -> [B, T, G, R, V]."""
    return out_NXV.view(batch, groups, queries, tokens, -1).permute(0, 3, 1, 2, 4)


class _Replaced(TorchFunctionMode):
    """Functions in other words: the mean over the last dimension (every RMSNorm's) as a product with a constant row,
    GELU's tanh form written out, which XNNPACK would silently compute as the erf form, wrong by 5e-4, and, given the
    tokens' `places`, the gather of one token as a product with a one-hot row."""

    def __init__(self, rows: dict[tuple[int, torch.dtype], Tensor], places_T: Tensor | None) -> None:
        super().__init__()
        self._rows, self._places_T = rows, places_T

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.mean and args[1:] == (-1,) and kwargs == {"keepdim": True}:
            row = self._rows.get((args[0].shape[-1], args[0].dtype))
            if row is not None:
                return F.linear(args[0], row)
        if func is torch.Tensor.gather and self._places_T is not None and args[1] == 1:
            hidden_BTD, _, index_B1D = args
            only_B1T = 1 - (self._places_T - index_B1D[:, :, :1].float()).abs().clamp(max=1)
            return torch.bmm(only_B1T.to(hidden_BTD.dtype), hidden_BTD)
        if func is F.gelu and kwargs.get("approximate") == "tanh":
            x = args[0]
            return 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)).tanh())
        return func(*args, **kwargs)
