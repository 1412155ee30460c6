"""Lower a model to one ExecuTorch program with two methods, `prefill` and `decode`, that share their weights.

    decode:  token [B] int64, *state                        -> logits [B,N], *state
    prefill: tokens [B,chunk] int64, valid [B] int64, *state -> logits [B,N], *state

B and chunk are fixed: XNNPACK plans memory ahead of time. The state is plain inputs and outputs, so that one loaded
program serves any number of sessions.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn
from torch.export import ExportedProgram
from transformers import PreTrainedModel

from liger_deploy.bundle import GraphInfo
from liger_deploy.errors import UserError
from liger_deploy.export.backends import Backend, backend
from liger_deploy.export.delegated import Delegated
from liger_deploy.export.graph import check_program, dense_experts, quiet
from liger_deploy.export.linears import check_reach
from liger_deploy.export.targets import ExportOptions
from liger_deploy.model.describe import describe
from liger_deploy.model.step import PrefillModel, StepModel

MODEL = "model.pte"
LONGEST = 64  # tokens of one prefill call: `delegated.py` holds a decay for each pair of tokens


def lower(model: PreTrainedModel, directory: Path, options: ExportOptions) -> GraphInfo:
    """Write `model.pte` into `directory`. Options are those the target's row allows."""
    state, chunk, batch = describe(model, "executorch").graph.state, min(options.chunk, LONGEST), options.batch or 1
    name = options.backend or "xnnpack"
    row = backend(name, options.quant)
    with quiet():
        if options.quant != "none":
            model = _quantized(model, options.quant, options.group_size)
        chunks = {"decode": 0, "prefill": chunk}
        programs = {method: _trace(model, batch, tokens, name == "coreml") for method, tokens in chunks.items()}
        _emit(programs, directory / MODEL, row)
    return GraphInfo({"model": MODEL}, chunk, batch, state, {"backend": row.name} if row.name else {})


def _trace(model: PreTrainedModel, batch: int, chunk: int, core_ml: bool = False) -> ExportedProgram:
    """The decode method, or the prefill method for `chunk` tokens."""
    program = PrefillModel(model).eval() if chunk else StepModel(model).eval()
    tokens = (torch.zeros(batch, chunk, dtype=torch.long), torch.full((batch,), chunk))
    inputs = tokens if chunk else (torch.zeros(batch, dtype=torch.long),)
    arguments = (*inputs, *program.zeros(batch))
    with torch.no_grad(), dense_experts(model):
        traced = torch.export.export(Delegated(program, chunk or 1, core_ml).eval(), arguments, strict=False)
    check_program(traced, len(arguments), 1 + len(program.spec.tensors))
    return traced


def _emit(programs: dict[str, ExportedProgram], path: Path, row: Backend) -> None:
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower

    # Dim-order operators are a second set of copies that the stock kernels of XNNPACK builds do not need.
    config = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
    edge = to_edge_transform_and_lower(programs, partitioner=row.partitioners(), compile_config=config)
    # The last pass folds the quantized embedding into one operator.
    last = ExecutorchBackendConfig(do_quant_fusion_and_const_prop=True)
    with path.open("wb") as file:
        edge.to_executorch(last).write_to_file(file)


def _quantized(model: PreTrainedModel, quant: str, group_size: int) -> PreTrainedModel:
    """A copy of the model with 8-bit dynamic activations and weights of 8 bits (a scale a row) or 4 bits (a scale a
    group); embedding and output head have 8 bits."""
    import executorch.kernels.quantized  # noqa: F401  (registers the quantized embedding's operator)
    from torchao.quantization import quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup
    from torchao.quantization.quant_api import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig

    check_reach(model)
    if quant == "int4":
        _check_groups(model, group_size)
    model = copy.deepcopy(model)
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())  # tied to the embedding, which gets a form of its own
    rows = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int8, weight_granularity=PerAxis(0))
    groups = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(group_size))  # type: ignore[attr-defined]
    table = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))

    def is_matrix(module: nn.Module, _: str) -> bool:
        return isinstance(module, nn.Linear) and module is not head

    quantize_(model, table, lambda module, _: isinstance(module, nn.Embedding))
    quantize_(model, rows, lambda module, _: module is head)
    quantize_(model, rows if quant == "int8" else groups, is_matrix)
    return model


def _check_groups(model: PreTrainedModel, group_size: int) -> None:
    """Every matrix divides into groups."""
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and ".lolcats." not in name and weight.shape[-1] % group_size:
            hint = f"--quant int4 needs rows in groups of {group_size}"
            raise UserError(f"{hint}, {name!r} has {weight.shape[-1]} columns")
