"""Rung 3 for every model family, and every family and structure once through ONNX Runtime (rung 6)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import liger_deploy as ld
from liger_deploy.convert import convert
from liger_deploy.gates import STRUCTURES
from liger_deploy.model.checkpoint import SUPPORTED
from liger_deploy.model.linearize import load_base_model, softmax_attention
from liger_deploy.model.step import PrefillModel
from tests.conftest import liger, relative
from tests.test_attention import LLAMA3_ROPE, SIZES
from tests.tolerances import MODEL, SAME_FUNCTION

# What each family has that the others do not.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 4096},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "qwen3_moe": {
        "head_dim": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "decoder_sparse_step": 1,
    },
    "gemma3_text": {
        "head_dim": 32,
        "sliding_window": 512,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 24,
    },
    "phi3": {"pad_token_id": 0, "sliding_window": None},
    "smollm3": {"num_hidden_layers": 2, "no_rope_layers": [1, 0], "pad_token_id": 0},
    "granite": {
        "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
    },
    "olmo2": {},
}


def family(name: str) -> PreTrainedModel:
    """A small random model of this family."""
    values = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **(values | FAMILIES[name])))
    for key, parameter in model.named_parameters():
        if "norm" in key:
            parameter.data += 0.2 * torch.rand_like(parameter)
        elif "embed" not in key:
            parameter.data.mul_(2)
        if key.endswith("bias"):
            parameter.data += torch.randn_like(parameter)
    return model.eval()  # type: ignore[no-any-return]


def test_every_supported_family_is_here() -> None:
    assert set(FAMILIES) == set(SUPPORTED)


@pytest.mark.parametrize("name", FAMILIES)
def test_window_alone_is_the_untouched_model(name: str) -> None:
    model = family(name)
    tokens = torch.randint(3, 97, (2, 120))
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        ld.linearize(model, ld.LigerConfig(window=120, recurrent_weight=0, window_weight=1))
        assert relative(model(tokens).logits, expected) <= SAME_FUNCTION
        prefill = PrefillModel(model)
        logits, *_ = prefill(tokens, torch.tensor([120, 55]), *prefill.zeros(2))
    assert relative(logits, torch.stack([expected[0, 119], expected[1, 54]])) <= SAME_FUNCTION


# Every family and every structure at least once, and what else changes a graph's shape.
CASES: list[dict[str, Any]] = [
    *({"structure": name, "window": 6} | SIZES.get(name, {}) for name in STRUCTURES),
    {"structure": "gla", "window": 6, "softmax_layers": (1,), "softmax_window": 20, "sinks": 2},
]
PAIRS = [(list(FAMILIES)[i % len(FAMILIES)], case) for i, case in enumerate(CASES)]


@pytest.mark.parametrize(("name", "config"), PAIRS, ids=str)
def test_onnx_runtime_is_eager(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    model = liger(family(name), **config)
    ld.export_bundle(model, "onnx", tmp_path / "b")
    ours, oracle = ld.load_session(tmp_path / "b"), ld.EagerSession(model)
    tokens = np.random.default_rng(0).integers(3, 97, (2, 90))
    assert relative(ours.prefill(tokens, [90, 33]), oracle.prefill(tokens, [90, 33])) < MODEL
    for token in range(10, 30):
        logits, expected = (x.step([token, token + 40]) for x in (ours, oracle))
        assert relative(logits, expected) < MODEL
    for key, tensor in oracle.state().tensors.items():
        assert relative(ours.state().tensors[key], tensor) < MODEL


def test_the_gate_may_read_the_raw_key() -> None:
    model = family("qwen3")
    tokens = torch.randint(3, 97, (1, 30))
    with torch.no_grad():
        normed = ld.linearize(model, ld.LigerConfig(gate_normalizer=1))(tokens).logits
        raw = ld.linearize(family("qwen3"), ld.LigerConfig(gate_normalizer=1, gate_source="raw"))(tokens).logits
    assert relative(raw, normed) > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_softmax_mode_is_the_untouched_model(name: str) -> None:
    """The teacher of distillation: the same projections with the base model's own attention, padding included."""
    model = family(name)
    tokens, mask = torch.randint(3, 97, (2, 120)), torch.ones(2, 120, dtype=torch.long)
    mask[1, :30] = 0
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask, use_cache=False).logits
        with softmax_attention(ld.linearize(model)):
            ours = model(tokens, attention_mask=mask).logits
    assert relative(ours[0], expected[0]) <= SAME_FUNCTION
    assert relative(ours[1, 30:], expected[1, 30:]) <= SAME_FUNCTION


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "smollm3"])
def test_softmax_layers_are_exact_within_their_window(name: str) -> None:
    """Every layer left to softmax: the untouched model, in one pass and in parts."""
    model = family(name)
    layers = tuple(range(model.config.num_hidden_layers))
    tokens = torch.randint(3, 97, (2, 100))
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        ld.linearize(model, ld.LigerConfig(softmax_layers=layers, softmax_window=100, sinks=4))
        assert relative(model(tokens).logits, expected) <= SAME_FUNCTION
        session = ld.EagerSession(model)
        session.prefill(tokens[:, :41].numpy())
        assert relative(session.prefill(tokens[:, 41:].numpy()), expected[:, -1]) < MODEL


def test_a_sliding_layer_cannot_stay_softmax_with_a_larger_window() -> None:
    with pytest.raises(ld.UserError, match="layer 0 of this model attends to its last 512 keys"):
        ld.linearize(family("gemma3_text"), ld.LigerConfig(softmax_layers=(0,)))
    ld.linearize(family("gemma3_text"), ld.LigerConfig(softmax_layers=(1,)))


@pytest.mark.parametrize("structure", [s for s, row in STRUCTURES.items()])
def test_state_memory_is_the_formula(structure: str) -> None:
    """Bytes of a Llama-3-8B state: recurrence 4*G*K*V (gsa 2*4*G*K*M, lolcats 4*H*2F*(V+1)) and window 2*4*G*W*K, for
    each of 32 layers."""
    from liger_deploy.state import ModelShape, StateSpec

    config = ld.LigerConfig(structure=structure)
    recurrent = {"gsa": 2 * 4 * 8 * 128 * 64, "lolcats": 4 * 32 * 128 * 129, "window": 0}.get(
        structure, 4 * 8 * 128 * 128
    )
    expected = 32 * (recurrent + 2 * 4 * 8 * 64 * 128) + 8
    assert StateSpec.of(config, ModelShape(32, 32, 8, 128)).nbytes() == expected


def test_slots_must_divide_the_head() -> None:
    with pytest.raises(ld.UserError, match="slots must divide the model's head dim 16: 1, 2, 4, 8, 16; not 64"):
        ld.linearize(family("llama"), ld.LigerConfig(structure="gsa"))


def test_learned_maps_are_saved_and_loaded(tmp_path: Path) -> None:
    model = liger(family("llama"), structure="lolcats", features=8, window=5)
    ld.save_model(model, tmp_path)
    tokens = torch.randint(3, 97, (1, 30))
    with torch.no_grad():
        assert torch.equal(ld.load_model(tmp_path)(tokens).logits, model(tokens).logits)
        base = load_base_model(tmp_path)  # still the base model to anyone else
        assert relative(base(tokens).logits, family("llama")(tokens).logits) == 0
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"features": 8', '"features": 9'))
    with pytest.raises(ld.UserError, match=r"lolcats.map_k' is \[4, 16, 8\], not \[4, 16, 9\]"):
        ld.load_model(tmp_path)


def test_identity_maps_start_a_converted_checkpoint(tmp_path: Path) -> None:
    ld.save_model(family("llama"), tmp_path / "base")
    convert(tmp_path / "base", tmp_path / "liger", ld.LigerConfig("lolcats", features=8))
    maps = ld.load_model(tmp_path / "liger").model.layers[1].self_attn.lolcats
    assert torch.equal(maps.map_q, torch.eye(16, 8).expand(4, 16, 8))
    assert maps.window_factor.sigmoid().tolist() == pytest.approx([0.1] * 4, rel=1e-4)
