"""Models and bundles that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported: its kernels then run on the CPU

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import liger_deploy as ld
from liger_deploy.export import EMBEDDED

TINY_BASE = EMBEDDED.parent / "base"


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
