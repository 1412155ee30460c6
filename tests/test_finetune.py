"""Rung 4 and training itself: resumed = uninterrupted, sharded = single, adapter = merged = reloaded."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments

import liger_deploy as ld
from liger_deploy.convert import convert
from liger_deploy.evaluate import evaluate
from liger_deploy.export import EMBEDDED
from liger_deploy.finetune import FinetuneOptions, finetune
from liger_deploy.merge import merge
from liger_deploy.model.linearize import load_base_model, softmax_attention
from tests.conftest import TINY_BASE, liger, relative, small_llama
from tests.tolerances import MERGED, SAME_FUNCTION

QUICK = {"max_length": 64, "accumulation": 1, "batch": 2, "eval_steps": 4, "max_tokens": 12 * 128}


def checkpoint(path: Path, structure: str = "gla", **changes: object) -> Path:
    """A small converted checkpoint with a real tokenizer."""
    sizes = {"features": 8} if structure == "lolcats" else {}
    ld.save_model(liger(small_llama(**({"vocab": 2048} | changes)), structure=structure, window=8, **sizes), path)
    for file in EMBEDDED.glob("tokenizer*"):
        shutil.copy(file, path)
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("checkpoints") / "gla")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "d.jsonl"
    source = Path(__file__).read_text()
    path.write_text("".join(json.dumps({"text": part}) + "\n" for part in source.split("\n\n\n")))
    return str(path)


def options(**changes: object) -> FinetuneOptions:
    return FinetuneOptions(**(QUICK | changes))  # type: ignore[arg-type]


def metrics(adapter: Path, key: str) -> list[float]:
    lines = map(json.loads, (adapter / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in lines if key in line]


def weights(adapter: Path) -> dict[str, torch.Tensor]:
    return load_file(adapter / "adapter_model.safetensors")


def command(base: Path, data: str, out: Path, *more: str) -> list[str]:
    flags = [x for key, value in QUICK.items() for x in (f"--{key.replace('_', '-')}", str(value))]
    return ["-m", "liger_deploy.finetune", "--model", str(base), "--data", data, "--out", str(out), *flags, *more]


def test_adapter_is_merged_is_reloaded(base: Path, data: str, tmp_path: Path) -> None:
    finetune(base, data, tmp_path / "a", options(lr=1e-2, eval_fraction=0.0))
    losses = metrics(tmp_path / "a", "loss")
    assert losses[-1] < losses[0] - 0.05
    assert not (tmp_path / "a.training").exists()
    assert merge(base, tmp_path / "a", tmp_path / "m") < MERGED
    tokens = torch.randint(0, 2048, (2, 90))
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(ld.load_model(base), tmp_path / "a").eval()(input_ids=tokens).logits
        before, merged = (ld.load_model(path)(tokens).logits for path in (base, tmp_path / "m"))
    assert relative(merged, adapted) < MERGED
    assert relative(merged, before) > 100 * MERGED
    plain = set(load_file(base / "model.safetensors"))
    assert set(load_file(tmp_path / "m" / "model.safetensors")) == plain
    bundle = ld.export_bundle(tmp_path / "m", "onnx", tmp_path / "b")
    assert relative(ld.load_session(bundle.path).prefill(tokens.numpy()), merged[:, -1]) < 2e-5


def test_killed_and_resumed_is_uninterrupted(base: Path, data: str, tmp_path: Path) -> None:
    more = ("--dropout", "0.1", "--schedule", "cosine", "--eval-steps", "3")
    subprocess.run([sys.executable, *command(base, data, tmp_path / "whole", *more)], check=True, capture_output=True)
    cut = [sys.executable, *command(base, data, tmp_path / "cut", *more)]
    process = subprocess.Popen(cut, stderr=subprocess.DEVNULL)
    work, stop = tmp_path / "cut.training", time.monotonic() + 300
    while not (work / "checkpoint-6" / "trainer_state.json").exists() and process.poll() is None:
        assert time.monotonic() < stop
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut").exists(), "it finished before it was killed"
    subprocess.run([*cut, "--resume"], check=True, capture_output=True)
    expected = weights(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "cut").items():
        assert torch.equal(tensor, expected[name]), name
    assert metrics(tmp_path / "cut", "loss") == metrics(tmp_path / "whole", "loss")


@pytest.mark.parametrize(
    "changes",
    [{"batch": 1, "accumulation": 2}, {"gradient_checkpointing": True}],
    ids=["accumulation", "checkpointing"],
)
def test_the_same_step_another_way(changes: dict[str, object], base: Path, data: str, tmp_path: Path) -> None:
    plain = {"train_on_prompt": True, "max_tokens": 3 * 128}
    finetune(base, data, tmp_path / "a", options(**plain))
    finetune(base, data, tmp_path / "b", options(**plain, **changes))
    expected = weights(tmp_path / "a")
    for name, tensor in weights(tmp_path / "b").items():
        assert float((tensor - expected[name]).norm()) <= 2e-3 * float(expected[name].norm()), name


@pytest.mark.slow
@pytest.mark.parametrize("way", ["copied", "sharded", "sharded, recomputed"])
def test_two_processes_are_one(way: str, base: Path, data: str, tmp_path: Path) -> None:
    """Over gloo, two processes with a block each make the steps of one process with two blocks."""
    finetune(base, data, tmp_path / "one", options(max_tokens=6 * 128, eval_fraction=0.0))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    call = command(base, data, tmp_path / "two", "--batch", "1", "--max-tokens", str(6 * 128), "--eval-fraction", "0")
    if way != "copied":
        call = [str(Path(__file__).parent / "fsdp_on_cpu.py"), *call[2:], "--fsdp"]
    if way == "sharded, recomputed":
        call.append("--gradient-checkpointing")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    run = [sys.executable, *launch, *call]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    if way != "copied":
        assert done.stdout.count("DistributedType.FSDP {'DTensor'}") == 2
    found, expected = weights(tmp_path / "two"), weights(tmp_path / "one")
    assert set(found) == set(expected)
    for name, tensor in found.items():
        assert float((tensor - expected[name]).norm()) <= 2e-3 * float(expected[name].norm()), name


def test_the_teacher_is_the_base_model(data: str, tmp_path: Path) -> None:
    """Distillation compares with the untouched model, without a second copy of it."""
    from liger_deploy.trainer import LigerTrainer

    model = ld.load_model(EMBEDDED, torch.float32)
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    tokens = torch.randint(0, 2048, (2, 70))
    inputs = {"input_ids": tokens, "segment_ids": torch.ones_like(tokens), "labels": tokens}
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    teacher = LigerTrainer(model=adapted, args=arguments, distill=1.0)._teacher_logits(adapted, inputs)
    with torch.no_grad():
        expected = load_base_model(EMBEDDED, torch.float32)(tokens).logits
    assert relative(teacher, expected) < SAME_FUNCTION


def test_distillation_moves_towards_the_teacher(data: str, tmp_path: Path) -> None:
    convert(TINY_BASE, tmp_path / "c", ld.LigerConfig(window=16))
    tokens = torch.randint(0, 2048, (2, 60))

    def distance(weight: float) -> float:
        finetune(tmp_path / "c", data, tmp_path / f"a{weight}", options(distill=weight, lr=3e-3))
        model = PeftModel.from_pretrained(ld.load_model(tmp_path / "c", torch.float32), tmp_path / f"a{weight}")
        with torch.no_grad():
            ours = model(input_ids=tokens).logits.log_softmax(-1)
            with model.disable_adapter(), softmax_attention(model):
                theirs = model(input_ids=tokens).logits.log_softmax(-1)
        return float(torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean"))

    assert distance(4.0) < 0.9 * distance(0.0)


def test_lolcats_learns_its_maps_then_an_adapter(data: str, tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "c", "lolcats")
    finetune(base, data, tmp_path / "maps", options(stage="attention-transfer", max_tokens=40 * 128))
    losses = metrics(tmp_path / "maps", "loss")
    assert losses[-1] < 0.7 * losses[0]
    before, after = (load_file(path / "model.safetensors") for path in (base, tmp_path / "maps"))
    assert all(torch.equal(before[name], after[name]) != (".lolcats." in name) for name in before)
    finetune(tmp_path / "maps", data, tmp_path / "a", options())
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["lora_alpha"] == 16
    assert merge(tmp_path / "maps", tmp_path / "a", tmp_path / "m") < MERGED
    merged = load_file(tmp_path / "m" / "model.safetensors")
    name = "model.layers.0.self_attn.lolcats.map_q"
    assert torch.equal(merged[name], after[name])


def test_patience_keeps_the_best(base: Path, data: str, tmp_path: Path) -> None:
    """A rate that soon diverges: training stops, and the weights are those of the best evaluation."""
    hot = {"lr": 0.5, "eval_steps": 1, "eval_fraction": 0.3}
    finetune(base, data, tmp_path / "a", options(**hot, patience=1, max_tokens=40 * 128))
    losses = metrics(tmp_path / "a", "eval_loss")
    assert len(losses) < 40
    assert losses[-1] > min(losses)
    best = losses.index(min(losses)) + 1
    finetune(base, data, tmp_path / "b", options(**hot, max_tokens=best * 128))
    expected = weights(tmp_path / "b")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / "a").items())


def test_evaluate_is_cross_entropy(tmp_path: Path) -> None:
    """Bits per byte of one short text by hand, and a softmax checkpoint beside it."""
    (tmp_path / "t.txt").write_text("def f(x):\n    return x\n")
    model = ld.load_model(EMBEDDED, torch.float32)
    from transformers import AutoTokenizer

    ids = torch.tensor([[0, *AutoTokenizer.from_pretrained(EMBEDDED)("def f(x):\n    return x\n")["input_ids"], 0]])
    with torch.no_grad():
        for path, own in ((EMBEDDED, model), (TINY_BASE, load_base_model(TINY_BASE, torch.float32))):
            nats = torch.nn.functional.cross_entropy(own(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
            expected = float(nats) / 0.6931471805599453 / 23
            assert evaluate(path, str(tmp_path / "t.txt")) == pytest.approx(expected, rel=1e-5)


def test_bad_input(base: Path, data: str, tmp_path: Path, fails: Callable[..., str]) -> None:
    call = ("finetune", "--model", base, "--data", data, "--out", tmp_path / "a")
    assert "already exists" in fails("finetune", "--model", base, "--data", data, "--out", tmp_path)
    assert "softmax-attention checkpoint" in fails(
        "finetune", "--model", TINY_BASE, "--data", data, "--out", tmp_path / "a"
    )
    assert "is no linear layer of this model: down_proj" in fails(*call, "--targets", "q_porj")
    assert "rank must be at least 1, not 0" in fails(*call, "--rank", "0")
    assert "lr must be positive, not nan" in fails(*call, "--lr", "nan")
    assert "this checkpoint is gla" in fails(*call, "--stage", "attention-transfer")
    assert "there is nothing to resume" in fails(*call, "--resume")
    assert "--fsdp needs several processes" in fails(*call, "--fsdp")
    assert not (tmp_path / "a.training").exists()
    tied = checkpoint(tmp_path / "tied", tie_word_embeddings=True)
    assert "lm_head shares its weights" in fails(
        "finetune", "--model", tied, "--data", data, "--out", tmp_path / "x", "--targets", "lm_head"
    )


def test_compiled_layers_train_to_the_same_adapter(base: Path, data: str, tmp_path: Path) -> None:
    for name, compiled in (("eager", False), ("compiled", True)):
        finetune(base, data, tmp_path / name, options(eval_fraction=0.0, max_tokens=3 * 128, compile=compiled))
    expected = weights(tmp_path / "eager")
    for name, tensor in weights(tmp_path / "compiled").items():
        assert float((tensor - expected[name]).norm()) <= 2e-3 * float(expected[name].norm()), name


def test_a_foreign_tokenizer_is_refused(data: str, tmp_path: Path) -> None:
    small = checkpoint(tmp_path / "small", vocab=300)
    with pytest.raises(ld.UserError, match="its tokenizer makes ids beyond the model's 300"):
        finetune(small, data, tmp_path / "a", options())
    assert not (tmp_path / "a.training").exists()


def test_a_diverged_loss_stops(base: Path, data: str, tmp_path: Path) -> None:
    with pytest.raises(ld.UserError, match=r"the loss is nan at step \d+: lower --lr"):
        finetune(base, data, tmp_path / "a", options(lr=1e30, max_grad_norm=0.0))
    assert not (tmp_path / "a").exists()


def test_resume_wants_the_same_run(base: Path, data: str, tmp_path: Path, fails: Callable[..., str]) -> None:
    work = tmp_path / "a.training"
    work.mkdir()
    fingerprint = ld.EagerSession(ld.load_model(base)).manifest.model.fingerprint
    (work / "run.json").write_text(json.dumps({"model": fingerprint, "data": data, "options": {"rank": 9}}))
    call = ("finetune", "--model", base, "--data", data, "--out", tmp_path / "a")
    assert "holds an interrupted run: continue it with --resume" in fails(*call)
    assert "was begun with another" in fails(*call, "--resume")


def test_merge_refuses(base: Path, data: str, tmp_path: Path, fails: Callable[..., str]) -> None:
    finetune(base, data, tmp_path / "a", options(max_tokens=128, eval_fraction=0.0))
    other = checkpoint(tmp_path / "other", "hgrn2")
    out = ("--out", tmp_path / "m")
    assert "was trained on checkpoint" in fails("merge", "--model", other, "--adapter", tmp_path / "a", *out)
    assert "is not an adapter" in fails("merge", "--model", base, "--adapter", base, *out)
    broken = shutil.copytree(tmp_path / "a", tmp_path / "broken")
    tensors = weights(broken)
    save_file({name: t * float("nan") for name, t in tensors.items()}, broken / "adapter_model.safetensors")
    assert "holds NaN or infinity" in fails("merge", "--model", base, "--adapter", broken, *out)
    (broken / "adapter_model.safetensors").write_bytes(b"no")
    assert "does not load" in fails("merge", "--model", base, "--adapter", broken, *out)
    assert not (tmp_path / "m").exists()
