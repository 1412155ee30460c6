"""The exported file runs in Node on stock onnxruntime-node, through runtimes/web/liger.js: the same tokens."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

import liger_deploy as ld
from liger_deploy.generate import generate

NODE = Path(__file__).parent / "node"


@pytest.mark.parametrize("quant", ["none", "int4"])
def test_64_greedy_tokens(quant: str, tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = tiny_bundle
    if quant != "none":
        bundle = ld.export_bundle(None, "onnx", tmp_path / "b", ld.ExportOptions(quant=quant)).path  # type: ignore[arg-type]
    prompt = np.random.default_rng(5).integers(5, 2000, 300).tolist()  # more than one call's chunk
    command = ["node", str(NODE / "greedy.mjs"), str(bundle), "64", *map(str, prompt)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    session = ld.load_session(bundle)
    expected = list(generate(session, prompt, 64))
    same = next((i for i, pair in enumerate(zip(found["tokens"], expected, strict=True)) if pair[0] != pair[1]), 64)
    assert same == 64 if quant == "none" else same >= 1  # int8 activations round by the kernel's own order of sums
    assert found["before"] == found["after"] == session.spec.nbytes()
    assert found["refused"] == "token id 2048 is out of range: this model's ids are 0 .. 2047"
