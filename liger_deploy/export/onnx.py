"""Lower a model to one ONNX graph that serves prefill and decode, for ONNX Runtime.

The recurrence becomes `com.microsoft.LinearAttention`, ONNX Runtime's native operator (the standard operator of opset
27 expands to a Scan there); everything else is standard opset 21.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor
from transformers import PreTrainedModel

from liger_deploy.bundle import GraphInfo, GraphTensor
from liger_deploy.export.graph import trace_prefill
from liger_deploy.export.quantize import quantize
from liger_deploy.export.targets import ExportOptions
from liger_deploy.model.describe import describe
from liger_deploy.model.linearize import liger_config
from liger_deploy.model.ops import linear_attention

OPSET = 21
SLOT_CHUNK = 64  # gated slot attention takes [chunk, chunk, slots] memory a head
MODEL, WEIGHTS = "model.onnx", "model.onnx.data"
EXTERNAL_ABOVE = 1 << 20  # bytes of weights from which they go to a file of their own


def _linear_attention(
    q_BTGRK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, g_BTGC: Tensor, state_BGKV: Tensor
) -> tuple[Tensor, Tensor]:
    """liger::linear_attention as ONNX Runtime's operator, which packs heads into the last dimension."""
    rows, tokens, groups, queries, _ = q_BTGRK.shape
    packed = [x.flatten(2) for x in (q_BTGRK, k_BTGK, v_BTGV)]
    out_shape = (rows, tokens, groups * queries * v_BTGV.shape[-1])
    out, state = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::LinearAttention",
        (*packed, state_BGKV, g_BTGC.flatten(2)),
        attrs={
            "q_num_heads": groups * queries,
            "kv_num_heads": groups,
            "update_rule": "gated",
            "scale": 1.0,
        },
        dtypes=(torch.float32, torch.float32),
        shapes=(out_shape, state_BGKV.shape),
        version=1,
    )
    return out.unflatten(2, (groups, queries, -1)), state


def lower(model: PreTrainedModel, directory: Path, options: ExportOptions) -> GraphInfo:
    """Write `model.onnx` (and its weights) into `directory`. Options are those the target's row allows."""
    state = describe(model, "onnx").graph.state
    chunk = min(options.chunk, SLOT_CHUNK) if liger_config(model).slots else options.chunk
    with _quiet():
        program = trace_prefill(model, chunk, options.batch)
    with _quiet():
        program = program.run_decompositions({linear_attention._opoverload: _linear_attention})
        exported = torch.onnx.export(
            program,
            input_names=["tokens", "valid", *(t.input for t in state)],
            output_names=["logits", *(t.output for t in state)],
            opset_version=OPSET,
            dynamo=True,
        )
    assert exported is not None
    _share_equal_weights(exported.model.graph)
    exported.save(directory / MODEL, external_data=_weight_bytes(model) > EXTERNAL_ABOVE)
    if options.quant != "none":
        quantize(directory / MODEL, options.quant)
    check_graph(directory / MODEL, state)
    files = {"model": MODEL}
    if (directory / WEIGHTS).exists():
        files["weights"] = WEIGHTS
    return GraphInfo(files, chunk, options.batch, state)


def _share_equal_weights(graph: Any) -> None:
    """One copy of tables that every layer has (RoPE); `graph` is onnxscript's."""
    first: dict[tuple[object, ...], Any] = {}
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.nbytes < 1 << 10 or ".rope_" not in value.name:
            continue
        kept = first.setdefault((tuple(tensor.shape), tensor.dtype, tensor.tobytes()), value)
        if kept is not value:
            value.replace_all_uses_with(kept)
            del graph.initializers[value.name]


def check_graph(path: Path, state: list[GraphTensor]) -> None:
    """The file has the opset that was asked for, and exactly the manifest's inputs and outputs."""
    proto = onnx.load(path, load_external_data=False)
    opsets = {entry.domain: entry.version for entry in proto.opset_import}
    if opsets.get("") != OPSET:  # the exporter falls back to another opset without a word
        raise AssertionError(f"the exporter wrote opset {opsets.get('')}, not {OPSET}")
    inputs, outputs = ([x.name for x in values] for values in (proto.graph.input, proto.graph.output))
    if inputs != ["tokens", "valid", *(t.input for t in state)] or outputs != ["logits", *(t.output for t in state)]:
        raise AssertionError(f"the graph's inputs {inputs} or outputs {outputs} are not the state's")


def _weight_bytes(model: PreTrainedModel) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's progress lines and load-time warnings say nothing that a user can act on."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(level)
