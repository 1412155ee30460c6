"""The verbs as a user runs them: what they write, and one line with exit code 2 for every kind of bad input."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import liger_deploy as ld
from liger_deploy.__main__ import main
from liger_deploy.export import EMBEDDED
from liger_deploy.model.checkpoint import INDEX
from liger_deploy.text import Stream, Text
from tests.conftest import TINY_BASE, relative, relisted, small_llama
from tests.test_attention import LLAMA3_ROPE


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A checkpoint as they come: sharded, bfloat16, tied, scaled RoPE, GQA, explicit head_dim."""
    model = small_llama(tie_word_embeddings=True, head_dim=32, rope_parameters=LLAMA3_ROPE)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "base", max_shard_size="60KB")
    assert (tmp_path / "base" / INDEX).exists()
    return tmp_path / "base"


def test_convert_keeps_the_base_model(base: Path, tmp_path: Path) -> None:
    assert main(["convert", "--model", str(base), "--out", str(tmp_path / "liger"), "--window", "9"]) == 0
    config = json.loads((tmp_path / "liger" / "config.json").read_text())
    assert config.pop("liger") == ld.LigerConfig(window=9).to_dict()
    assert config == json.loads((base / "config.json").read_text())
    for shard in base.glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "liger" / shard.name).read_bytes()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "liger")
    expected = AutoModelForCausalLM.from_pretrained(base)
    tokens = torch.arange(20)[None]
    assert torch.equal(plain(tokens).logits, expected(tokens).logits)
    liger = ld.load_model(tmp_path / "liger", torch.float32)
    assert ld.EagerSession(liger).manifest.liger.window == 9
    assert len({p.data_ptr() for p in (liger.lm_head.weight, liger.model.embed_tokens.weight)}) == 1


def test_checkpoint_without_tokenizer_speaks_ids(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ld_out, bundle = tmp_path / "liger", tmp_path / "bundle"
    assert main(["convert", "--model", str(base), "--out", str(ld_out)]) == 0
    assert main(["export", "--target", "onnx", "--model", str(ld_out), "--out", str(bundle)]) == 0
    assert main(["verify", "--bundle", str(bundle), "--model", str(ld_out), "--tokens", "20"]) == 0
    assert len(json.loads((bundle / "parity.json").read_text())) == 14
    capsys.readouterr()
    assert main(["generate", "--bundle", str(bundle), "--prompt", "5 6 7", "--max-new-tokens", "4"]) == 0
    ids = [int(word) for word in capsys.readouterr().out.split()]
    session = ld.EagerSession(ld.load_model(ld_out, torch.float32))
    expected = [int(session.prefill([5, 6, 7])[0].argmax())]
    while len(expected) < 4:
        expected.append(int(session.step([expected[-1]])[0].argmax()))
    assert ids == expected[: len(ids)]
    assert ids


def test_state_saved_and_loaded_continues_the_text(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = str(tmp_path / "s.safetensors")
    run = ["generate", "--bundle", str(tiny_bundle), "--temperature", "0"]
    capsys.readouterr()
    assert main([*run, "--prompt", "import os\n", "--max-new-tokens", "30", "--save-state", state]) == 0
    first = capsys.readouterr().out[:-1]
    assert main([*run, "--prompt", "\n", "--max-new-tokens", "20", "--load-state", state]) == 0
    continued = capsys.readouterr().out[:-1]
    session = ld.load_session(tiny_bundle)
    session.load_state(ld.State.load(state))
    assert session.state().tensors["length"][0] > 30
    assert first
    assert continued


def test_streamed_text_is_the_whole_text(tiny_bundle: Path) -> None:
    text = Text(ld.Bundle.open(tiny_bundle))
    for sample in ("def f(x):\n    return x ** 2\n", "naïve café — “quotes” 😀 漢字", "\t\n  x"):
        ids = text.encode(sample)
        assert ids[0] == 0
        stream = Stream(text)
        assert "".join(stream.feed(token) for token in ids) == sample


def test_chat_template_of_the_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = shutil.copytree(EMBEDDED, tmp_path / "chatty")
    template = "{{ bos_token }}{% for m in messages %}# {{ m.role }}: {{ m.content }}{% endfor %}"
    (source / "chat_template.jinja").write_text(template)
    bundle = ld.export_bundle(source, "onnx", tmp_path / "b")
    assert Text(bundle).chat("sort it") == "<|endoftext|># user: sort it"
    run = ["generate", "--bundle", str(bundle.path), "--max-new-tokens", "8", "--temperature", "0"]
    assert main([*run, "--chat", "--prompt", "sort it"]) == 0
    chat = capsys.readouterr().out
    assert main([*run, "--prompt", "# user: sort it"]) == 0
    assert capsys.readouterr().out == chat


def test_a_template_cannot_reach_outside(tmp_path: Path, fails: Callable[..., str]) -> None:
    source = shutil.copytree(EMBEDDED, tmp_path / "evil")
    (source / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    ld.export_bundle(source, "onnx", tmp_path / "b")
    assert "does not render" in fails("generate", "--bundle", tmp_path / "b", "--prompt", "x", "--chat")


def test_embedded_model_writes_python(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["generate", "--bundle", str(tiny_bundle), "--prompt", "import os\n\ndef ", "--max-new-tokens", "100"]
    assert main([*run, "--temperature", "0.5", "--seed", "4"]) == 0
    first = capsys.readouterr().out
    assert "self" in first or "return" in first or "(" in first
    assert main([*run, "--temperature", "0.5", "--seed", "4"]) == 0
    assert capsys.readouterr().out == first
    assert main([*run, "--temperature", "0.5", "--seed", "5"]) == 0
    assert capsys.readouterr().out != first


def test_bad_checkpoints(base: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    out = tmp_path / "out"

    def convert(model: Path) -> str:
        line = fails("convert", "--model", model, "--out", out)
        assert not out.exists()
        assert not list(tmp_path.glob(".out*"))
        return line

    def broken(change: Callable[[Path], object]) -> str:
        copy = tmp_path / "broken"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(base, copy)
        change(copy)
        return convert(copy)

    def configure(**values: object) -> Callable[[Path], object]:
        def change(path: Path) -> None:
            config = json.loads((path / "config.json").read_text()) | values
            (path / "config.json").write_text(json.dumps(config))

        return change

    def poison(path: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(path)
        model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
        model.save_pretrained(path, max_shard_size="60KB")

    shard = "model-00002-of-"
    assert "is not a directory" in convert(tmp_path / "absent")
    assert "no config.json" in broken(lambda p: (p / "config.json").unlink())
    assert "not readable JSON" in broken(lambda p: (p / "config.json").write_text("{,"))
    assert "'mamba' is not supported; supported are" in broken(configure(model_type="mamba"))
    assert "LlamaForCausalLM is needed" in broken(configure(architectures=["LlamaForSequenceClassification"]))
    assert "cannot share" in broken(configure(num_key_value_heads=3))
    assert "already converted" in broken(configure(liger={}))
    assert "is missing" in broken(lambda p: next(p.glob(f"{shard}*")).unlink())
    assert "truncated" in broken(lambda p: (f := next(p.glob(f"{shard}*"))).write_bytes(f.read_bytes()[:-9]))
    assert "damaged" in broken(lambda p: next(p.glob(f"{shard}*")).write_bytes(b"\x01" * 50))
    assert "names a file outside" in broken(lambda p: (p / INDEX).write_text('{"weight_map": {"a": "../b"}}'))
    assert "holds NaN" in broken(poison)


def test_bad_liger_keys(base: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    out = tmp_path / "b"
    line = fails("export", "--target", "onnx", "--model", base, "--out", out)
    assert "run `liger-deploy convert" in line
    for liger, message in (
        ({"structure": "gla", "colour": 1}, "unknown keys colour"),
        ({"structure": "softmax"}, "unknown structure 'softmax': choose one of"),
        ({"window": 0}, "window must be between"),
        ({"window": "64"}, "window must be an integer"),
        ({"recurrent_weight": float("nan")}, "finite"),
        (7, "must be a JSON object"),
    ):
        config = json.loads((base / "config.json").read_text()) | {"liger": liger}
        (base / "config.json").write_text(json.dumps(config))
        line = fails("export", "--target", "onnx", "--model", base, "--out", out)
        assert message in line
        assert "config.json: liger" in line
    assert not out.exists()


def test_bad_bundle_arguments(tiny_bundle: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    assert "already exists" in fails("export", "--target", "onnx", "--out", tiny_bundle)
    assert "already exists" in fails("convert", "--model", TINY_BASE, "--out", tmp_path)
    assert "choose one of onnx" in fails("export", "--target", "coffee", "--out", tmp_path / "x")
    assert "does not support --dtype bfloat16" in fails(
        "export", "--target", "executorch", "--dtype", "bfloat16", "--out", tmp_path / "x"
    )
    assert "--batch must be" in fails("export", "--target", "onnx", "--batch", "many", "--out", tmp_path / "x")
    assert "prompt is empty" in fails("generate", "--bundle", tiny_bundle, "--prompt", "")
    assert "top-p must be" in fails("generate", "--bundle", tiny_bundle, "--prompt", "a", "--top-p", "2")
    assert "no chat template" in fails("generate", "--bundle", tiny_bundle, "--prompt", "a", "--chat")
    assert "No such file" in fails("generate", "--bundle", tiny_bundle, "--prompt", "a", "--load-state", tmp_path / "s")
    assert "not a directory" in fails("verify", "--bundle", tmp_path / "absent")
    assert "--tokens must be positive" in fails("verify", "--bundle", tiny_bundle, "--tokens", "0")
    assert "softmax-attention checkpoint" in fails("verify", "--bundle", tiny_bundle, "--model", TINY_BASE)
    assert "required" in fails("convert", "--model", TINY_BASE)
    assert "unknown verb" in fails("deploy")
    assert "could not be downloaded" in fails("convert", "--model", "nobody/nothing", "--out", tmp_path / "x")
    assert "gsa, gla has none" in fails("convert", "--model", TINY_BASE, "--out", tmp_path / "x", "--slots", "8")
    gsa = ("convert", "--model", TINY_BASE, "--out", tmp_path / "x", "--structure", "gsa")
    assert "slots must divide the model's head dim 32" in fails(*gsa, "--slots", "5")
    convert = ("convert", "--model", TINY_BASE, "--out", tmp_path / "x")
    assert "features must be at most the model's head dim 32, not 64" in fails(*convert, "--structure", "lolcats")
    assert "softmax_layers must be below 4" in fails(*convert, "--softmax-layers", "1,4")
    assert "ascending" in fails(*convert, "--softmax-layers", "2,1")
    assert "invalid list of layer numbers value: 'x'" in fails(*convert, "--softmax-layers", "x")
    assert "sinks belong to softmax_layers" in fails(*convert, "--sinks", "4")
    assert "hgrn2's alone" in fails(*gsa, "--lower-bound", "0.5")


def test_verify_refuses_another_checkpoint(
    tiny_bundle: Path, base: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    assert main(["convert", "--model", str(base), "--out", str(tmp_path / "other")]) == 0
    line = fails("verify", "--bundle", tiny_bundle, "--model", tmp_path / "other")
    assert "the bundle was made from" in line


def test_verify_fails_on_a_wrong_model(tiny_bundle: Path, tmp_path: Path) -> None:
    """A weight changed by a hundredth is seen."""
    import onnx

    copy = shutil.copytree(tiny_bundle, tmp_path / "b")
    model = onnx.load(copy / "model.onnx")
    weight = next(w for w in model.graph.initializer if "mlp.down_proj" in w.name or list(w.dims) == [480, 192])
    array = onnx.numpy_helper.to_array(weight) * 1.01
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    (copy / "model.onnx.data").unlink(missing_ok=True)
    onnx.save(model, copy / "model.onnx")
    relisted(copy, lambda m: dataclasses.replace(m, graph=dataclasses.replace(m.graph, files={"model": "model.onnx"})))
    assert main(["verify", "--bundle", str(copy), "--tokens", "5"]) == 1


def test_imports_stay_light() -> None:
    code = "import liger_deploy, sys; assert 'torch' not in sys.modules; liger_deploy.LigerConfig; "
    code += "assert 'torch' not in sys.modules; assert set(dir(liger_deploy)) >= {'linearize', 'load_session'}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_onnx_session_needs_no_torch(tiny_bundle: Path) -> None:
    code = f"""
import sys
from liger_deploy import load_session
s = load_session({str(tiny_bundle)!r}); s.prefill([0, 1, 2]); s.step([3]); s.fork().state()
assert 'torch' not in sys.modules and 'transformers' not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_but_the_message_reaches_the_user(tmp_path: Path) -> None:
    """Dependencies' load-time warnings stay out of both streams of a real process."""
    command = [sys.executable, "-m", "liger_deploy.export", "--target", "onnx"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stderr == ""
    assert result.stdout.startswith("wrote bundle-onnx: ")
    assert result.stdout.count("\n") == 2


def test_a_save_of_a_model_in_memory_loads_again(tmp_path: Path) -> None:
    model = ld.linearize(small_llama(), ld.LigerConfig(window=3))
    ld.save_model(model, tmp_path / "m")
    loaded = ld.load_model(tmp_path / "m")
    assert ld.EagerSession(loaded).manifest == ld.EagerSession(model).manifest
    tokens = torch.arange(30)[None]
    assert relative(loaded(tokens).logits, model(tokens).logits) == 0
    with safe_open(tmp_path / "m" / "model.safetensors", "pt") as file:
        assert all("rope" not in name for name in file.keys())  # noqa: SIM118


def test_optimum_has_the_verb(tmp_path: Path) -> None:
    """`optimum-cli export liger`, found where optimum looks for commands."""
    program = Path(sys.executable).with_name("optimum-cli")
    out = tmp_path / "b"
    done = subprocess.run(
        [program, "export", "liger", "--target", "onnx", "--out", out], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert ld.load_session(out).manifest.target == "onnx"
    again = subprocess.run(
        [program, "export", "liger", "--target", "onnx", "--out", out], capture_output=True, text=True
    )
    assert again.returncode == 2
    assert again.stderr.endswith("already exists: give another --out, or remove it first\n")
