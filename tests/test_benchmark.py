"""The verb `benchmark`: what it writes, what it refuses, and that it tells a growing cache from a state."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.report import RESULTS
from liger_deploy.__main__ import main
from liger_deploy.bench import machine, report
from liger_deploy.bundle import Bundle
from tests.conftest import TINY_BASE

SHORT = ["--rounds", "1", "--block", "3", "--contexts", "16,48"]


@pytest.fixture
def proved(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the embedded model's bundle with a passing table."""
    copy = shutil.copytree(tiny_bundle, tmp_path / "onnx")
    (copy / "parity.json").write_text(json.dumps([{"check": "all", "passed": True}]))
    return copy


def test_bundles_and_peers_by_depth(proved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result" / "depth.json"
    peers = ["--peers", "transformers,transformers-bf16", "--base", str(TINY_BASE)]
    assert main(["benchmark", "--bundle", str(proved), *SHORT, *peers, "--stock", "--out", str(out)]) == 0
    table = capsys.readouterr().out
    document = json.loads(out.read_text())
    assert str(tmp_path) not in document["command"]
    subjects = {one["label"]: one for one in document["figures"]["subjects"]}
    names = ["liger, onnx float32", "liger, onnx float32, stock operators"]
    names += ["transformers, eager, float32", "transformers, eager, bfloat16"]
    assert list(subjects) == names
    state = Bundle.open(proved).manifest.spec.nbytes()
    config = json.loads((TINY_BASE / "config.json").read_text())
    cell = 2 * 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    for name, one in subjects.items():
        assert [depth["context"] for depth in one["depths"]] == [16, 48]
        kept = [depth["cache_bytes"] for depth in one["depths"]]
        item = 2 if name.endswith("bfloat16") else 1
        assert kept == ([state, state] if name.startswith("liger") else [16 * cell // item, 48 * cell // item])
        for depth in one["depths"]:
            times = depth["step_ms"]
            assert 0 < times["p10"] <= times["median"] <= times["p90"]
            assert len(depth["seconds"]) == 3
            assert depth["peak"] >= depth["resident"] > 0
            assert depth["prefill_tokens_s"] > 0
        assert name.split(",")[0] in table
    page = out.with_suffix(".html").read_text()
    assert "<svg" in page
    assert not re.search(r"(src|href)=[\"']https?:", page), "the page needs nothing from elsewhere"
    assert all(f"<td>{name}</td>" in page for name in names)
    assert out.with_suffix(".png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_what_it_refuses(
    proved: Path,
    tiny_bundle: Path,
    tmp_path: Path,
    fails: Callable[..., str],
) -> None:
    assert "has no parity.json: run liger-deploy verify" in fails("benchmark", "--bundle", tiny_bundle, *SHORT)
    bundle = ["--bundle", proved]
    for flags, message in (
        (["--contexts", "a"], "--contexts takes numbers"),
        (["--contexts", "64,65"], "grow by more than"),
        (["--peers", "vllm", "--base", TINY_BASE, *SHORT], "unknown peer 'vllm': choose from llama.cpp"),
        (["--peers", "transformers", *SHORT], "--peers needs --base"),
        (["--peers", "transformers", "--base", tmp_path, *SHORT], "is no checkpoint"),
        (["--out", tmp_path / "x.txt", *SHORT], "ends in .json"),
        (["--threads", "0", *SHORT], "must be positive"),
        (["--peers", "llama.cpp", "--base", TINY_BASE, "--peer-python", "/no/python", *SHORT], "could not be made"),
    ):
        assert message in fails("benchmark", *bundle, *flags)
    (proved / "parity.json").write_text(json.dumps([{"check": "logits", "passed": False}]))
    assert "fails parity (logits)" in fails("benchmark", *bundle, *SHORT)
    (proved / "parity.json").write_text("{}")
    assert "is not a parity table" in fails("benchmark", *bundle, *SHORT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["onnx"]


def test_a_subject_that_dies_is_one_line(proved: Path, fails: Callable[..., str]) -> None:
    """Its graph is gone when its process loads it."""
    (proved / "model.onnx").write_bytes(b"\0" * (proved / "model.onnx").stat().st_size)
    assert "ended with code 1: " in fails("benchmark", "--bundle", proved, *SHORT)


def test_the_committed_report_draws() -> None:
    document = json.loads((RESULTS / "depth_291m.json").read_text())
    assert report.picture(document["figures"], "png")[:4] == b"\x89PNG"
    assert len(report.rows(document["figures"])[0]) == len(report.headings(document["figures"]))


def test_the_machine() -> None:
    assert machine.spread([3.0, 1.0, 2.0]) == {"median": 2.0, "p10": 1.0, "p90": 3.0}
    assert machine.read_bandwidth(1, megabytes=32) > 1e8
    assert 0 < machine.reference_loop() < 10
    document = machine.document("x", {})
    assert {"command", "date", "commit", "machine", "versions", "figures"} == set(document)
