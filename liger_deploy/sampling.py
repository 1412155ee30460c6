"""Sampling, defined exactly: the same seed gives the same tokens in every language.

Temperature, then top-k, then top-p, on float64 probabilities sorted by (probability descending, id ascending); one
uniform number a draw from SplitMix64, a generator of five integer operations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from liger_deploy.errors import UserError

_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class SamplingOptions:
    """temperature 0 is greedy; top_k 0 and top_p 1 keep everything.

    Raises:
        UserError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature must be 0 (greedy) or positive, not {self.temperature}")
        if self.top_k < 0:
            raise UserError(f"top-k must be 0 (off) or positive, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p must be above 0 and at most 1, not {self.top_p}")


class Sampler:
    """Draws token ids; one for each row of text."""

    def __init__(self, options: SamplingOptions) -> None:
        self.options = options
        self._state = options.seed & _MASK

    def __call__(self, logits_N: npt.NDArray[np.float32]) -> int:
        """The next token id from logits [N] float32. Ties go to the lower id."""
        if not self.options.temperature:
            return int(np.argmax(logits_N))
        scaled = logits_N.astype(np.float64) / self.options.temperature
        order = np.argsort(-scaled, kind="stable")[: self.options.top_k or None]
        weights = np.exp(scaled[order] - scaled[order[0]])
        total = np.cumsum(weights)
        kept = min(int(np.searchsorted(total, self.options.top_p * total[-1])) + 1, len(order))
        draw = self._uniform() * total[kept - 1]
        return int(order[min(int(np.searchsorted(total[:kept], draw, side="right")), kept - 1)])

    def _uniform(self) -> float:
        """SplitMix64, the upper 53 bits as a number in [0, 1)."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK
        z = self._state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        return float((z ^ (z >> 31)) >> 11) * 2.0**-53
