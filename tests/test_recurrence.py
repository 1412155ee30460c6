"""Rung 1: float64 loops = step form = chunked form = operator, forward and gradient, with gates at their extremes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from liger_deploy.config import LigerConfig
from liger_deploy.gates import log_sigmoid
from liger_deploy.model import recurrence, reference
from liger_deploy.model.ops import linear_attention
from tests.conftest import relative
from tests.tolerances import GRADIENT, OP

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
GATES = {
    "mild": lambda g: -0.05 * g,
    "none": lambda g: 0 * g,
    "strong": lambda g: -3 * g,
    "extreme": lambda g: -60.0 * (g > 0.7),  # a channel that forgets everything at some tokens, nothing at others
    "all -60": lambda g: 0 * g - 60,
}


def make(tokens: int, queries: int = 3, channels: int = 8, gate: str = "mild", seed: int = 0) -> Inputs:
    """q [2,T,2,R,8], k, v, g: positive q and k, as feature maps give them."""
    torch.manual_seed(seed)
    q, k = torch.randn(2, tokens, 2, queries, 8).softmax(-1), torch.randn(2, tokens, 2, 8).softmax(-1)
    return q, k, torch.randn(2, tokens, 2, 8), GATES[gate](torch.rand(2, tokens, 2, channels))


def by_reference(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Every row, head and query through `reference.recurrent`."""
    outs, states = torch.zeros(*q.shape[:4], v.shape[-1], dtype=torch.float64), []
    for row in range(q.shape[0]):
        for head in range(q.shape[2]):
            for query in range(q.shape[3]):
                heads = q[row, :, head, query], k[row, :, head], v[row, :, head], g[row, :, head].double().exp()
                outs[row, :, head, query], state = reference.recurrent(*heads)
            states.append(state)
    return outs, torch.stack(states).unflatten(0, (q.shape[0], -1))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 200])
@pytest.mark.parametrize(("queries", "channels"), [(1, 8), (3, 8), (3, 1)])
def test_chunked_is_the_reference(tokens: int, gate: str, queries: int, channels: int) -> None:
    inputs = make(tokens, queries, channels, gate)
    expected, expected_state = by_reference(*inputs)
    for form in (recurrence.gated_chunked, linear_attention):
        out, state = form(*inputs, torch.zeros(2, 2, 8, 8))
        assert relative(out, expected) < OP
        assert relative(state, expected_state) < OP


@pytest.mark.parametrize("gate", GATES)
def test_steps_are_the_reference(gate: str) -> None:
    q, k, v, g = make(65, gate=gate)
    expected, expected_state = by_reference(q, k, v, g)
    state = torch.zeros(2, 2, 8, 8)
    for t in range(65):
        out, state = recurrence.gated_step(q[:, t], k[:, t], v[:, t], g[:, t], state)
        assert relative(out, expected[:, t]) < 2 * OP
    assert relative(state, expected_state) < OP


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("channels", [8, 1])
def test_gradients_are_those_of_float64(gate: str, channels: int) -> None:
    inputs = [x.requires_grad_() for x in (*make(70, 3, channels, gate), torch.randn(2, 2, 8, 8))]
    exact = [x.detach().double().requires_grad_() for x in inputs]

    def loss(form: list[Tensor]) -> Tensor:
        out, state = recurrence.gated_chunked(*form)
        return out.square().sum() + state.square().sum()

    def steps(form: list[Tensor]) -> Tensor:
        *tokens, state = form
        total = torch.zeros((), dtype=torch.float64)
        for t in range(70):
            out, state = recurrence.gated_step(*(x[:, t] for x in tokens), state)
            total = total + out.square().sum()
        return total + state.square().sum()

    ours = torch.autograd.grad(loss(inputs), inputs)
    expected = torch.autograd.grad(steps(exact), exact)
    for mine, theirs in zip(ours, expected, strict=True):
        assert torch.isfinite(mine).all()
        assert float((mine - theirs).norm()) <= GRADIENT * float(theirs.norm()) + 1e-12


def test_split_anywhere_is_one_pass() -> None:
    inputs = make(130)
    whole, whole_state = recurrence.gated_chunked(*inputs, torch.zeros(2, 2, 8, 8))
    for cut in (1, 63, 64, 129):
        first, state = recurrence.gated_chunked(*(x[:, :cut] for x in inputs), torch.zeros(2, 2, 8, 8))
        second, state = recurrence.gated_chunked(*(x[:, cut:] for x in inputs), state)
        assert relative(torch.cat([first, second], 1), whole) < OP
        assert relative(state, whole_state) < OP


def test_operator_is_well_formed() -> None:
    torch.library.opcheck(linear_attention, (*make(5), torch.randn(2, 2, 8, 8)))


@pytest.mark.parametrize("p", [-1e4, -60.0, -18.0, -1.0, 0.0, 1.0, 18.0, 60.0, 1e4])
def test_log_sigmoid_is_exact_where_sigmoid_saturates(p: float) -> None:
    x = torch.tensor(p)
    exact = torch.nn.functional.logsigmoid(x.double())
    assert float(log_sigmoid(x)) == pytest.approx(float(exact), rel=1e-6, abs=1e-7)


def test_gate_row_is_the_reference() -> None:
    p = torch.linspace(-70, 70, 64).view(1, 8, 1, 8)
    config = LigerConfig()
    ours = config.row.log_decay(p, config).double().exp()
    assert relative(ours[0, :, 0], reference.alpha(p[0, :, 0], config)) < OP
