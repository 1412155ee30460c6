"""The C++ SDK on ONNX Runtime: tokens, samples and states are Python's, and what is broken is one line."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import string
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import liger_deploy as ld
from liger_deploy.bundle import Bundle
from liger_deploy.generate import generate
from liger_deploy.sampling import SamplingOptions
from liger_deploy.text import Text

ROOT = Path(__file__).parents[1]
RUN, PROBE = ROOT / "liger_deploy" / "native" / "liger-run", ROOT / "build" / "native" / "liger-probe"
RUNTIME = next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*"))
PROMPT = "def add(a, b):\n    return a + b\n\n\ndef "


def call(*words: object, rc: int = 0) -> str:
    """Standard output of liger-run; its one line of error if it is to fail."""
    done = subprocess.run([RUN, *map(str, words)], capture_output=True, text=True, env={"LIGER_ONNXRUNTIME": RUNTIME})
    assert done.returncode == rc, done.stderr
    if rc:
        assert done.stderr.count("\n") == 1
        assert not done.stdout
        return done.stderr
    return done.stdout


def probe(*words: object, stdin: str = "") -> str:
    done = subprocess.run([PROBE, *map(str, words)], input=stdin, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def ids(text: str) -> list[int]:
    return [int(word) for word in text.split()]


def python(bundle: Path, count: int, options: SamplingOptions | None = None) -> list[int]:
    opened = Bundle.open(bundle)
    stop = opened.manifest.generation.eos_token_ids
    return list(generate(ld.load_session(opened), Text(opened).encode(PROMPT), count, options, stop))


def test_greedy_tokens_are_pythons(tiny_bundle: Path) -> None:
    found = call(tiny_bundle, "--prompt", PROMPT, "--print-ids", "--temperature", 0)
    assert ids(found) == python(tiny_bundle, 256)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(0.8, 0, 1.0), (1.3, 50, 0.9), (0.5, 3, 0.4)])
def test_sampled_tokens_are_pythons(tiny_bundle: Path, temperature: float, top_k: int, top_p: float) -> None:
    for seed in (0, 7, 123456789):
        options = SamplingOptions(temperature, top_k, top_p, seed)
        flags = ["--temperature", temperature, "--top-k", top_k, "--top-p", top_p, "--seed", seed]
        found = call(tiny_bundle, "--prompt", PROMPT, "--print-ids", "--max-new-tokens", 100, *flags)
        assert ids(found) == python(tiny_bundle, 100, options)


def test_text_is_pythons(tiny_bundle: Path) -> None:
    expected = Text(Bundle.open(tiny_bundle)).decode(python(tiny_bundle, 80))
    assert call(tiny_bundle, "--prompt", PROMPT, "--max-new-tokens", 80, "--temperature", 0) == expected + "\n"


def test_states_move_both_ways(tiny_bundle: Path, tmp_path: Path) -> None:
    """C++ to Python and back, values within rounding and tokens equal."""
    expected = python(tiny_bundle, 60)
    flags = ["--print-ids", "--temperature", 0, "--max-new-tokens"]
    call(tiny_bundle, "--prompt", PROMPT, *flags, 30, "--save-state", tmp_path / "cpp.state")
    session = ld.load_session(tiny_bundle)
    session.load_state(ld.State.load(tmp_path / "cpp.state"))
    again = ld.load_session(tiny_bundle)
    again.prefill([Text(Bundle.open(tiny_bundle)).encode(PROMPT) + expected[:30]])
    for name, tensor in again.state().tensors.items():
        np.testing.assert_allclose(session.state().tensors[name], tensor, atol=1e-4)
    token = expected[30]
    for following in expected[31:40]:
        token = int(session.step([token]).argmax())
        assert token == following
    session.state().save(tmp_path / "python.state")
    found = call(tiny_bundle, "--tokens", expected[39], *flags, 20, "--load-state", tmp_path / "python.state")
    assert ids(found) == expected[40:60]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cpp.state", "python.state"]


def test_ragged_rows(tiny_bundle: Path) -> None:
    """Three rows of 300, 1 and 270 tokens at once, so two prefill calls, against each alone: logits' difference."""
    assert float(probe("rows", tiny_bundle, RUNTIME)) < 1e-4


def test_sixty_four_threads_over_one_bundle(tiny_bundle: Path) -> None:
    assert probe("threads", tiny_bundle, RUNTIME, 64) == "equal\n"


def test_ascii_prompts_are_encoded_as_in_python(tiny_bundle: Path) -> None:
    """10,000 strings of words, code, white space and control characters, and the special token among them."""
    chosen = random.Random(0)
    pieces = [*string.printable, *"  \n\n\t''", "\x00", "\x1c", "\x7f", "'re", "'S", "don't", "<|endoftext|>", "    "]
    pieces += (ROOT / "liger_deploy" / "cli.py").read_text(encoding="utf-8").split(" ")
    pieces = [piece for piece in pieces if piece.isascii() and "\0" not in piece and piece]
    strings = ["".join(chosen.choices(pieces, k=chosen.randint(1, 30))) for _ in range(10_000)]
    text = Text(Bundle.open(tiny_bundle))
    found = probe("encode", tiny_bundle, stdin="".join(s + "\0" for s in strings)).splitlines()
    assert [ids(line) for line in found] == [text.encode(s) for s in strings]


def rewritten(bundle: Path, copy: Path, path: Sequence[str], value: object) -> Path:
    """A copy of a bundle whose manifest holds another value there; none at all for `...`."""
    shutil.copytree(bundle, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    place = manifest
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format_version"], 99, "has bundle format 99, this library reads up to 1"),
        (["graph", "chunk"], -5, "chunk is out of bounds"),
        (["graph", "chunk"], 1 << 70, "chunk must be an integer"),
        (["model", "vocab_size"], "many", "vocab_size must be an integer"),
        (["graph", "files", "model"], "../../etc/passwd", "is not listed in files"),
        (["files", "../x"], {"size": 1, "sha256": ""}, "names a file outside the bundle"),
        (["files", "model.onnx", "size"], 5, "has 5 bytes, it has"),
        (["files", "none.bin"], {"size": 5, "sha256": ""}, "none.bin, which is missing"),
        (["graph", "state"], [], "graph.state must be a list"),
        (["target"], "executorch", "is a bundle for 'executorch', not for onnx"),
        (["model"], ..., "lacks key 'model'"),
    ],
)
def test_a_bad_manifest_is_one_line(
    tiny_bundle: Path, tmp_path: Path, path: list[str], value: object, message: str
) -> None:
    copy = rewritten(tiny_bundle, tmp_path / "b", path, value)
    assert message in call(copy, "--tokens", "5", rc=2)


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
        ([tiny_bundle, "--prompt", "héllo"], "beyond ASCII is not encoded here yet"),
        ([tiny_bundle, "--tokens", "5", "--top-p", "2"], "top-p must be above 0"),
        ([tiny_bundle, "--tokens", "5", "--runtime", "/nowhere.so"], "ONNX Runtime is not found"),
        ([tiny_bundle, "--tokens", "5", "--load-state", tmp_path / "none"], "cannot be read"),
        ([tiny_bundle, "--tokens", "5", "--load-state", tmp_path / "short.state"], "ends beyond the file"),
        ([tiny_bundle, "--tokens", "5", "--load-state", tmp_path / "other.state"], "belongs to model z"),
        ([tiny_bundle, "--colour", "5"], "unknown option --colour"),
        ([tiny_bundle], "either --prompt or --tokens"),
    ):
        assert message in call(*words, rc=2)


def test_broken_files_never_crash(tiny_bundle: Path, tmp_path: Path) -> None:
    """10,000 mutations of the manifest and 10,000 of a state; most are refused."""
    state = tmp_path / "x.state"
    call(tiny_bundle, "--tokens", "5 6", "--max-new-tokens", 1, "--save-state", state)
    copy = shutil.copytree(tiny_bundle, tmp_path / "b")
    assert int(probe("fuzz", tiny_bundle / "manifest.json", copy, 10_000)) > 3000
    (tmp_path / "s").mkdir()
    assert int(probe("fuzz", state, tmp_path / "s", 10_000)) > 3000


def test_bench_prints_json(tiny_bundle: Path) -> None:
    found = json.loads(call(tiny_bundle, "--prompt", PROMPT, "--bench", 20))
    assert found["steps"] == 20
    assert 0 < found["step_ms_p10"] <= found["step_ms_median"] <= found["step_ms_p90"]
