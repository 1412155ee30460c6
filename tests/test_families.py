"""Rung 3 for every model family, and every family and structure once through ONNX Runtime (rung 6)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import liger_deploy as ld
from liger_deploy.gates import STRUCTURES
from liger_deploy.model.checkpoint import SUPPORTED
from liger_deploy.model.step import PrefillModel
from tests.conftest import relative
from tests.test_attention import LLAMA3_ROPE
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
        liger = ld.linearize(model, ld.LigerConfig(window=120, recurrent_weight=0, window_weight=1))
        assert relative(liger(tokens).logits, expected) <= SAME_FUNCTION
        prefill = PrefillModel(liger)
        logits, *_ = prefill(tokens, torch.tensor([120, 55]), *prefill.zeros(2))
    assert relative(logits, torch.stack([expected[0, 119], expected[1, 54]])) <= SAME_FUNCTION


# Every family once and every structure once.
PAIRS = [(name, list(STRUCTURES)[i % len(STRUCTURES)]) for i, name in enumerate(FAMILIES)]
assert {structure for _, structure in PAIRS} == set(STRUCTURES)


@pytest.mark.parametrize(("name", "structure"), PAIRS)
def test_onnx_runtime_is_eager(name: str, structure: str, tmp_path: Path) -> None:
    slots = {"slots": 8} if structure == "gsa" else {}
    model = ld.linearize(family(name), ld.LigerConfig(structure=structure, window=6, **slots))
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


@pytest.mark.parametrize("structure", [s for s, row in STRUCTURES.items()])
def test_state_memory_is_the_formula(structure: str) -> None:
    """Bytes of a Llama-3-8B state: recurrence 4*G*K*V (gsa 2*4*G*K*M) and window 2*4*G*W*K, for each of 32 layers."""
    from liger_deploy.state import ModelShape, StateSpec

    config = ld.LigerConfig(structure=structure)
    recurrent = {"gsa": 2 * 4 * 8 * 128 * 64, "window": 0}.get(structure, 4 * 8 * 128 * 128)
    expected = 32 * (recurrent + 2 * 4 * 8 * 64 * 128) + 8
    assert StateSpec.of(config, ModelShape(32, 32, 8, 128)).nbytes() == expected


def test_slots_must_divide_the_head() -> None:
    with pytest.raises(ld.UserError, match="slots must divide the model's head dim 16: 1, 2, 4, 8, 16; not 64"):
        ld.linearize(family("llama"), ld.LigerConfig(structure="gsa"))
