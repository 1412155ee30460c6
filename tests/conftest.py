"""Models and bundles that several test files share."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported: its kernels then run on the CPU

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import liger_deploy as ld
from liger_deploy.__main__ import main
from liger_deploy.bundle import Manifest, write_manifest
from liger_deploy.export import EMBEDDED

TINY_BASE = EMBEDDED.parent / "base"


@pytest.hookimpl(tryfirst=True)  # before xdist, which reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one slowly made bundle run in one worker, which makes it once."""
    for item in items:
        values = getattr(item, "callspec", None)
        names = {*getattr(item, "fixturenames", ()), *(map(str, values.params.values()) if values else ())}
        for target in ("executorch", "inductor"):
            if {target, f"tiny_{target}"} & names:
                item.add_marker(pytest.mark.xdist_group(target))


def small_llama(kv_heads: int = 2, vocab: int = 97, **changes: object) -> LlamaForCausalLM:
    """A random two-layer Llama whose weights are large enough that every branch matters."""
    values = {
        "vocab_size": vocab,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(values | changes))).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data.mul_(4)
    return model


def liger(model: PreTrainedModel, **config: object) -> PreTrainedModel:
    """Linearize, with learned parameters (LoLCATs') away from their identity."""
    ld.linearize(model, ld.LigerConfig(**config))  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if ".lolcats." in name:
            parameter.data += torch.randn_like(parameter) * 0.5
    return model


def relative(ours: object, expected: object) -> float:
    """Largest difference over the largest expected value; NaN if either holds one."""
    a, b = (np.asarray(x.detach() if isinstance(x, torch.Tensor) else x, np.float64) for x in (ours, expected))
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.fixture(scope="session")
def tiny() -> PreTrainedModel:
    """The embedded trained Liger model, float32."""
    return ld.load_model(EMBEDDED, torch.float32)


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its ONNX bundle."""
    return ld.export_bundle(None, "onnx", tmp_path_factory.mktemp("bundles") / "tiny").path


@pytest.fixture(scope="session")
def tiny_executorch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its ExecuTorch bundle."""
    return ld.export_bundle(None, "executorch", tmp_path_factory.mktemp("executorch") / "tiny").path


@pytest.fixture(scope="session")
def tiny_inductor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its Inductor bundle, for any number of rows. A short chunk compiles faster."""
    out = tmp_path_factory.mktemp("inductor") / "tiny"
    return ld.export_bundle(None, "inductor", out, ld.ExportOptions(chunk=16)).path


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


def relisted(bundle: Path, change: Callable[[Manifest], Manifest] = lambda manifest: manifest) -> Path:
    """The manifest's list of files made anew, after some were changed, and the manifest with them."""
    manifest = change(Manifest.from_dict(json.loads((bundle / "manifest.json").read_text())))
    (bundle / "manifest.json").unlink()
    write_manifest(bundle, manifest)
    return bundle


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command line; expect exit code 2 and one line on stderr; return it."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            code = exit_.code  # type: ignore[assignment]
        output = capsys.readouterr()
        assert code == 2, output
        assert output.out == ""
        assert output.err.count("\n") == 1, output.err
        return output.err

    return run
