"""A Session behind Hugging Face's interface: logits, generate(), and lm-evaluation-harness on a local task."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

import liger_deploy as ld
from liger_deploy.export import EMBEDDED
from liger_deploy.generate import generate
from liger_deploy.runtimes.hf import SessionModel
from tests.conftest import relative
from tests.tolerances import MODEL


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> SessionModel:
    return SessionModel(ld.load_session(tiny_bundle))


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_every_token(side: str, model: SessionModel, tiny: PreTrainedModel) -> None:
    tokens, mask = torch.randint(0, 2048, (2, 20)), torch.ones(2, 20, dtype=torch.long)
    pad = slice(0, 7) if side == "left" else slice(13, 20)
    mask[1, pad] = 0
    with torch.no_grad():
        expected = tiny(tokens, attention_mask=mask).logits
    ours = model(tokens, attention_mask=mask).logits
    assert relative(ours[mask.bool()], expected[mask.bool()]) < MODEL


def test_generate_is_the_decode_loop(model: SessionModel, tiny_bundle: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    prompts = ["def f(x):\n    return", "class Stack:\n    def push(self, item):"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    out = model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=30, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    for row, prompt in zip(out, prompts, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        assert row[-30:].tolist() == list(generate(ld.load_session(tiny_bundle), ids, 30))


def test_lm_eval_runs_a_local_task(model: SessionModel, tiny: PreTrainedModel, tmp_path: Path) -> None:
    """The harness gives the session the score of the PyTorch model, and the one computed by hand."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    questions = [("import", [" os", " zq"], 0), ("def __init__", ["(self", "%%"], 0), ("return", [" ]]", " None"], 1)]
    lines = [{"text": text, "choices": choices, "gold": gold} for text, choices, gold in questions]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "local.yaml").write_text(
        "task: local_code\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/d.jsonl}}}}\n"
        'doc_to_text: "{{text}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: gold\ntarget_delimiter: ""\n'
        "metric_list: [{metric: acc}]\n"
    )
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    scores = {}
    for name, evaluated in (("session", model), ("eager", tiny)):
        harness = HFLM(pretrained=evaluated, tokenizer=tokenizer, batch_size=2, max_length=64, device="cpu")
        found = simple_evaluate(model=harness, tasks=["local_code"], task_manager=manager, bootstrap_iters=0)
        scores[name] = [[float(x[0]) for x in s["filtered_resps"]] for s in found["samples"]["local_code"]]
        assert found["results"]["local_code"]["acc,none"] == 1.0
    for ours, theirs in zip(scores["session"], scores["eager"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
