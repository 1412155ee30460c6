"""Lower a model to one ONNX graph that serves prefill and decode, for ONNX Runtime.

The layers' mixing is `liger` nodes (`onnx_ops.py`); everything else is standard ONNX.
"""

from __future__ import annotations

import copy
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from transformers import PreTrainedModel

from liger_deploy.bundle import GraphInfo, GraphTensor
from liger_deploy.errors import UserError
from liger_deploy.export import onnx_ops
from liger_deploy.export.genai import write_genai
from liger_deploy.export.graph import quiet, trace_prefill
from liger_deploy.export.onnx_ops import OPSET
from liger_deploy.export.onnx_rewrites import rewrite
from liger_deploy.export.quantize import narrow, quantize
from liger_deploy.export.targets import ExportOptions
from liger_deploy.model.describe import describe
from liger_deploy.model.linearize import liger_config, model_shape

SLOT_CHUNK = 64  # gated slot attention takes [chunk, chunk, slots] memory a head
MODEL, WEIGHTS = "model.onnx", "model.onnx.data"
EXTERNAL_ABOVE = 1 << 20  # bytes of weights from which they go to a file of their own


def lower(model: PreTrainedModel, directory: Path, options: ExportOptions) -> GraphInfo:
    """Write `model.onnx` (and its weights) into `directory`. Options are those the target's row allows.

    Raises:
        UserError: 16 bits on a CPU, which computes in 32, or of quantized matrices.
    """
    if options.dtype != "float32":
        if options.device == "cpu" or options.quant != "none":
            raise UserError(f"--dtype {options.dtype} of target 'onnx' is for --device cuda, without --quant")
        model = copy.deepcopy(model).float()
    state, batch = describe(model, "onnx").graph.state, options.batch or 0
    chunk = min(options.chunk, SLOT_CHUNK) if liger_config(model).slots else options.chunk
    with quiet():
        program = trace_prefill(model, chunk, batch)
        kinds = onnx_ops.kinds(program)
        program = program.run_decompositions(onnx_ops.DECOMPOSITIONS)
        exported = torch.onnx.export(
            program,
            input_names=["tokens", "valid", *(t.input for t in state)],
            output_names=["logits", *(t.output for t in state)],
            opset_version=OPSET,
            dynamo=True,
        )
        assert exported is not None
        bodies = [onnx_ops.function(kind, chunk) for kind in kinds]
    rewrite(exported.model.graph)
    if options.quant != "none":
        quantize(exported.model.graph, options.quant, options.group_size, bool(options.calibrate))
    elif options.dtype != "float32":
        narrow(exported.model.graph, options.dtype)
    onnx_ops.add_functions(exported.model, bodies + onnx_ops.product_functions(exported.model.graph))
    exported.save(directory / MODEL, external_data=_weight_bytes(exported.model.graph) > EXTERNAL_ABOVE)
    check_graph(directory / MODEL, state)
    shape = model_shape(model)
    write_genai(directory, MODEL, state, model.config, (shape.query_heads, shape.kv_heads, shape.head_dim))
    files = {"model": MODEL}
    if (directory / WEIGHTS).exists():
        files["weights"] = WEIGHTS
    return GraphInfo(files, chunk, batch, state, {} if options.device == "cpu" else {"device": options.device})


def check_graph(path: Path, state: list[GraphTensor]) -> None:
    """The file has the opset that was asked for, and exactly the manifest's inputs and outputs."""
    proto = onnx.load(path, load_external_data=False)
    opsets = {entry.domain: entry.version for entry in proto.opset_import}
    if opsets.get("") != OPSET:  # the exporter falls back to another opset without a word
        raise AssertionError(f"the exporter wrote opset {opsets.get('')}, not {OPSET}")
    inputs, outputs = ([x.name for x in values] for values in (proto.graph.input, proto.graph.output))
    if inputs != ["tokens", "valid", *(t.input for t in state)] or outputs != ["logits", *(t.output for t in state)]:
        raise AssertionError(f"the graph's inputs {inputs} or outputs {outputs} are not the state's")


def _weight_bytes(graph: ir.Graph) -> int:
    return sum(v.const_value.nbytes for v in graph.initializers.values() if v.const_value is not None)
