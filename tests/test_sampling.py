"""Sampling is defined to the bit, so that another language can match it."""

from __future__ import annotations

import numpy as np
import pytest

from liger_deploy.errors import UserError
from liger_deploy.sampling import Sampler, SamplingOptions

LOGITS = np.array([1.0, 3.0, 2.0, 3.0, -1.0], np.float32)


def draws(count: int = 20000, **options: float) -> np.ndarray:
    sampler = Sampler(SamplingOptions(seed=1, **options))  # type: ignore[arg-type]
    return np.bincount([sampler(LOGITS) for _ in range(count)], minlength=5) / count


def test_greedy_takes_the_lower_id_of_a_tie() -> None:
    assert Sampler(SamplingOptions())(LOGITS) == 1


def test_frequencies_are_the_softmax() -> None:
    for temperature in (0.5, 1.0, 2.0):
        expected = np.exp(LOGITS / temperature) / np.exp(LOGITS / temperature).sum()
        assert np.abs(draws(temperature=temperature) - expected).max() < 0.012


def test_top_k_and_top_p_cut_the_tail() -> None:
    assert (draws(2000, temperature=1, top_k=2) > 0).tolist() == [False, True, False, True, False]
    assert (draws(2000, temperature=1, top_p=0.5) > 0).tolist() == [False, True, False, True, False]
    assert (draws(2000, temperature=1, top_p=1e-9) > 0).tolist() == [False, True, False, False, False]
    assert (draws(2000, temperature=1, top_k=3, top_p=0.99) > 0).tolist() == [False, True, True, True, False]


def test_generator_is_splitmix64() -> None:
    """First outputs for seed 1234567, as the generator's authors publish them."""
    sampler = Sampler(SamplingOptions(seed=1234567))
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [sampler._uniform() for _ in published] == [(x >> 11) * 2.0**-53 for x in published]


def test_seed_repeats() -> None:
    first, second = (Sampler(SamplingOptions(temperature=1, seed=7)) for _ in range(2))
    assert [first(LOGITS) for _ in range(50)] == [second(LOGITS) for _ in range(50)]


@pytest.mark.parametrize("options", [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0}])
def test_bad_options(options: dict[str, float]) -> None:
    with pytest.raises(UserError):
        SamplingOptions(**options)  # type: ignore[arg-type]
