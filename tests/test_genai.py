"""Stock onnxruntime-genai loads a bundle as it is: text in, text out, the same tokens as our session."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime_genai as og
import pytest

import liger_deploy as ld
from liger_deploy.generate import generate
from liger_deploy.text import Text
from tests.conftest import liger, small_llama

PROMPT = "class Stack:\n    def push(self, item):\n"


def run(bundle: Path, prompts: list[list[int]], new: int) -> list[list[int]]:
    model = og.Model(str(bundle))
    parameters = og.GeneratorParams(model)
    longest = max(map(len, prompts))
    parameters.set_search_options(max_length=longest + new, batch_size=len(prompts), do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array(prompts[0] if len(prompts) == 1 else prompts, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [generator.get_sequence(row)[longest:].tolist() for row in range(len(prompts))]


def ours(bundle: Path, prompt: list[int], new: int) -> list[int]:
    return list(generate(ld.load_session(bundle), prompt, new))


def test_text_in_text_out(tiny_bundle: Path) -> None:
    text, tokenizer = Text(ld.Bundle.open(tiny_bundle)), og.Tokenizer(og.Model(str(tiny_bundle)))
    ids = tokenizer.encode(PROMPT).tolist()
    bos, *rest = text.encode(PROMPT)
    assert ids == rest  # genai leaves it to the caller to begin with the BOS token
    ids = [bos, *ids]
    (found,) = run(tiny_bundle, [ids], 250)
    expected = ours(tiny_bundle, ids, 250)
    assert found == expected[: len(found)]
    assert len(found) in (250, len(expected))  # genai stops at an end token, and so do we
    assert tokenizer.decode(found) == text.decode(found)


def test_a_batch_of_two(tiny_bundle: Path) -> None:
    prompts = np.random.default_rng(1).integers(5, 2000, (2, 150)).tolist()
    for prompt, found in zip(prompts, run(tiny_bundle, prompts, 60), strict=True):
        assert found == ours(tiny_bundle, prompt, 60)


def test_a_chat_in_turns(tiny_bundle: Path) -> None:
    """Tokens appended between answers continue the state, as genai's chat example does."""
    generator_ids = np.random.default_rng(2).integers(5, 2000, 70).tolist()
    model = og.Model(str(tiny_bundle))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=400, do_sample=False)
    generator, session = og.Generator(model, parameters), ld.load_session(tiny_bundle)
    for turn in (generator_ids[:40], generator_ids[40:]):
        generator.append_tokens(np.array(turn, np.int32))
        logits = session.prefill([turn])
        for _ in range(20):
            generator.generate_next_token()
            token = int(logits[0].argmax())
            assert generator.get_next_tokens()[0] == token
            logits = session.step([token])


@pytest.mark.parametrize(
    "config",
    [
        {"structure": "gsa", "slots": 8},
        {"structure": "lolcats", "features": 12},
        {"structure": "mamba2", "softmax_layers": (1,), "softmax_window": 30, "sinks": 2},
    ],
    ids=str,
)
def test_other_states(config: dict[str, object], tmp_path: Path) -> None:
    """States of other tensors, and of layers that differ, fit into genai's two."""
    ld.export_bundle(liger(small_llama(), window=7, **config), "onnx", tmp_path / "b")
    prompt = np.random.default_rng(3).integers(3, 97, 90).tolist()
    (found,) = run(tmp_path / "b", [prompt], 50)  # to an end token, which a model in memory does not name to ours
    assert len(found) > 10
    assert found == ours(tmp_path / "b", prompt, 50)[: len(found)]


def test_quantized_weights_are_shared(tmp_path: Path) -> None:
    ld.export_bundle(None, "onnx", tmp_path / "b", ld.ExportOptions(quant="int4"))
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "b").iterdir()}
    assert sizes["genai.onnx"] < 0.15 * sizes["model.onnx.data"]
    prompt = np.random.default_rng(4).integers(5, 2000, 64).tolist()
    assert run(tmp_path / "b", [prompt], 1) == [ours(tmp_path / "b", prompt, 1)]
