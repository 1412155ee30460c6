"""Rung 1: float64 loops = step form = chunked form = operator, forward and gradient, with gates at their extremes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from liger_deploy.config import LigerConfig
from liger_deploy.gates import STRUCTURES, log_sigmoid
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


@pytest.mark.parametrize("chunks", [1, 2, 17, 40])
def test_states_found_by_doubling_are_those_of_the_loop(chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(chunks)
    decay, writes, state = torch.rand(2, 3, chunks, 4, 1), torch.randn(2, 3, chunks, 4, 5), torch.randn(2, 3, 4, 5)
    monkeypatch.setattr(recurrence, "MANY", 100)
    expected = recurrence._scan(decay, writes, state)
    for found, wanted in zip(recurrence._scan_by_doubling(decay, writes, state), expected, strict=True):
        assert found.shape == wanted.shape
        assert relative(found, wanted) < OP


def test_operator_is_well_formed() -> None:
    torch.library.opcheck(linear_attention, (*make(5), torch.randn(2, 2, 8, 8)))


@pytest.mark.parametrize("p", [-1e4, -60.0, -18.0, -1.0, 0.0, 1.0, 18.0, 60.0, 1e4])
def test_log_sigmoid_is_exact_where_sigmoid_saturates(p: float) -> None:
    x = torch.tensor(p)
    exact = torch.nn.functional.logsigmoid(x.double())
    assert float(log_sigmoid(x)) == pytest.approx(float(exact), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("structure", [name for name in STRUCTURES if name not in ("window", "lolcats")])
@pytest.mark.parametrize("changes", [{}, {"gate_normalizer": 3}], ids=str)
def test_gate_row_is_the_reference(structure: str, changes: dict[str, float]) -> None:
    config = LigerConfig(structure=structure, **changes)  # type: ignore[arg-type]
    p = torch.linspace(-70, 70, 128).view(1, 8, 2, 8)
    ours = config.row.log_decay(p, config).double()
    assert (ours <= 0).all()
    for head in range(2):
        expected = reference.alpha(p[0, :, head], config, head)
        assert float((ours[0, :, head].exp() - expected).abs().max()) < OP


def test_lower_bound_holds() -> None:
    config = LigerConfig(structure="hgrn2", lower_bound=0.25)
    p = torch.linspace(-70, 70, 64).view(1, 8, 1, 8)
    ours = config.row.log_decay(p, config).double().exp()
    assert relative(ours[0, :, 0], reference.alpha(p[0, :, 0], config)) < OP
    assert float(ours.min()) == pytest.approx(0.25, rel=1e-6)


def slots_by_reference(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every row, head and query through `reference.slots`."""
    outs, keys, values = torch.zeros(*q.shape[:4], v.shape[-1], dtype=torch.float64), [], []
    for row in range(q.shape[0]):
        for head in range(q.shape[2]):
            for query in range(q.shape[3]):
                heads = q[row, :, head, query], k[row, :, head], v[row, :, head], g[row, :, head].double().exp()
                outs[row, :, head, query], state = reference.slots(*heads)
            keys.append(state[0].mT)
            values.append(state[1])
    return outs, *(torch.stack(x).unflatten(0, (q.shape[0], -1)) for x in (keys, values))


@pytest.mark.parametrize("gate", ["mild", "strong", "extreme", "all -60"])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 200])
def test_slots_are_the_reference(tokens: int, gate: str) -> None:
    q, k, v, g = make(tokens, channels=4, gate=gate)
    q, k = q * 20, k * 20
    expected, expected_keys, expected_values = slots_by_reference(q, k, v, g)
    keys, values, write = torch.zeros(2, 2, 8, 4), torch.zeros(2, 2, 4, 8), 1 - g.exp()
    for chunk in (recurrence.SUB_CHUNK, tokens):
        scores, new_keys = recurrence.slot_scores(q, k, write, g, keys, chunk)
        out, new_values = recurrence.gated_chunked(scores.softmax(-1), write, v, g, values)
        assert relative(out, expected) < 5 * OP  # the softmax between the passes multiplies the scores' error
        assert relative(new_keys, expected_keys) < OP
        assert relative(new_values, expected_values) < OP
    for t in range(tokens):
        out, keys, values = recurrence.slot_step(q[:, t], k[:, t], v[:, t], g[:, t], keys, values)
        assert relative(out, expected[:, t]) < 10 * OP
    assert relative(keys, expected_keys) < OP
    assert relative(values, expected_values) < OP


@pytest.mark.parametrize("gate", ["mild", "extreme"])
def test_slot_gradients_are_those_of_float64(gate: str) -> None:
    q, k, v, g = make(40, channels=4, gate=gate)
    inputs = [x.requires_grad_() for x in (q * 9, k * 9, v, g, torch.randn(2, 2, 8, 4), torch.randn(2, 2, 4, 8))]
    exact = [x.detach().double().requires_grad_() for x in inputs]

    def chunked(q: Tensor, k: Tensor, v: Tensor, g: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        scores, keys = recurrence.slot_scores(q, k, 1 - g.exp(), g, keys)
        out, values = recurrence.gated_chunked(scores.softmax(-1), 1 - g.exp(), v, g, values)
        return out.square().sum() + values.square().sum() + keys.square().sum()

    def steps(q: Tensor, k: Tensor, v: Tensor, g: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for t in range(40):
            out, keys, values = recurrence.slot_step(q[:, t], k[:, t], v[:, t], g[:, t], keys, values)
            total = total + out.square().sum()
        return total + values.square().sum() + keys.square().sum()

    ours, expected = torch.autograd.grad(chunked(*inputs), inputs), torch.autograd.grad(steps(*exact), exact)
    for mine, theirs in zip(ours, expected, strict=True):
        assert float((mine - theirs).norm()) <= GRADIENT * float(theirs.norm())


FORMS = {"per channel": 8, "scalar": 1, "slots": 4}


def chunked(kind: str, tensors: list[Tensor]) -> Tensor:
    """A scalar that depends on every output of one chunked form, from q, k, v, g."""
    q, k, v, g = tensors
    if kind == "slots":
        zeros, write = q.new_zeros(2, 2, 8, 4), 1 - g.exp()
        scores, keys = recurrence.slot_scores(q * 9, k * 9, write, g, zeros)
        out, values = recurrence.gated_chunked(scores.softmax(-1), write, v, g, zeros.mT.contiguous())
        return out.square().sum() + values.square().sum() + keys.square().sum()
    out, state = recurrence.gated_chunked(q, k, v, g, q.new_zeros(2, 2, 8, 8))
    return out.square().sum() + state.square().sum()


@pytest.mark.parametrize("kind", FORMS)
def test_8192_tokens_take_memory_linear_in_their_number(kind: str) -> None:
    """Bytes kept for the backward pass, and the largest tensor ever made, at 8,192 tokens against 4,096."""

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else [out]:
                if isinstance(x, Tensor):
                    self.elements = max(self.elements, x.numel())
            return out

    def measure(tokens: int) -> tuple[int, int]:
        kept: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        inputs = [x.requires_grad_() for x in make(tokens, channels=FORMS[kind])]
        with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            chunked(kind, inputs).backward()
        return sum(kept.values()), largest.elements

    for at_8192, at_4096 in zip(measure(8192), measure(4096), strict=True):
        assert at_8192 <= 2.05 * at_4096


@pytest.mark.parametrize("kind", FORMS)
def test_gradients_at_8192_tokens_are_those_of_float64(kind: str) -> None:
    inputs = make(8192, channels=FORMS[kind])
    ours, exact = ([x.to(dtype).requires_grad_() for x in inputs] for dtype in (torch.float32, torch.float64))
    for mine, theirs in zip(
        torch.autograd.grad(chunked(kind, ours), ours), torch.autograd.grad(chunked(kind, exact), exact), strict=True
    ):
        assert float((mine - theirs).norm()) <= GRADIENT * float(theirs.norm())
