"""The gate table of the Liger paper (arXiv 2503.01496, Table 1): one row a structure.

A row says how the gate logit p, pooled from the key projection, becomes the log of the retention alpha (always
log alpha <= 0), and which recurrence carries it. Written with tensor methods alone, so that reading the table needs
no torch: `config.py` and `state.py` read it where torch is not installed.

Shapes: p and the log-decay are [B, T, G, C]; B batch, T time, G KV heads, C gate channels (K key channels, 1 for a
scalar gate, M slots).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from liger_deploy.config import LigerConfig

GateWidth = Literal["key", "scalar", "slot", "none", "learned"]
LogDecay = Callable[["Tensor", "LigerConfig"], "Tensor"]


@dataclass(frozen=True)
class Structure:
    """One row: its gate's width, its log-decay, and the defaults of the configuration fields that it reads."""

    width: GateWidth
    log_decay: LogDecay
    gate_normalizer: float = 1.0
    feature_map: Literal["softmax", "identity", "learned"] = "softmax"
    key_from_gate: bool = False  # the written key is 1 - alpha (HGRN2) instead of phi(k)
    source: str = ""


def log_sigmoid(x: Tensor) -> Tensor:
    """log sigma(x), exact for any x. Not `F.logsigmoid`: ONNX exporters write that as Log(Sigmoid(x)), and ONNX
    Runtime's Sigmoid saturates near -18, so a strongly forgetting gate came out wrong by 3e-3."""
    return x.clamp(max=0) - (1 + (-x.abs()).exp()).log()


def _sigmoid(p: Tensor, config: LigerConfig) -> Tensor:
    return log_sigmoid(p) / config.gate_normalizer


def _bounded_sigmoid(p: Tensor, config: LigerConfig) -> Tensor:
    """alpha = (gamma + (1 - gamma) sigma(p))^(1/N); the lower bound gamma keeps the logarithm finite."""
    gamma = config.lower_bound
    if gamma == 0:
        return _sigmoid(p, config)
    return (gamma + (1 - gamma) * log_sigmoid(p).exp()).log() / config.gate_normalizer


def _double_exponential(p: Tensor, config: LigerConfig) -> Tensor:
    """alpha = exp(-exp(p) / N); clamped at exp(-exp(3)) = 2e-9, which has forgotten everything already."""
    return -(p - math.log(config.gate_normalizer)).clamp(max=3).exp()


def _softplus(p: Tensor, config: LigerConfig) -> Tensor:
    """alpha = exp(-softplus(p)) = sigma(-p)."""
    return log_sigmoid(-p) / config.gate_normalizer


def _none(p: Tensor, config: LigerConfig) -> Tensor:
    return p * 0


def _fixed(p: Tensor, config: LigerConfig) -> Tensor:
    """RetNet's constants (arXiv 2307.08621, section 3): alpha_h = 1 - 2^(-5-h) for head h, whatever the token."""
    constants = [[math.log1p(-(2.0 ** -(5 + head)))] for head in range(p.shape[-2])]
    return p * 0 + p.new_tensor(constants) / config.gate_normalizer


STRUCTURES: dict[str, Structure] = {
    "gla": Structure("key", _sigmoid, gate_normalizer=16, source="Table 1; the 1/16 is the reference code's"),
    "hgrn2": Structure("key", _bounded_sigmoid, key_from_gate=True, source="Table 1; reference code: lower bound 0"),
    "gsa": Structure("slot", _sigmoid, gate_normalizer=16, feature_map="identity", source="Table 1; reference code"),
    "rwkv6": Structure("key", _double_exponential, source="Table 1"),
    "mamba2": Structure("scalar", _softplus, source="Table 1"),
    "mlstm": Structure("scalar", _sigmoid, source="Table 1"),
    "gated_retention": Structure("scalar", _sigmoid, source="Table 1; the same function as mlstm"),
    "linear": Structure("scalar", _none, source="control: Eq. 7 without a gate"),
    "fixed_decay": Structure("scalar", _fixed, source="control: RetNet's constants"),
    "lolcats": Structure("learned", _none, feature_map="learned", source="arXiv 2410.10254: no gate, model/lolcats.py"),
    "window": Structure("none", _none, source="control: the window branch alone"),
}
