"""The ExecuTorch target: the delegated form equals the model, and its programs equal PyTorch on the real runtime."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import liger_deploy as ld
from liger_deploy.export import EMBEDDED
from liger_deploy.export.delegated import Delegated
from liger_deploy.gates import STRUCTURES
from liger_deploy.model.ops import has_one_node
from liger_deploy.model.step import PrefillModel, StepModel
from liger_deploy.text import Text
from liger_deploy.verify import compare, verify
from tests.conftest import liger, relative, relisted, small_llama
from tests.test_attention import SIZES
from tests.test_families import FAMILIES, family
from tests.tolerances import MODEL

FORMS = [name for name in STRUCTURES if has_one_node(ld.LigerConfig(name))]


@pytest.fixture
def bundle(tiny_executorch: Path) -> Path:
    return tiny_executorch


def test_threads_are_set_once(bundle: Path) -> None:
    """In a process of its own: one thread, and no other number afterwards."""
    code = f"""
import liger_deploy as ld
from liger_deploy.runtimes.executorch import ExecuTorchSession
bundle = ld.Bundle.open({str(bundle)!r})
for threads in (1, 0, 1, 2):
    try:
        print(int(ExecuTorchSession(bundle, threads).prefill([5, 6, 7]).argmax()))
    except ld.UserError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    expected = int(ld.load_session(bundle).prefill([5, 6, 7]).argmax())
    refused = "ExecuTorch's pool has 1 threads in this process, not 2: start another process"
    assert done.stdout.splitlines() == [*[str(expected)] * 3, refused], done.stderr[-2000:]


@pytest.mark.parametrize(("name", "structure"), [*((f, "gla") for f in FAMILIES), *(("llama", s) for s in FORMS)])
def test_the_delegated_form_is_the_model(name: str, structure: str) -> None:
    """Two ragged prefills and a step in PyTorch, gates strong and weak."""
    model = liger(family(name), structure=structure, window=6, gate_normalizer=1)
    for layer in model.model.layers:
        for weight in (
            x for key, x in layer.self_attn.named_parameters() if key in ("k_proj.weight", "qkv_proj.weight")
        ):
            weight.data *= 8
    prefill, step = PrefillModel(model), StepModel(model)
    state = prefill.zeros(2)
    with torch.no_grad():
        for valid in ([12, 3], [12, 7]):
            inputs = (torch.randint(3, 97, (2, 12)), torch.tensor(valid), *state)
            expected = prefill(*inputs)
            for core_ml in (False, True):
                for ours, theirs in zip(Delegated(prefill, 12, core_ml)(*inputs), expected, strict=True):
                    assert relative(ours, theirs) < MODEL
            state = expected[1:]
        inputs = (torch.tensor([5, 6]), *state)
        for core_ml in (False, True):
            for ours, theirs in zip(Delegated(step, 1, core_ml)(*inputs), step(*inputs), strict=True):
                assert relative(ours, theirs) < MODEL


def test_a_wide_window_keeps_its_last_entries() -> None:
    """Wider than the one-hot product serves."""
    model = liger(family("llama"), structure="window", window=600)
    prefill = PrefillModel(model)
    state = tuple(torch.randn(x.shape) if x.dim() > 1 else torch.tensor([700, 700]) for x in prefill.zeros(2))
    inputs = (torch.randint(3, 97, (2, 9)), torch.tensor([9, 4]), *state)
    with torch.no_grad():
        for ours, theirs in zip(Delegated(prefill, 9)(*inputs), prefill(*inputs), strict=True):
            assert relative(ours, theirs) < MODEL


def test_the_trained_model_passes_its_table(bundle: Path, tiny: PreTrainedModel) -> None:
    prompt = Text(ld.Bundle.open(bundle)).encode(Path(__file__).read_text(encoding="utf-8"))[:300]
    rows = compare(ld.load_session(bundle), ld.EagerSession(tiny), prompt)
    assert len(rows) == 14
    assert [row.check for row in rows if not row.passed] == []


@pytest.mark.parametrize("way", ["to onnx", "from onnx"])
def test_states_move_between_runtimes(way: str, bundle: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    here, there = (ld.load_session(x) for x in ((bundle, tiny_bundle) if way == "to onnx" else (tiny_bundle, bundle)))
    prompt = Text(ld.Bundle.open(bundle)).encode("def mean(values):\n    return sum(values) / len(values)\n" * 9)[:150]
    token = int(here.prefill(prompt)[0].argmax())
    here.state().save(tmp_path / "s.safetensors")
    there.load_state(ld.State.load(tmp_path / "s.safetensors"))
    for _ in range(100):
        logits = here.step([token])
        assert relative(there.step([token]), logits) < MODEL
        token = int(logits[0].argmax())


def test_sessions_share_a_program_and_nothing_that_changes(bundle: Path) -> None:
    session = ld.load_session(bundle)
    session.prefill(list(range(70)))
    twin = session.fork()
    assert twin._program is session._program  # type: ignore[attr-defined]
    expected = session.fork().step([5])
    kept = expected.copy()
    for token in (9, 10, 11):
        twin.step([token])
    assert np.array_equal(session.step([5]), expected)
    assert np.array_equal(expected, kept)  # returned logits are the caller's
    with pytest.raises(ld.UserError, match="exported for a batch of 1, not 2"):
        ld.load_session(bundle).step([1, 2])


def test_what_does_not_load_says_why(bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def broken(change: Callable[[bytes], bytes]) -> str:
        copy = shutil.copytree(bundle, tmp_path / "b")
        (copy / "model.pte").write_bytes(change((copy / "model.pte").read_bytes()))
        relisted(copy)
        with pytest.raises(ld.UserError, match="does not load in ExecuTorch") as caught:
            ld.load_session(copy)
        shutil.rmtree(copy)
        return str(caught.value)

    assert "overflow" in broken(lambda _: b"junk")
    assert "File size is too small" in broken(lambda content: content[: len(content) // 2])
    assert "Backend XnnpackBackenX is not registered" in broken(
        lambda x: x.replace(b"XnnpackBackend", b"XnnpackBackenX")
    )
    assert "kernel 'aten::embeddinX.out' not found" in broken(
        lambda x: x.replace(b"aten::embedding", b"aten::embeddinX")
    )
    assert "has no method 'prefill'" in broken(lambda x: x.replace(b"prefill", b"prefilX"))
    assert "model.pte" not in capfd.readouterr().err


def test_layers_are_delegated_whole(bundle: Path) -> None:
    """Counted in the program itself: pieces of the graph that XNNPACK runs do not grow with the number of layers."""
    delegates, outside = split(bundle)
    assert delegates == {"decode": ["XnnpackBackend"] * 4, "prefill": ["XnnpackBackend"] * 7}
    assert not outside & {"aten::mm", "aten::bmm", "aten::addmm", "aten::linear", "aten::_softmax", "aten::exp"}


def split(bundle: Path) -> tuple[dict[str, list[str]], set[str]]:
    """The delegates of each method of a program, and the operators that stayed outside of them."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    program = deserialize_pte_binary((bundle / "model.pte").read_bytes()).program
    delegates = {plan.name: [delegate.id for delegate in plan.delegates] for plan in program.execution_plan}
    return delegates, {op.name for plan in program.execution_plan for op in plan.operators}


def test_a_program_without_delegates_runs(tmp_path: Path) -> None:
    """`--backend portable`."""
    model = liger(small_llama(num_hidden_layers=1), window=6)
    options = ld.ExportOptions(backend="portable", chunk=8)
    bundle = ld.export_bundle(model, "executorch", tmp_path / "b", options)
    assert split(bundle.path)[0] == {"decode": [], "prefill": []}
    assert bundle.manifest.graph.requires == {}
    rows = compare(ld.load_session(bundle), ld.EagerSession(model), list(range(5, 35)), 8)
    assert [row for row in rows if not row.passed] == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "registered"), [("coreml", "CoreMLBackend"), ("vulkan", "VulkanBackend")])
def test_other_delegates_are_lowered_ahead_of_time(name: Any, registered: str, tmp_path: Path) -> None:
    """They do not run here, and the session says so: the program is only looked at."""
    model = liger(small_llama(num_hidden_layers=1), window=6)
    bundle = ld.export_bundle(model, "executorch", tmp_path / "b", ld.ExportOptions(backend=name, chunk=8))
    delegates, outside = split(bundle.path)
    assert {x for names in delegates.values() for x in names} == {registered}
    assert not outside & {"aten::mm", "aten::bmm", "aten::addmm", "aten::linear"}
    if name == "coreml":
        assert delegates == {"decode": [registered], "prefill": [registered]}
        assert not outside
    assert bundle.manifest.graph.requires == {"backend": registered}
    with pytest.raises(ld.UserError, match=f"was lowered for {registered}, and this build of ExecuTorch has"):
        ld.load_session(bundle)


@pytest.mark.parametrize(
    "config", [{}, {"structure": "mamba2"}, {"structure": "hgrn2"}, {"softmax_layers": (1,)}, {"structure": "window"}]
)
def test_our_operator(config: dict[str, Any], tmp_path: Path) -> None:
    """`--backend liger`: layers with a recurrence are one operator each, the rest stays XNNPACK's."""
    model = liger(small_llama(), window=6, **config)
    bundle = ld.export_bundle(model, "executorch", tmp_path / "b", ld.ExportOptions(backend="liger", chunk=8))
    assert bundle.manifest.graph.requires == {"backend": "XnnpackBackend", "operators": "liger"}
    delegates, outside = split(bundle.path)
    assert ("liger::fused_attention" in outside) == (config.get("structure") != "window")
    assert {x for names in delegates.values() for x in names} == {"XnnpackBackend"}
    rows = compare(ld.load_session(bundle), ld.EagerSession(model), list(range(5, 35)), 8)
    assert [row for row in rows if not row.passed] == []


def test_our_operator_missing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = liger(small_llama(num_hidden_layers=1), window=6)
    bundle = ld.export_bundle(model, "executorch", tmp_path / "b", ld.ExportOptions(backend="liger", chunk=8))
    monkeypatch.setattr("liger_deploy.runtimes.executorch.OPS", tmp_path / "none.so")
    with pytest.raises(ld.UserError, match=r"was lowered with --backend liger, and .*none\.so is not there: build it"):
        ld.load_session(bundle)


def test_our_operator_is_registered_as_it_behaves() -> None:
    q, k, count = torch.randn(1, 3, 2, 2, 8), torch.randn(1, 3, 2, 8), torch.tensor([3])
    windows, rope = [torch.randn(1, 2, 4, 8) for _ in range(2)], [torch.randn(7, 8) for _ in range(2)]
    arguments = (q, k, k, k, count, count, torch.randn(1, 2, 8, 8), *windows, *rope)
    options = ("gla", True, 16.0, 0.0, 0.5, 0.5, 0.25)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.liger.fused_attention.default, (*arguments, *options), test_utils=checks)


def test_backends_refuse_what_they_do_not_take(tmp_path: Path) -> None:
    with pytest.raises(ld.UserError, match="--backend coreml does not take --quant int4: choose none"):
        ld.export_bundle(None, "executorch", tmp_path / "b", ld.ExportOptions(backend="coreml", quant="int4"))
    for options in (
        ld.ExportOptions(backend="coreml", dtype="float16"),
        ld.ExportOptions(dtype="float16", quant="int8"),
    ):
        with pytest.raises(ld.UserError, match="does not take --dtype float16 with --quant"):
            ld.export_bundle(None, "executorch", tmp_path / "b", options)
    with pytest.raises(ld.UserError, match="--external-weights does not go with --quant int8"):
        ld.export_bundle(None, "executorch", tmp_path / "b", ld.ExportOptions(external_weights=True, quant="int8"))
    with pytest.raises(ld.UserError, match="target 'onnx' has no --external-weights"):
        ld.export_bundle(None, "onnx", tmp_path / "b", ld.ExportOptions(external_weights=True))
    with pytest.raises(ld.UserError, match="target 'onnx' has no --backend vulkan"):
        ld.export_bundle(None, "onnx", tmp_path / "b", ld.ExportOptions(backend="vulkan"))


# What has no delegated form, or only in part: lowered from the plain one.
PLAIN: list[tuple[str, dict[str, Any]]] = [
    ("phi3", {"structure": "gsa", "window": 6} | SIZES["gsa"]),
    ("qwen2", {"structure": "lolcats", "window": 6} | SIZES["lolcats"]),
    ("gemma3_text", {"structure": "mamba2", "softmax_layers": (1,), "softmax_window": 20, "sinks": 2, "window": 6}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "config"), PLAIN, ids=str)
def test_every_form_lowers(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    model = liger(family(name), **config)
    ld.export_bundle(model, "executorch", tmp_path / "b", ld.ExportOptions(batch=2, chunk=8))
    ours, oracle = ld.load_session(tmp_path / "b"), ld.EagerSession(model)
    tokens = np.random.default_rng(0).integers(3, 97, (2, 90))
    assert relative(ours.prefill(tokens, [90, 33]), oracle.prefill(tokens, [90, 33])) < MODEL
    for token in range(10, 30):
        logits, expected = (x.step([token, token + 40]) for x in (ours, oracle))
        assert relative(logits, expected) < MODEL
    for key, tensor in oracle.state().tensors.items():
        assert relative(ours.state().tensors[key], tensor) < MODEL


def test_extreme_gates_survive_the_delegate(tmp_path: Path) -> None:
    """Gate logits near -60 and +60."""
    model = ld.linearize(small_llama(num_hidden_layers=1), ld.LigerConfig(window=2, gate_normalizer=1))
    model.model.layers[0].self_attn.k_proj.weight.data *= 6
    ld.export_bundle(model, "executorch", tmp_path / "b", ld.ExportOptions(chunk=16))
    ours, oracle = ld.load_session(tmp_path / "b"), ld.EagerSession(model)
    tokens = np.random.default_rng(0).integers(0, 97, (1, 90))
    assert relative(ours.prefill(tokens), oracle.prefill(tokens)) < MODEL
    for name, tensor in oracle.state().tensors.items():
        assert relative(ours.state().tensors[name], tensor) < MODEL


@pytest.mark.slow
@pytest.mark.parametrize(("quant", "least", "size"), [("int4", 1e-3, 3.4e6), ("int8", 1e-6, 3.6e6)])
def test_fewer_bits_stay_close(quant: Any, least: float, size: float, tmp_path: Path) -> None:
    bundle = ld.export_bundle(EMBEDDED, "executorch", tmp_path / "b", ld.ExportOptions(quant=quant, chunk=16))
    rows = {row.check: row for row in verify(bundle.path)}
    assert [row.check for row in rows.values() if not row.passed] == []
    assert rows["mean divergence (KL, nats a token)"].value > least  # it is quantized
    assert bundle.manifest.files["model.pte"].size < size  # float32: 10.7 MB


def test_what_quantization_does_not_reach_is_refused(tmp_path: Path) -> None:
    options = ld.ExportOptions(quant="int4")
    with pytest.raises(ld.UserError, match="--quant does not reach weight"):
        ld.export_bundle(ld.linearize(family("qwen3_moe")), "executorch", tmp_path / "b", options)
    odd_rows = ld.linearize(small_llama(intermediate_size=72))
    with pytest.raises(ld.UserError, match="needs rows in groups of 32"):
        ld.export_bundle(odd_rows, "executorch", tmp_path / "b", options)
    with pytest.raises(ld.UserError, match="fixes the number of rows at export"):
        ld.export_bundle(None, "executorch", tmp_path / "b", ld.ExportOptions(batch=0))
    assert not (tmp_path / "b").exists()
