"""The delegates that an ExecuTorch program can be lowered for: a row each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from liger_deploy.errors import UserError


@dataclass(frozen=True)
class Backend:
    """One `--backend`.

    Attributes:
        name: under which a runtime registers it; empty where the runtime needs none.
        partitioners: what splits a graph into its delegates; raises UserError where a package is missing.
        quants, dtypes: what it takes; 16 bits without quantization only.
        fused: layers' mixing is this project's operator, which a runtime must have loaded.
    """

    name: str
    partitioners: Callable[[], list[Any]]
    quants: tuple[str, ...] = ("none",)
    dtypes: tuple[str, ...] = ("float32",)
    fused: bool = False


def _xnnpack() -> list[Any]:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    return [XnnpackPartitioner()]


def _core_ml() -> list[Any]:
    """In float32, as the state is, rather than in Core ML's default of float16."""
    try:
        import coremltools
        from executorch.backends.apple.coreml.compiler import CoreMLBackend
        from executorch.backends.apple.coreml.partition import CoreMLPartitioner
    except ImportError as error:
        raise UserError(f"--backend coreml needs coremltools ({error}): pip install coremltools") from None
    precision, target = coremltools.precision.FLOAT32, coremltools.target.iOS18
    specs = CoreMLBackend.generate_compile_specs(compute_precision=precision, minimum_deployment_target=target)
    return [CoreMLPartitioner(compile_specs=specs)]


def _vulkan() -> list[Any]:
    from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner

    return [VulkanPartitioner()]


BACKENDS: dict[str, Backend] = {
    "xnnpack": Backend("XnnpackBackend", _xnnpack, ("none", "int8", "int4"), ("float32", "float16")),
    "liger": Backend("XnnpackBackend", _xnnpack, ("none", "int8", "int4"), fused=True),
    "coreml": Backend("CoreMLBackend", _core_ml),
    "vulkan": Backend("VulkanBackend", _vulkan),
    "portable": Backend("", list),
}


def backend(name: str, quant: str, dtype: str) -> Backend:
    """The row of a name. Raises UserError where it does not take `quant` or `dtype`."""
    row = BACKENDS[name]
    if quant not in row.quants:
        raise UserError(f"--backend {name} does not take --quant {quant}: choose {' or '.join(row.quants)}")
    if dtype not in row.dtypes or (dtype != "float32" and quant != "none"):
        raise UserError(f"--backend {name} does not take --dtype {dtype} with --quant {quant}: leave out one of them")
    return row
