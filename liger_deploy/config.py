"""LigerConfig: which linear recurrence a checkpoint's attention becomes. Lives in `config.json` under `liger`."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from liger_deploy.errors import ConfigError
from liger_deploy.gates import STRUCTURES, Structure

GateSource = Literal["normed", "raw"]
FeatureMap = Literal["softmax", "identity", "learned"]
DEFAULT_SLOTS = 64  # the reference code's class default; the paper does not state M
DEFAULT_FEATURES = 64  # LoLCATs' (arXiv 2410.10254) f for head dim 128


@dataclass(frozen=True)
class LigerConfig:
    """How attention is replaced (arXiv 2503.01496, section 3). Frozen and strict: a value no model accepts raises.

    Attributes:
        structure: a row of `gates.STRUCTURES`.
        window: keys that the sliding-window branch sees, the current token included (Eq. 10: 64).
        recurrent_weight: weight of the recurrent branch in the output (Eq. 9: 0.5).
        window_weight: weight of the window branch in the output (Eq. 9: 0.5).
        gate_normalizer: N in alpha = sigma(p)^(1/N). None takes the structure's default.
        feature_map: phi of Eq. 7: "softmax" over the head's channels, or "identity". None: the structure's default.
        lower_bound: gamma, least retention of hgrn2's gate (0 to below 1; the reference code: 0).
        slots: memory slots of gsa, dividing the head dim; 0 for the others. None: the default (gsa: 64).
        gate_source: key that feeds the gate where a model normalizes keys (Qwen3): after ("normed") or before.
        features: f of lolcats' learned maps, which give 2f features a query head; None: the default (lolcats: 64).
        softmax_layers: layers that stay softmax attention (the paper's hybrid: every eighth), in ascending order.
        softmax_window: keys that those layers see, the current token included: exact up to that many tokens.
        sinks: first tokens that those layers (or the structure `window`) keep beside their window.

    Raises:
        ConfigError: an unknown name or a value out of range, with what is allowed.
    """

    structure: str = "gla"
    window: int = 64
    recurrent_weight: float = 0.5
    window_weight: float = 0.5
    gate_normalizer: float = None  # type: ignore[assignment]
    feature_map: FeatureMap = None  # type: ignore[assignment]
    lower_bound: float = 0.0
    slots: int = None  # type: ignore[assignment]
    gate_source: GateSource = "normed"
    features: int = None  # type: ignore[assignment]
    softmax_layers: tuple[int, ...] = ()
    softmax_window: int = 4096
    sinks: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.structure, str) or self.structure not in STRUCTURES:
            raise ConfigError(f"unknown structure {self.structure!r}: choose one of {', '.join(STRUCTURES)}")
        defaults = {
            "gate_normalizer": self.row.gate_normalizer,
            "feature_map": self.row.feature_map,
            "slots": DEFAULT_SLOTS if self.row.width == "slot" else 0,
            "features": DEFAULT_FEATURES if self.row.width == "learned" else 0,
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        _check_types(self)
        for name in ("window", "softmax_window"):
            require(
                1 <= getattr(self, name) <= 1 << 20, f"{name} must be between 1 and 1048576 keys", getattr(self, name)
            )
        require(self.gate_normalizer > 0, "gate_normalizer must be positive", self.gate_normalizer)
        require(0 <= self.lower_bound < 1, "lower_bound must be at least 0 and below 1", self.lower_bound)
        require(self.lower_bound == 0 or self.structure == "hgrn2", "lower_bound is hgrn2's alone", self.lower_bound)
        if self.row.width == "learned":
            require(self.features >= 1, f"{self.structure} needs features of at least 1", self.features)
            require(self.feature_map == "learned", "lolcats learns its feature map: 'learned'", self.feature_map)
        else:
            require(self.features == 0, f"features belong to lolcats, {self.structure} has none", self.features)
            require(
                self.feature_map in ("softmax", "identity"),
                "feature_map must be 'softmax' or 'identity'",
                self.feature_map,
            )
        if self.row.width == "slot":
            require(self.slots >= 1, f"{self.structure} needs slots of at least 1", self.slots)
            require(self.feature_map == "identity", "gsa takes no feature map", self.feature_map)
        else:
            require(self.slots == 0, f"slots belong to gsa, {self.structure} has none", self.slots)
        require(self.gate_source in ("normed", "raw"), "gate_source must be 'normed' or 'raw'", self.gate_source)
        require(0 <= self.sinks <= 1024, "sinks must be between 0 and 1024 tokens", self.sinks)
        require(
            self.sinks == 0 or bool(self.softmax_layers) or self.structure == "window",
            f"sinks belong to softmax_layers or the structure window, {self.structure} alone has none",
            self.sinks,
        )

    @property
    def row(self) -> Structure:
        """The structure's row in the gate table."""
        return STRUCTURES[self.structure]

    def layer(self, index: int) -> LigerConfig:
        """The configuration of one layer alone: a softmax layer is the structure `window` with a large window."""
        if index not in self.softmax_layers:
            sinks = self.sinks if self.structure == "window" else 0
            return dataclasses.replace(self, softmax_layers=(), sinks=sinks)
        return LigerConfig("window", self.softmax_window, window_weight=1, sinks=self.sinks)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, every field explicit."""
        return dataclasses.asdict(self) | {"softmax_layers": list(self.softmax_layers)}

    @classmethod
    def from_dict(cls, values: object, where: str = "the liger configuration") -> LigerConfig:
        """Build from JSON values, refusing keys that this version does not know.

        Raises:
            ConfigError: not an object, an unknown key, or a bad value; `where` names the source in the message.
        """
        if not isinstance(values, dict):
            raise ConfigError(f"{where} must be a JSON object, not {type(values).__name__}")
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(f"{where} has unknown keys {', '.join(unknown)}: made by a newer liger_deploy?")
        layers = values.get("softmax_layers", [])
        if not isinstance(layers, list):
            raise ConfigError(f"{where}: softmax_layers must be a list of layer numbers, not {layers!r}")
        try:
            return cls(**{**values, "softmax_layers": tuple(layers)})
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None


def check_fits(config: LigerConfig, head_dim: int, layers: int) -> None:
    """Raise ConfigError unless the sizes fit a model of `layers` layers with heads of `head_dim` channels."""
    if config.softmax_layers and config.softmax_layers[-1] >= layers:
        raise ConfigError(f"softmax_layers must be below {layers}, the model's layers: not {config.softmax_layers[-1]}")
    if config.features > head_dim:
        raise ConfigError(f"features must be at most the model's head dim {head_dim}, not {config.features}")
    if config.slots and head_dim % config.slots:
        allowed = ", ".join(str(m) for m in range(1, head_dim + 1) if head_dim % m == 0)
        raise ConfigError(f"slots must divide the model's head dim {head_dim}: {allowed}; not {config.slots}")


def _check_types(config: LigerConfig) -> None:
    for name in ("window", "slots", "features", "softmax_window", "sinks"):
        value = getattr(config, name)
        require(isinstance(value, int) and not isinstance(value, bool), f"{name} must be an integer", value)
    for name in ("recurrent_weight", "window_weight", "gate_normalizer", "lower_bound"):
        value = getattr(config, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        require(number and math.isfinite(value), f"{name} must be a finite number", value)
        object.__setattr__(config, name, float(value))
    layers = config.softmax_layers
    numbers = isinstance(layers, tuple) and all(type(i) is int and i >= 0 for i in layers)
    require(numbers and list(layers) == sorted(set(layers)), "softmax_layers must be ascending layer numbers", layers)


def require(condition: bool, message: str, value: object) -> None:
    """Raise ConfigError "`message`, not `value`" unless the condition holds."""
    if not condition:
        raise ConfigError(f"{message}, not {value!r}")
