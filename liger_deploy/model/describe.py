"""The manifest of a model as it stands in memory."""

from __future__ import annotations

from transformers import PreTrainedModel

from liger_deploy.bundle import GenerationDefaults, GraphInfo, GraphTensor, Manifest, ModelInfo
from liger_deploy.model.linearize import fingerprint, liger_config, model_shape, state_spec
from liger_deploy.model.step import state_dtype


def describe(model: PreTrainedModel, target: str, chunk: int = 64) -> Manifest:
    """Everything a manifest says of the model itself; no files, no graph names."""
    shape, dtype = model_shape(model), next(model.parameters()).dtype
    info = ModelInfo(
        architecture=model.config.model_type,
        fingerprint=fingerprint(model),
        vocab_size=model.config.vocab_size,
        layers=shape.layers,
        query_heads=shape.query_heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        dtype=str(dtype).removeprefix("torch."),
    )
    names = [(s, str(state_dtype(s.name, s.dtype, dtype)).removeprefix("torch.")) for s in state_spec(model).tensors]
    state = [GraphTensor(s.name, list(s.shape), dtype, s.name, f"next.{s.name}") for s, dtype in names]
    return Manifest(target, info, liger_config(model), GraphInfo({}, chunk, 0, state), GenerationDefaults())
