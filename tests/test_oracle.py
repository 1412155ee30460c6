"""Rung 1 against somebody else's code: flash-linear-attention's naive recurrences (fla-core, pure PyTorch)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from liger_deploy.model import recurrence
from tests.conftest import relative
from tests.test_recurrence import make
from tests.tolerances import OP


def naive(op: str) -> ModuleType:
    """`fla.ops.{op}.naive` by its path: the packages above it import Triton, it does not."""
    package = importlib.util.find_spec("fla")
    assert package is not None
    assert package.submodule_search_locations
    path = Path(package.submodule_search_locations[0]) / "ops" / op / "naive.py"
    spec = importlib.util.spec_from_file_location(f"fla_naive_{op}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def per_query_head(x: torch.Tensor, queries: int) -> torch.Tensor:
    return x.repeat_interleave(queries, 2)


@pytest.mark.parametrize("gate", ["mild", "none", "strong"])
def test_per_channel_gate(gate: str) -> None:
    q, k, v, g = make(130, gate=gate)
    state = torch.randn(2, 2, 8, 8)
    out, after = recurrence.gated_chunked(q, k, v, g, state)
    heads = [per_query_head(x, 3) for x in (k, v, g)]
    expected, expected_state = naive("gla").naive_recurrent_gla(
        q.flatten(2, 3) * 8**0.5, *heads, initial_state=state.repeat_interleave(3, 1), output_final_state=True
    )  # its scale is K^-1/2
    assert relative(out.flatten(2, 3), expected) < OP
    assert relative(after.repeat_interleave(3, 1), expected_state) < OP


@pytest.mark.parametrize("gate", ["mild", "none", "strong"])
def test_scalar_gate(gate: str) -> None:
    q, k, v, g = make(130, queries=1, channels=1, gate=gate)
    out, after = recurrence.gated_chunked(q, k, v, g, torch.zeros(2, 2, 8, 8))
    expected, expected_state = naive("simple_gla").naive_recurrent_simple_gla(q[:, :, :, 0], k, v, g[..., 0], scale=1.0)
    assert relative(out[:, :, :, 0], expected) < OP
    assert relative(after, expected_state) < OP


@pytest.mark.parametrize("gate", ["mild", "strong"])
def test_slots(gate: str) -> None:
    q, k, v, g = make(130, queries=1, channels=4, gate=gate)
    q, write = q * 9, 1 - g.exp()
    zeros = torch.zeros(2, 2, 8, 4)
    scores, keys = recurrence.slot_scores(q, k, write, g, zeros)
    out, values = recurrence.gated_chunked(scores.softmax(-1), write, v, g, zeros.mT.contiguous())
    expected, states = naive("gsa").naive_recurrent_gsa(
        q[:, :, :, 0], k, v, write, g, scale=1.0, output_final_state=True
    )
    assert relative(out[:, :, :, 0], expected) < 5 * OP
    assert relative(keys, states[0]) < OP
    assert relative(values, states[1]) < OP
