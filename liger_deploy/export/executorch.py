"""Lower a model to one ExecuTorch program with two methods, `prefill` and `decode`, that share their weights.

    decode:  token [B] int64, *state                        -> logits [B,N], *state
    prefill: tokens [B,chunk] int64, valid [B] int64, *state -> logits [B,N], *state

B and chunk are fixed: XNNPACK plans memory ahead of time. The state is plain inputs and outputs, so that one loaded
program serves any number of sessions.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node
from transformers import PreTrainedModel

from liger_deploy.bundle import GraphInfo
from liger_deploy.errors import UserError
from liger_deploy.export.backends import BACKENDS, Backend, backend
from liger_deploy.export.delegated import Delegated
from liger_deploy.export.graph import check_program, dense_experts, quiet
from liger_deploy.export.linears import check_reach
from liger_deploy.export.targets import ExportOptions
from liger_deploy.model.describe import describe
from liger_deploy.model.step import PrefillModel, StepModel

MODEL, WEIGHTS = "model.pte", "model.ptd"
LONGEST = 64  # tokens of one prefill call: `delegated.py` holds a decay for each pair of tokens


def lower(model: PreTrainedModel, directory: Path, options: ExportOptions) -> GraphInfo:
    """Write `model.pte` into `directory`. Options are those the target's row allows.

    Raises:
        UserError: options that do not go together.
    """
    if options.external_weights and options.quant != "none":  # XNNPACK keeps quantized matrices inside the program
        raise UserError(f"--external-weights does not go with --quant {options.quant}: leave out one of them")
    chunk, batch, name = min(options.chunk, LONGEST), options.batch or 1, options.backend or "xnnpack"
    row = backend(name, options.quant, options.dtype)
    state = [
        dataclasses.replace(t, dtype="int64" if t.name == "length" else "float32")
        for t in describe(model, "executorch").graph.state
    ]
    with quiet():
        if options.quant != "none":
            model = _quantized(model, options.quant, options.group_size)
        chunks = {"decode": 0, "prefill": chunk}
        programs = {method: _trace(model, batch, tokens, name) for method, tokens in chunks.items()}
        _emit(programs, directory, row, options.external_weights)
    requires = {"backend": row.name} if row.name else {}
    files = {"model": MODEL} | ({"weights": WEIGHTS} if options.external_weights else {})
    return GraphInfo(files, chunk, batch, state, requires | ({"operators": "liger"} if row.fused else {}))


class _WideState(nn.Module):
    """A program whose windows come and go in float32, as embedding programs hold them, whatever its own dtype."""

    def __init__(self, program: nn.Module, dtypes: list[torch.dtype]) -> None:
        super().__init__()
        self.program, self.dtypes = program, dtypes

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Inputs and outputs of the program; the state comes last."""
        count = len(self.dtypes)
        state = (x.to(dtype) for x, dtype in zip(inputs[-count:], self.dtypes, strict=True))
        logits, *new = self.program(*inputs[:-count], *state)
        return logits, *(x.float() if x.is_floating_point() else x for x in new)


def _trace(model: PreTrainedModel, batch: int, chunk: int, name: str) -> ExportedProgram:
    """The decode method, or the prefill method for `chunk` tokens."""
    program = PrefillModel(model).eval() if chunk else StepModel(model).eval()
    tokens = (torch.zeros(batch, chunk, dtype=torch.long), torch.full((batch,), chunk))
    inputs = tokens if chunk else (torch.zeros(batch, dtype=torch.long),)
    state = program.zeros(batch)
    arguments = (*inputs, *(x.float() if x.is_floating_point() else x for x in state))
    delegated = Delegated(program, chunk or 1, name == "coreml", BACKENDS[name].fused)
    module = _WideState(delegated, [x.dtype for x in state]).eval()
    with torch.no_grad(), dense_experts(model):
        traced = torch.export.export(module, arguments, strict=False)
    check_program(traced, len(arguments), 1 + len(program.spec.tensors))
    return traced


def _emit(programs: dict[str, ExportedProgram], directory: Path, row: Backend, external: bool) -> None:
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower

    # Dim-order operators are a second set of copies that the stock kernels of XNNPACK builds do not need.
    config = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
    if external:
        for program in programs.values():
            _tag_weights(program)
    edge = to_edge_transform_and_lower(programs, partitioner=row.partitioners(), compile_config=config)
    # The last pass folds the quantized embedding into one operator.
    last = ExecutorchBackendConfig(
        do_quant_fusion_and_const_prop=True,
        external_constants=_weight_file if external else False,
    )
    program = edge.to_executorch(last)
    with (directory / MODEL).open("wb") as file:
        program.write_to_file(file)
    if external:
        program.write_tensor_data_to_file(str(directory))


def _weight_file(node: Node) -> str | None:
    """Which file a weight goes to; None for a constant of `Delegated`, which each method has for itself."""
    return None if "constant_" in node.name else Path(WEIGHTS).stem


def _tag_weights(program: ExportedProgram) -> None:
    """Name the file that a delegate's weights go to."""
    signature = program.graph_signature
    weights = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in weights and (file := _weight_file(node)):
            node.meta.setdefault("custom", {})["delegate_constant_tag"] = file


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
