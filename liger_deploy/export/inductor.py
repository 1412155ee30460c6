"""Lower a model with AOTInductor: one package with `decode` and `prefill`, and one copy of the weights beside it.

    decode:  token [B] int64, *state                         -> logits [B,N]
    prefill: tokens [B,chunk] int64, valid [B] int64, *state -> logits [B,N]

Both write the new state where the old one was. The weights are bound by the session (`user_managed`), so that both
graphs, and every session over the bundle, read the same memory.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule
from torch.torch_version import TorchVersion
from transformers import PreTrainedModel

from liger_deploy.bundle import GraphInfo
from liger_deploy.errors import UserError
from liger_deploy.export.graph import dense_experts, quiet
from liger_deploy.export.linears import as_products, check_reach, in_8_bits
from liger_deploy.export.rewrites import merge_linears, pack_linears, step_linears
from liger_deploy.export.targets import ExportOptions
from liger_deploy.model.attention import LigerAttention
from liger_deploy.model.describe import describe
from liger_deploy.model.step import PrefillModel, StepModel

MODEL, WEIGHTS = "model.pt2", "model.safetensors"
CHUNK = {"cpu": 128, "cuda": 512}  # default tokens of one prefill call
_MARCH = {"AVX512": "x86-64-v4", "AVX2": "x86-64-v3"}  # instead of "native": the package moves between processors


class InPlace(nn.Module):
    """A StepModel or PrefillModel that writes the new state where the old one was, and returns the logits alone."""

    def __init__(self, program: StepModel | PrefillModel) -> None:
        super().__init__()
        self.program = program

    def forward(self, *inputs: Tensor) -> Tensor:
        """Inputs of the program; the last ones, the state, are overwritten."""
        logits_BN: Tensor
        logits_BN, *new = self.program(*inputs)
        for kept, value in zip(inputs[-len(new) :], new, strict=True):
            if value is not kept:
                kept.copy_(value)
        return logits_BN


def lower(model: PreTrainedModel, directory: Path, options: ExportOptions) -> GraphInfo:
    """Write `model.pt2` and `model.safetensors` into `directory`. Options are those the target's row allows.

    Raises:
        UserError: no GPU, or no C++ compiler that makes loadable packages, on this machine.
    """
    _check_options(options)
    if model.device.type != options.device:
        model = copy.deepcopy(model).to(options.device)  # type: ignore[arg-type]
    chunk, batch, gpu = options.chunk or CHUNK[options.device], options.batch or 0, _on_gpu(options.device)
    if options.quant != "none":
        check_reach(model)
        model = model if gpu else in_8_bits(model)
    rings = _ring_layers(model) if gpu else set()
    with quiet():
        with contextlib.nullcontext() if gpu else as_products(model):
            graphs = {"decode": _trace(model, batch, 0, rings), "prefill": _trace(model, batch, chunk, rings)}
        if gpu:
            made: dict[str, Tensor] = {}
            for graph in graphs.values():
                merge_linears(graph.module, made)
                if options.quant != "none":
                    bits = int(options.quant.removeprefix("int"))
                    pack_linears(graph.module, bits, model.config.vocab_size, made)
            if batch == 1:
                step_linears(graphs["decode"].module)
        _package(graphs, directory / MODEL)
    _check_loads(directory / MODEL)
    _save_weights([graph.module for graph in graphs.values()], directory)
    state = [
        dataclasses.replace(t, ring=".window_" in t.name and int(t.name.split(".")[1]) in rings)
        for t in describe(model, "inductor").graph.state
    ]
    return GraphInfo({"model": MODEL, "weights": WEIGHTS}, chunk, batch, state, _requirements(options.device))


class Graph(NamedTuple):
    """A traced function with its parameters, and arguments of the shapes that it takes."""

    module: GraphModule
    arguments: tuple[Tensor, ...]


def _trace(model: PreTrainedModel, batch: int, chunk: int, rings: set[int]) -> Graph:
    """The decode graph, or the prefill graph for `chunk` tokens; any number of rows if `batch` is 0."""
    program = PrefillModel(model).eval() if chunk else StepModel(model).eval()
    rows, device = batch or 3, model.device
    tokens = torch.zeros((rows, chunk) if chunk else (rows,), dtype=torch.long, device=device)
    valid = (torch.full((rows,), chunk, device=device),) if chunk else ()
    arguments = (tokens, *valid, *program.zeros(rows))
    shapes = None if batch else {"inputs": tuple({0: Dim("batch", min=1, max=1 << 16)} for _ in arguments)}
    with torch.no_grad(), dense_experts(model), _on_rings(model, rings, chunk):
        traced = torch.export.export(InPlace(program).eval(), arguments, dynamic_shapes=shapes, strict=False)
    outputs = len(traced.graph_signature.user_outputs)
    if outputs != 1:
        raise AssertionError(f"the traced graph has {outputs} outputs, expected the logits alone")
    return Graph(traced.module(), arguments)  # type: ignore[arg-type]


def _on_gpu(device: str) -> bool:
    return device == "cuda"


def _ring_layers(model: PreTrainedModel) -> set[int]:
    """Layers whose window is a ring inside the graph: those that `liger::attention_step` carries."""
    from liger_deploy.model.kernels.attention_step import supports

    return {layer.layer_idx for layer in _layers(model) if supports(layer.liger, layer.head_dim)}


@contextlib.contextmanager
def _on_rings(model: PreTrainedModel, rings: set[int], chunk: int) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for layer in _layers(model):
            if layer.layer_idx in rings:
                from liger_deploy.model.kernels.attention_prefill import prefill_on_ring
                from liger_deploy.model.kernels.attention_step import step_on_ring

                stack.callback(setattr, layer, "after_state", layer.after_state)
                layer.after_state = prefill_on_ring if chunk else step_on_ring
        yield


def _layers(model: PreTrainedModel) -> list[LigerAttention]:
    return [module for module in model.modules() if isinstance(module, LigerAttention)]


def _package(graphs: dict[str, Graph], path: Path) -> None:
    from torch._inductor import aot_compile, config
    from torch._inductor.exc import InductorError, InvalidCxxCompiler
    from torch._inductor.package import package_aoti  # type: ignore[attr-defined]

    settings: dict[str, Any] = {"aot_inductor.package": True, "aot_inductor.package_constants_in_so": False}
    # As many threads as the machine that runs it gives. Else torch 2.13 takes them, but has room for this machine's
    # alone: a package crashes where there are more. And compiled for one, what is not parallel would be done by each.
    settings |= {"cpp.dynamic_threads": True, "cpp.threads": max(2, torch.get_num_threads())}
    if platform.machine() == "x86_64":
        # What the processor has any g++ of this age knows: not tried, it takes long. Around GPU kernels none is needed.
        settings["cpp.vec_isa_ok"] = graphs["decode"].arguments[0].device.type == "cpu"
        if hasattr(config.cpp, "march"):
            settings["cpp.march"] = _MARCH.get(torch.backends.cpu.get_cpu_capability(), "x86-64")
    try:
        with _arrays_declared():
            files = {name: aot_compile(*graph, options=settings) for name, graph in graphs.items()}
    except (InvalidCxxCompiler, InductorError) as error:
        if InvalidCxxCompiler.__name__ not in f"{type(error).__name__} {error}":
            raise
        raise UserError("target 'inductor' compiles C++: install g++, or set CXX to a compiler") from None
    package_aoti(str(path), files)  # type: ignore[arg-type]


@contextlib.contextmanager
def _arrays_declared() -> Iterator[None]:
    """Each array of sizes in Inductor's C++ is declared anew.

    Before torch 2.13 it looks for one that is there already by the `id` of an object that is gone by then, and now and
    then finds one of another scope: the C++ does not compile.
    """
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    cached = CppWrapperCpu.codegen_int_array_var

    def declare(self: Any, array: str, writeline: Any, known_statically: bool = False, graph: object = None) -> str:
        name: str = self._codegen_int_array_var_impl(array, writeline, known_statically)
        return name

    if TorchVersion(torch.__version__) < "2.13":
        CppWrapperCpu.codegen_int_array_var = declare  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        CppWrapperCpu.codegen_int_array_var = cached  # type: ignore[method-assign]


def _check_loads(path: Path) -> None:
    """A package may crash the process that loads it (a compiler that links libstdc++ statically makes such): try it in
    another one."""
    code = "import sys; from torch._inductor.package import load_package; load_package(sys.argv[1], 'decode')"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    if done.returncode:
        from torch._inductor.cpp_builder import get_cpp_compiler

        reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise UserError(
            f"what the compiler {get_cpp_compiler()} made does not load ({reason[0]}): set CXX to another, "
            "such as CXX=/usr/bin/g++"
        )


def _save_weights(modules: list[GraphModule], directory: Path) -> None:
    """Every constant of both graphs under the name that they ask for, each once."""
    weights: dict[str, Tensor] = {}
    for module in modules:
        weights |= dict(module.named_parameters(remove_duplicate=False))
        weights |= dict(module.named_buffers(remove_duplicate=False))
    kept: dict[int, str] = {}
    aliases = {}
    for name, value in weights.items():
        first = kept.setdefault(value.data_ptr(), name)
        if first != name:
            aliases[name] = first
    tensors = {name: weights[name].detach().contiguous() for name in weights if name not in aliases}
    save_file(tensors, directory / WEIGHTS, metadata=aliases)


def _requirements(device: str) -> dict[str, str]:
    """What a machine must have to load the package."""
    found = {"torch": ".".join(torch.__version__.split(".")[:2]), "platform": f"{sys.platform}-{platform.machine()}"}
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return {**found, "device": "cuda", "compute": f"{major}.{minor}"}
    return {**found, "device": "cpu", "cpu": torch.backends.cpu.get_cpu_capability()}


def _check_options(options: ExportOptions) -> None:
    """What the two devices do not have alike."""
    if options.device == "cpu" and options.quant == "int4":
        raise UserError("target 'inductor' has --quant int4 on a GPU only: use int8, or --target onnx")
    if options.device == "cuda" and options.quant != "none" and options.batch != 1:
        raise UserError(f"--quant {options.quant} is for one row on a GPU: add --batch 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs a GPU and a CUDA build of torch: this torch sees none")
