"""Rungs 5 and 6: the traced graph and ONNX Runtime equal PyTorch, and a state moves between them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from transformers import PreTrainedModel

import liger_deploy as ld
from liger_deploy.errors import BundleError
from liger_deploy.export.graph import trace_prefill
from liger_deploy.model.step import PrefillModel
from liger_deploy.runtimes.session import BaseSession
from liger_deploy.text import Text
from liger_deploy.verify import compare
from tests.conftest import relative, relisted, small_llama
from tests.tolerances import MODEL


@pytest.fixture(params=["eager", "onnx"])
def session(request: pytest.FixtureRequest, tiny: PreTrainedModel, tiny_bundle: Path) -> BaseSession:
    return ld.EagerSession(tiny) if request.param == "eager" else ld.load_session(tiny_bundle)


@pytest.fixture(scope="module")
def prompt(tiny_bundle: Path) -> list[int]:
    return Text(ld.Bundle.open(tiny_bundle)).encode(Path(__file__).read_text(encoding="utf-8"))[:300]


def greedy(session: BaseSession, first: int, count: int) -> list[int]:
    tokens = [first]
    while len(tokens) < count:
        tokens.append(int(session.step([tokens[-1]])[0].argmax()))
    return tokens


def test_traced_graph_is_the_model(tiny: PreTrainedModel) -> None:
    prefill = PrefillModel(tiny)
    program = trace_prefill(tiny, 64, 0).module()
    with torch.no_grad():
        for rows, tokens in ((1, 1), (2, 64), (5, 33)):
            arguments = torch.randint(0, 2048, (rows, tokens)), torch.full((rows,), tokens), *prefill.zeros(rows)
            for ours, expected in zip(program(*arguments), prefill(*arguments), strict=True):
                assert torch.equal(ours, expected)


def test_one_call_is_300_steps_is_any_split(session: BaseSession, prompt: list[int]) -> None:
    whole, split = session.fork(), session.fork()
    for token in prompt:
        stepped = session.step([token])
    logits = whole.prefill(prompt)
    split.prefill(prompt[:100])
    split.prefill(prompt[100:237])
    for token in prompt[237:]:
        parts = split.step([token])
    assert relative(logits, stepped) < MODEL
    assert relative(parts, stepped) < MODEL
    expected = session.state()
    for other in (whole.state(), split.state()):
        for name, tensor in expected.tensors.items():
            assert relative(other.tensors[name], tensor) < MODEL
    assert expected.tensors["length"].tolist() == [300]


@pytest.mark.parametrize("there", ["eager", "onnx"])
def test_a_saved_state_continues_elsewhere(
    session: BaseSession, there: str, tiny: PreTrainedModel, tiny_bundle: Path, prompt: list[int], tmp_path: Path
) -> None:
    first = int(session.prefill(prompt[:150])[0].argmax())
    session.state().save(tmp_path / "chat.safetensors")
    other = ld.EagerSession(tiny) if there == "eager" else ld.load_session(tiny_bundle)
    other.load_state(ld.State.load(tmp_path / "chat.safetensors"))
    assert greedy(other, first, 100) == greedy(session, first, 100)


def test_bundle_passes_its_own_table(tiny: PreTrainedModel, tiny_bundle: Path, prompt: list[int]) -> None:
    rows = compare(ld.load_session(tiny_bundle), ld.EagerSession(tiny), prompt)
    assert len(rows) == 14
    assert [row.check for row in rows if not row.passed] == []


def test_ragged_batch_is_each_row_alone(session: BaseSession, prompt: list[int]) -> None:
    lengths = [300, 1, 257, 64]
    batch = np.zeros((4, 300), np.int64)
    for row, length in enumerate(lengths):
        batch[row, :length] = prompt[:length]
    alone = session.fork()
    logits = session.prefill(batch, lengths)
    after = session.step([7, 8, 9, 10])
    for row, length in enumerate(lengths):
        alone.reset()
        assert relative(logits[row], alone.prefill(prompt[:length])[0]) < MODEL
        assert relative(after[row], alone.step([7 + row])[0]) < MODEL


def test_fork_shares_nothing_that_changes(session: BaseSession, prompt: list[int]) -> None:
    session.prefill(prompt)
    twin = session.fork()
    expected = session.fork().step([5])
    for token in (9, 10, 11):
        twin.step([token])
    assert np.array_equal(session.step([5]), expected)
    kept = session.step([6])
    copy = kept.copy()
    session.step([7])
    assert np.array_equal(kept, copy)  # returned logits are the caller's


def test_opset_and_operator(tiny_bundle: Path) -> None:
    model = onnx.load(tiny_bundle / "model.onnx", load_external_data=False)
    assert {(o.domain, o.version) for o in model.opset_import} >= {("", 21), ("com.microsoft", 1)}
    assert [node.op_type for node in model.graph.node if node.domain == "liger"] == ["Attention"] * 4
    (body,) = model.functions
    assert (body.domain, body.name) == ("liger", "Attention")
    assert sum(node.op_type == "LinearAttention" for node in body.node) == 1


def test_a_graph_newer_than_the_runtime_is_one_line(tiny_bundle: Path, tmp_path: Path) -> None:
    """What an older ONNX Runtime meets: an opset that it does not know."""
    copy = shutil.copytree(tiny_bundle, tmp_path / "b")
    model = onnx.load(copy / "model.onnx", load_external_data=False)
    next(o for o in model.opset_import if not o.domain).version = 99
    onnx.save(model, copy / "model.onnx")
    with pytest.raises(BundleError, match=r"does not load in onnxruntime \d") as failure:
        ld.load_session(relisted(copy))
    assert "99" in str(failure.value)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("options", [{"batch": 2}, {"chunk": 16}, {"chunk": 1}], ids=str)
def test_options_of_the_graph(options: dict[str, int], tmp_path: Path) -> None:
    model = ld.linearize(small_llama(tie_word_embeddings=True), ld.LigerConfig(window=5))
    ld.export_bundle(model, "onnx", tmp_path / "b", ld.ExportOptions(**options))  # type: ignore[arg-type]
    ours, oracle = ld.load_session(tmp_path / "b"), ld.EagerSession(model)
    tokens = np.random.default_rng(0).integers(0, 97, (2, 50))
    assert relative(ours.prefill(tokens, [50, 20]), oracle.prefill(tokens, [50, 20])) < MODEL
    assert relative(ours.step([1, 2]), oracle.step([1, 2])) < MODEL
    ours.reset()
    if options.get("batch"):
        with pytest.raises(ld.UserError, match="batch of 2"):
            ours.step([1])


def test_a_model_of_another_dtype_is_copied(tmp_path: Path) -> None:
    model = ld.linearize(small_llama()).to(torch.bfloat16)
    bundle = ld.export_bundle(model, "onnx", tmp_path / "b")
    assert bundle.manifest.model.dtype == "float32"
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert bundle.manifest.model.fingerprint == ld.EagerSession(model).manifest.model.fingerprint
    oracle, tokens = ld.EagerSession(model.float()), np.arange(90)
    assert relative(ld.load_session(bundle).prefill(tokens), oracle.prefill(tokens)) < MODEL


def test_extreme_gates_survive_the_runtime(tmp_path: Path) -> None:
    """Gate logits near -60 and +60, where a Sigmoid saturates."""
    model = ld.linearize(small_llama(), ld.LigerConfig(window=2, gate_normalizer=1))
    for layer in model.model.layers:
        layer.self_attn.k_proj.weight.data *= 6
    ld.export_bundle(model, "onnx", tmp_path / "b")
    ours, oracle = ld.load_session(tmp_path / "b"), ld.EagerSession(model)
    tokens = np.random.default_rng(0).integers(0, 97, (1, 200))
    assert relative(ours.prefill(tokens), oracle.prefill(tokens)) < MODEL
    for name, tensor in oracle.state().tensors.items():
        assert relative(ours.state().tensors[name], tensor) < MODEL
