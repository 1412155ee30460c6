"""The C++ SDK on every runtime: tokens, samples and states are Python's, and what is broken is one line."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import liger_deploy as ld
from liger_deploy.bundle import Bundle
from liger_deploy.generate import generate
from liger_deploy.sampling import SamplingOptions
from liger_deploy.text import Text
from liger_deploy.verify import verify
from tests.conftest import liger, relisted, rewritten, small_llama
from tests.native.programs import PROMPT, RUNTIME, call, ids, probe

GREEDY = ["--temperature", 0, "--print-ids", "--max-new-tokens"]


@pytest.fixture(params=["onnx", "executorch", "inductor"])
def bundle(request: pytest.FixtureRequest) -> Path:
    """The embedded model's bundle for each target."""
    fixture = "tiny_bundle" if request.param == "onnx" else f"tiny_{request.param}"
    return Path(request.getfixturevalue(fixture))


def python(bundle: Path, count: int, options: SamplingOptions | None = None) -> list[int]:
    opened = Bundle.open(bundle)
    stop = opened.manifest.generation.eos_token_ids
    return list(generate(ld.load_session(opened), Text(opened).encode(PROMPT), count, options, stop))


def test_greedy_tokens_are_pythons(bundle: Path) -> None:
    assert ids(call(bundle, "--prompt", PROMPT, *GREEDY, 256)) == python(bundle, 256)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(0.8, 0, 1.0), (1.3, 50, 0.9), (0.5, 3, 0.4)])
def test_sampled_tokens_are_pythons(bundle: Path, temperature: float, top_k: int, top_p: float) -> None:
    for seed in (0, 7, 123456789):
        options = SamplingOptions(temperature, top_k, top_p, seed)
        flags = ["--temperature", temperature, "--top-k", top_k, "--top-p", top_p, "--seed", seed]
        found = call(bundle, "--prompt", PROMPT, "--print-ids", "--max-new-tokens", 100, *flags)
        assert ids(found) == python(bundle, 100, options)


def test_text_is_pythons(bundle: Path) -> None:
    expected = Text(Bundle.open(bundle)).decode(python(bundle, 80))
    assert call(bundle, "--prompt", PROMPT, "--max-new-tokens", 80, "--temperature", 0) == expected + "\n"


def test_states_move_both_ways(bundle: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    """C++ to Python on ONNX Runtime and back, values within rounding and tokens equal."""
    expected = python(bundle, 60)
    call(bundle, "--prompt", PROMPT, *GREEDY, 30, "--save-state", tmp_path / "cpp.state")
    session = ld.load_session(tiny_bundle)
    session.load_state(ld.State.load(tmp_path / "cpp.state"))
    again = ld.load_session(tiny_bundle)
    again.prefill([Text(Bundle.open(bundle)).encode(PROMPT) + expected[:30]])
    for name, tensor in again.state().tensors.items():
        np.testing.assert_allclose(session.state().tensors[name], tensor, atol=1e-4)
    token = expected[30]
    for following in expected[31:40]:
        token = int(session.step([token]).argmax())
        assert token == following
    session.state().save(tmp_path / "python.state")
    found = call(bundle, "--tokens", expected[39], *GREEDY, 20, "--load-state", tmp_path / "python.state")
    assert ids(found) == expected[40:60]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cpp.state", "python.state"]


def test_a_float16_program(tiny_executorch: Path, tmp_path: Path) -> None:
    """Half the size, close to PyTorch, and in C++ what it is in Python; its state is float32 all the same."""
    options = ld.ExportOptions(dtype="float16", chunk=16)
    bundle = ld.export_bundle(None, "executorch", tmp_path / "b", options)
    assert [row.check for row in verify(bundle.path, tokens=32) if not row.passed] == []
    assert {t.dtype for t in bundle.manifest.graph.state} == {"float32", "int64"}
    sizes = [(path / "model.pte").stat().st_size for path in (bundle.path, tiny_executorch)]
    assert sizes[0] < 0.6 * sizes[1]
    assert ids(call(bundle.path, "--prompt", PROMPT, *GREEDY, 60)) == python(bundle.path, 60)


def test_our_operator_in_a_program(tmp_path: Path) -> None:
    """`--backend liger` in C++: the tokens of Python's session."""
    model = liger(small_llama(), window=6)
    bundle = ld.export_bundle(model, "executorch", tmp_path / "b", ld.ExportOptions(backend="liger", chunk=8))
    expected = list(generate(ld.load_session(bundle), list(range(5, 30)), 40))
    assert ids(call(bundle.path, "--tokens", " ".join(map(str, range(5, 30))), *GREEDY, 40)) == expected


@pytest.mark.slow
def test_weights_beside_a_program(tmp_path: Path) -> None:
    """`--external-weights`: a small program, and the file of another one serves it as well."""
    model, made = liger(small_llama(num_hidden_layers=1), window=6), {}
    for chunk in (8, 12):
        options = ld.ExportOptions(external_weights=True, chunk=chunk)
        made[chunk] = ld.export_bundle(model, "executorch", tmp_path / str(chunk), options).path
    pte, ptd = ((made[8] / name).stat().st_size for name in ("model.pte", "model.ptd"))
    assert ptd > 0.8 * 4 * sum(p.numel() for p in model.parameters())
    assert pte < 0.5 * ptd
    shutil.copy(made[12] / "model.ptd", made[8])
    prompt = list(range(5, 30))
    expected = list(generate(ld.EagerSession(model), prompt, 40))
    assert list(generate(ld.load_session(relisted(made[8])), prompt, 40)) == expected
    assert ids(call(made[8], "--tokens", " ".join(map(str, prompt)), *GREEDY, 40)) == expected
    (made[8] / "model.ptd").write_bytes(b"junk" * 100)
    assert "model.ptd is no weight file of ExecuTorch" in call(relisted(made[8]), "--tokens", "5", rc=2)
    with pytest.raises(ld.UserError, match=r"model\.pte does not load in ExecuTorch"):
        ld.load_session(made[8])


@pytest.mark.parametrize("name", ["tiny_bundle", "tiny_inductor"])
def test_ragged_rows(name: str, request: pytest.FixtureRequest) -> None:
    """Three rows of 300, 1 and 270 tokens at once, so several prefill calls, against each alone: logits' difference."""
    assert float(probe("rows", request.getfixturevalue(name), RUNTIME)) < 1e-4


def test_sixty_four_threads_over_one_bundle(bundle: Path) -> None:
    """Each of 64 forks gives a lone session's tokens; each takes less than a twentieth of the weights."""
    answer = probe("threads", bundle, RUNTIME, 64).split()
    assert answer[0] == "equal"
    assert float(answer[1]) < 0.5, "megabytes a fork"


def test_bench_prints_json(bundle: Path) -> None:
    found = json.loads(call(bundle, "--prompt", PROMPT, "--bench", 20))
    assert found["steps"] == 20
    assert 0 < found["step_ms_p10"] <= found["step_ms_median"] <= found["step_ms_p90"]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format_version"], 99, "has bundle format 99, this library reads up to 1"),
        (["graph", "chunk"], -5, "chunk is out of bounds"),
        (["graph", "chunk"], 1 << 70, "chunk must be an integer"),
        (["model", "vocab_size"], "many", "vocab_size must be an integer"),
        (["model", "vocab_size"], 1 << 30, "vocab_size is too large"),
        (["graph", "files", "model"], "../../etc/passwd", "is not listed in files"),
        (["files", "../x"], {"size": 1, "sha256": ""}, "names a file outside the bundle"),
        (["files", "model.onnx", "size"], 5, "has 5 bytes, it has"),
        (["files", "model.onnx", "sha256"], "0" * 64, "does not match the checksum of model.onnx"),
        (["files", "none.bin"], {"size": 5, "sha256": ""}, "none.bin, which is missing"),
        (["graph", "state"], [], "graph.state must be a list"),
        (["target"], "coreml", "no runtime for target 'coreml'; known are onnx, executorch, inductor"),
        (["target"], "executorch", "does not load in ExecuTorch: it is damaged, or for another version"),
        (["target"], "inductor", "was exported for a GPU: this library runs CPU packages"),
        (["graph", "requires"], {"device": "cuda"}, "was exported for a GPU: this library runs it on CPUs"),
        (["model"], ..., "lacks key 'model'"),
    ],
)
def test_a_bad_manifest_is_one_line(
    tiny_bundle: Path, tmp_path: Path, path: list[str], value: object, message: str
) -> None:
    assert message in call(rewritten(tiny_bundle, tmp_path / "b", path, value), "--tokens", "5", rc=2)


def test_bad_calls_are_one_line(tiny_bundle: Path, tmp_path: Path) -> None:
    """Each says what is wrong."""
    state = tmp_path / "x.state"
    call(tiny_bundle, "--tokens", "5 6", "--max-new-tokens", 1, "--save-state", state)
    (tmp_path / "short.state").write_bytes(state.read_bytes()[:-9])
    dataclasses.replace(ld.State.load(state), model="z").save(tmp_path / "other.state")
    for words, message in (
        ([tmp_path, "--tokens", "5"], "is not a bundle: it has no manifest.json"),
        ([tiny_bundle, "--tokens", "5 99999"], "token id 99999 is out of range"),
        ([tiny_bundle, "--tokens", ""], "the prompt is empty"),
        ([tiny_bundle, "--tokens", "five"], "--tokens takes token ids"),
        ([tiny_bundle, "--prompt", b"h\xe9llo"], "the prompt: is not UTF-8 at byte 1"),
        ([tiny_bundle, "--prompt", "a", "--chat"], "has no chat template"),
        ([tiny_bundle, "--tokens", "5", "--top-p", "2"], "top-p must be above 0"),
        ([tiny_bundle, "--tokens", "5", "--runtime", "/nowhere.so"], "ONNX Runtime is not found"),
        ([tiny_bundle, "--tokens", "5", "--ops", state], "does not load in ONNX Runtime"),
        ([tiny_bundle, "--tokens", "5", "--load-state", tmp_path / "none"], "cannot be read"),
        ([tiny_bundle, "--tokens", "5", "--load-state", tmp_path / "short.state"], "ends beyond the file"),
        ([tiny_bundle, "--tokens", "5", "--load-state", tmp_path / "other.state"], "belongs to model z"),
        ([tiny_bundle, "--colour", "5"], "unknown option --colour"),
        ([tiny_bundle], "either --prompt or --tokens"),
    ):
        assert message in call(*words, rc=2)


def test_a_broken_program_is_one_line(tiny_executorch: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_executorch, tmp_path / "b")
    whole = (copy / "model.pte").read_bytes()
    for bytes_, message in (
        (whole[:100_000], "File size is too small"),
        (b"\0" * 100_000, "does not load in ExecuTorch"),
    ):
        (copy / "model.pte").write_bytes(bytes_)
        assert message in call(relisted(copy), "--tokens", "5", rc=2)
    other = rewritten(tiny_executorch, tmp_path / "c", ["graph", "chunk"], 8)
    assert "inputs or outputs of 'prefill' are not those of the manifest" in call(other, "--tokens", "5", rc=2)
    assert "threads must be 1 or 0" in call(tiny_executorch, "--tokens", "5", "--threads", 3, rc=2)


def test_a_broken_package_is_one_line(tiny_inductor: Path, tmp_path: Path) -> None:
    for i, (key, value, message) in enumerate(
        (
            ("torch", "2.5", "was compiled for torch 2.5, here it is"),
            ("cpu", "AVX1024", "for a processor with AVX1024, this one has"),
            ("device", "cuda", "was exported for a GPU"),
        )
    ):
        copy = rewritten(tiny_inductor, tmp_path / str(i), ["graph", "requires", key], value)
        assert message in call(copy, "--tokens", "5", rc=2)
    copy = shutil.copytree(tiny_inductor, tmp_path / "b")
    (copy / "model.safetensors").write_bytes(b"junkjunkjunk")
    assert "is no weight file" in call(relisted(copy), "--tokens", "5", rc=2)
    shutil.copy(tiny_inductor / "model.safetensors", copy)
    (copy / "model.pt2").write_bytes(b"junk")
    assert "does not load in AOTInductor" in call(relisted(copy), "--tokens", "5", rc=2)
