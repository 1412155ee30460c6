"""The gate table of the Liger paper (arXiv 2503.01496, Table 1): one row a structure.

A row says how the gate logit p, pooled from the key projection, becomes the log of the retention alpha (always
log alpha <= 0), and which recurrence carries it. Written with tensor methods alone, so that reading the table needs
no torch: `config.py` and `state.py` read it where torch is not installed.

Shapes: p and the log-decay are [B, T, G, C]; B batch, T time, G KV heads, C gate channels (K key channels, 1 for a
scalar gate, M slots).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from liger_deploy.config import LigerConfig

GateWidth = Literal["key", "scalar", "slot", "none"]
LogDecay = Callable[["Tensor", "LigerConfig"], "Tensor"]


@dataclass(frozen=True)
class Structure:
    """One row: its gate's width, its log-decay, and the defaults of the configuration fields that it reads."""

    width: GateWidth
    log_decay: LogDecay
    gate_normalizer: float = 1.0
    feature_map: Literal["softmax", "identity"] = "softmax"
    key_from_gate: bool = False  # the written key is 1 - alpha (HGRN2) instead of phi(k)
    source: str = ""


def log_sigmoid(x: Tensor) -> Tensor:
    """log sigma(x), exact for any x. Not `F.logsigmoid`: ONNX exporters write that as Log(Sigmoid(x)), and ONNX
    Runtime's Sigmoid saturates near -18, so a strongly forgetting gate came out wrong by 3e-3."""
    return x.clamp(max=0) - (1 + (-x.abs()).exp()).log()


def _sigmoid(p: Tensor, config: LigerConfig) -> Tensor:
    return log_sigmoid(p) / config.gate_normalizer


STRUCTURES: dict[str, Structure] = {
    "gla": Structure("key", _sigmoid, gate_normalizer=16, source="Table 1; the 1/16 is the reference code's"),
}
