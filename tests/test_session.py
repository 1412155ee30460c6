"""The error contract of sessions and states."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import liger_deploy as ld
from liger_deploy.config import LigerConfig
from liger_deploy.errors import SessionError, StateError, TokenError
from liger_deploy.state import ModelShape, State, StateSpec
from tests.conftest import small_llama


@pytest.fixture
def session() -> ld.EagerSession:
    return ld.EagerSession(ld.linearize(small_llama(), ld.LigerConfig(window=4)))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "empty"),
        ([97], "97 is out of range: this model's ids are 0 .. 96"),
        ([-1], "-1 is out of range"),
        ([0.5], "must be integers"),
        ([[[1]]], "rank"),
        ("hello", "must be integers"),
    ],
)
def test_bad_tokens_are_refused_and_change_nothing(session: ld.EagerSession, tokens: object, message: str) -> None:
    before = session.prefill([1, 2, 3])
    state = session.state()
    with pytest.raises(TokenError, match=message):
        session.prefill(tokens)  # type: ignore[arg-type]
    assert all(np.array_equal(session.state().tensors[n], t) for n, t in state.tensors.items())
    session.reset()
    assert np.array_equal(session.prefill([1, 2, 3]), before)


@pytest.mark.parametrize("valid", [[0], [4], [1, 1], [1.0]])
def test_bad_valid_is_refused(session: ld.EagerSession, valid: list[int]) -> None:
    with pytest.raises(TokenError, match="valid must be"):
        session.prefill([1, 2, 3], valid)


def test_batch_is_fixed_by_the_first_tokens(session: ld.EagerSession) -> None:
    session.prefill([[1, 2], [3, 4]])
    with pytest.raises(TokenError, match="1 rows of tokens for a session of 2"):
        session.step([1])
    session.reset()
    assert session.step([1]).shape == (1, 97)


def test_no_state_before_the_first_token(session: ld.EagerSession) -> None:
    with pytest.raises(SessionError, match="prefill it first"):
        session.state()


def test_a_failed_run_poisons_until_reset(session: ld.EagerSession, monkeypatch: pytest.MonkeyPatch) -> None:
    session.prefill([1, 2, 3])
    good = session.state()

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(session, "_run", fail)
    with pytest.raises(SessionError, match="eager runtime failed: RuntimeError: out of memory"):
        session.step([1])
    monkeypatch.undo()
    for call in (lambda: session.step([1]), session.state, session.fork, lambda: session.prefill([1])):
        with pytest.raises(SessionError, match="failed earlier"):
            call()
    session.load_state(good)
    after_load = session.step([5])
    session.reset()
    session.prefill([1, 2, 3])
    assert np.array_equal(session.step([5]), after_load)


def test_a_state_of_another_model_is_refused(session: ld.EagerSession) -> None:
    session.step([1])
    other = ld.EagerSession(ld.linearize(small_llama(intermediate_size=64), ld.LigerConfig(window=4)))
    with pytest.raises(StateError, match="belongs to model"):
        other.load_state(session.state())


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "dtype"])
def test_a_state_that_does_not_fit_is_refused(session: ld.EagerSession, change: str) -> None:
    session.step([1])
    state = session.state()
    tensors = dict(state.tensors)
    name = "layers.1.recurrent"
    if change == "missing":
        del tensors[name]
    elif change == "extra":
        tensors["layers.9.recurrent"] = tensors[name]
    elif change == "shape":
        tensors[name] = tensors[name][:, :1]
    else:
        tensors[name] = tensors[name].astype(np.float64)
    with pytest.raises(StateError, match="another model or configuration"):
        session.load_state(State(tensors, state.model))


def test_state_survives_a_file_bit_for_bit(session: ld.EagerSession, tmp_path: Path) -> None:
    session.prefill([[1, 2, 3], [4, 5, 6]])
    state = session.state()
    state.save(tmp_path / "s.safetensors")
    loaded = State.load(tmp_path / "s.safetensors")
    assert loaded.model == state.model
    assert loaded.tensors.keys() == state.tensors.keys()
    assert all(np.array_equal(loaded.tensors[n], t) for n, t in state.tensors.items())
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


def test_low_precision_windows_survive_the_canonical_form() -> None:
    model = ld.linearize(small_llama(), ld.LigerConfig(window=4)).to(torch.bfloat16)
    session = ld.EagerSession(model)
    session.prefill([1, 2, 3, 4, 5, 6])
    twin = ld.EagerSession(model)
    twin.load_state(session.state())
    assert np.array_equal(session.step([7]), twin.step([7]))


def header(meta: object) -> bytes:
    text = json.dumps({"__metadata__": meta}).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable state file"),
        (b"\xff" * 8, "not a readable state file"),
        (header({"format": "pt"}), "not a readable state file"),
        (header({"format": "pt", "version": "1"}), "its format is 'pt'"),
        (header({"format": "liger_state", "version": "2"}), "update liger-deploy"),
        (header({"format": "liger_state", "version": "1"}), "needs a tensor 'length'"),
    ],
)
def test_bad_state_files_say_why(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_bytes(content)
    with pytest.raises(StateError, match=message):
        State.load(path)
    with pytest.raises(StateError, match="No such file"):
        State.load(tmp_path / "absent")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_state_files_never_crash(data: st.DataObject, tmp_path: Path) -> None:
    spec = StateSpec.of(LigerConfig(window=2), ModelShape(1, 2, 1, 2))
    path = tmp_path / "s"
    State(spec.zeros(1), "m").save(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
    try:
        spec.check(State.load(path))
    except StateError as error:
        assert "\n" not in str(error)  # noqa: PT017
