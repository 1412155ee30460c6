"""LigerConfig: which linear recurrence a checkpoint's attention becomes. Lives in `config.json` under `liger`."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from liger_deploy.errors import ConfigError
from liger_deploy.gates import STRUCTURES, Structure

GateSource = Literal["normed", "raw"]
FeatureMap = Literal["softmax", "identity"]
DEFAULT_SLOTS = 64  # the reference code's class default; the paper does not state M


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

    def __post_init__(self) -> None:
        if not isinstance(self.structure, str) or self.structure not in STRUCTURES:
            raise ConfigError(f"unknown structure {self.structure!r}: choose one of {', '.join(STRUCTURES)}")
        slots = DEFAULT_SLOTS if self.row.width == "slot" else 0
        defaults = {"gate_normalizer": self.row.gate_normalizer, "feature_map": self.row.feature_map, "slots": slots}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        _check_types(self)
        _check(1 <= self.window <= 1 << 20, "window must be between 1 and 1048576 keys", self.window)
        _check(self.gate_normalizer > 0, "gate_normalizer must be positive", self.gate_normalizer)
        _check(
            self.feature_map in ("softmax", "identity"), "feature_map must be 'softmax' or 'identity'", self.feature_map
        )
        _check(0 <= self.lower_bound < 1, "lower_bound must be at least 0 and below 1", self.lower_bound)
        _check(self.lower_bound == 0 or self.structure == "hgrn2", "lower_bound is hgrn2's alone", self.lower_bound)
        if self.row.width == "slot":
            _check(self.slots >= 1, f"{self.structure} needs slots of at least 1", self.slots)
            _check(self.feature_map == "identity", "gsa takes no feature map", self.feature_map)
        else:
            _check(self.slots == 0, f"slots belong to gsa, {self.structure} has none", self.slots)
        _check(self.gate_source in ("normed", "raw"), "gate_source must be 'normed' or 'raw'", self.gate_source)

    @property
    def row(self) -> Structure:
        """The structure's row in the gate table."""
        return STRUCTURES[self.structure]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, every field explicit."""
        return dataclasses.asdict(self)

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
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None


def check_fits(config: LigerConfig, head_dim: int) -> None:
    """Raise ConfigError unless the structure's sizes fit a head of `head_dim` channels."""
    if config.slots and head_dim % config.slots:
        allowed = ", ".join(str(m) for m in range(1, head_dim + 1) if head_dim % m == 0)
        raise ConfigError(f"slots must divide the model's head dim {head_dim}: {allowed}; not {config.slots}")


def _check_types(config: LigerConfig) -> None:
    for name in ("window", "slots"):
        value = getattr(config, name)
        _check(isinstance(value, int) and not isinstance(value, bool), f"{name} must be an integer", value)
    for name in ("recurrent_weight", "window_weight", "gate_normalizer", "lower_bound"):
        value = getattr(config, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        _check(number and math.isfinite(value), f"{name} must be a finite number", value)
        object.__setattr__(config, name, float(value))


def _check(condition: bool, message: str, value: object) -> None:
    if not condition:
        raise ConfigError(f"{message}, not {value!r}")
