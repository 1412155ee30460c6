"""The table of targets: a target is a row here and one module beside this file."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from liger_deploy.errors import UserError
from liger_deploy.export.backends import BACKENDS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from liger_deploy.bundle import GraphInfo

Dtype = Literal["float32", "float16", "bfloat16"]
Quant = Literal["none", "int8", "int4"]
QUANTS = ("none", "int8", "int4")
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class ExportOptions:
    """What a user may choose about an export.

    Attributes:
        dtype: of the weights and the windows; the recurrent state is float32 always.
        quant: weight-only quantization of the matrices.
        batch: rows the graph takes; 0 for any number; None takes the target's default.
        device: where the bundle will run.
        chunk: most tokens a prefill call takes; 0 takes the target's default.
        group_size: at 4 bits, weights of a row that share a scale; more are faster and coarser.
        external_weights: a program's weights in a file beside it, which other programs of the model may share.
        backend: what a program of the executorch target is lowered for; empty takes its default, XNNPACK.
        calibrate: text, as `finetune` takes it, over which 4 bits are chosen (GPTQ); empty rounds to the nearest.
    """

    dtype: Dtype = "float32"
    quant: Quant = "none"
    batch: int | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    chunk: int = 0
    group_size: int = 32
    external_weights: bool = False
    backend: Literal["", "xnnpack", "liger", "coreml", "vulkan", "portable"] = ""
    calibrate: str = ""


Lower = Callable[["PreTrainedModel", Path, ExportOptions], "GraphInfo"]


@dataclass(frozen=True)
class Target:
    """One runtime to export for.

    Attributes:
        module: module of this package with `lower(model, directory, options) -> GraphInfo`, imported when asked for.
        packages: modules the lowering needs, beyond torch.
        extra: the extra of liger-deploy that installs them.
        dtypes, quants, devices: what the lowering supports; the rest is refused.
        chunk: default of `ExportOptions.chunk`; 0 where that depends on the device.
        batch: default of `ExportOptions.batch`; if it is not 0, the number of rows is fixed at export.
        backends: what `ExportOptions.backend` may be.
        group_sizes: what `ExportOptions.group_size` may be.
        calibrates: whether its 4 bits keep what `ExportOptions.calibrate` chooses.
    """

    name: str
    module: str
    packages: tuple[str, ...]
    extra: str
    dtypes: tuple[str, ...]
    quants: tuple[str, ...]
    devices: tuple[str, ...]
    chunk: int
    batch: int = 0
    backends: tuple[str, ...] = ()
    group_sizes: tuple[int, ...] = (32, 64, 128)
    calibrates: bool = False

    def lower(self) -> Lower:
        """The lowering function. Raises UserError when a package it needs is not installed."""
        for package in self.packages:
            try:
                importlib.import_module(package)
            except ImportError:
                hint = f"pip install 'liger-deploy[{self.extra}]'"
                raise UserError(f"target {self.name!r} needs {package}: {hint}") from None
        lower: Lower = importlib.import_module(f"liger_deploy.export.{self.module}").lower
        return lower

    def check(self, options: ExportOptions) -> None:
        """Raise UserError for options that this target does not support."""
        allowed = {"dtype": self.dtypes, "quant": self.quants, "device": self.devices}
        for name, values in allowed.items():
            if (value := getattr(options, name)) not in values:
                raise UserError(f"target {self.name!r} does not support --{name} {value}: choose {' or '.join(values)}")
        if options.group_size not in self.group_sizes:
            raise UserError(f"target {self.name!r} has --group-size {' or '.join(map(str, self.group_sizes))}")
        if options.calibrate and not (self.calibrates and options.quant == "int4"):
            able = " or ".join(target.name for target in TARGETS.values() if target.calibrates)
            raise UserError(f"--calibrate chooses the 4 bits of target {able!r}: it goes with --quant int4 there")
        if options.external_weights and not self.backends:
            raise UserError(f"target {self.name!r} has no --external-weights: only executorch has")
        if options.backend and options.backend not in self.backends:
            raise UserError(f"target {self.name!r} has no --backend {options.backend}")
        if options.batch == 0 and self.batch:
            raise UserError(f"target {self.name!r} fixes the number of rows at export: give --batch a number")
        if (options.batch or 0) < 0 or not 0 <= options.chunk <= 1024:
            raise UserError("--batch must be positive or 'dynamic', and --chunk between 1 and 1024")


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("onnx", "onnx", ONNX_PACKAGES, "onnx", DTYPES, QUANTS, ("cpu", "cuda"), chunk=256, calibrates=True),
        Target(
            "executorch",
            "executorch",
            ("executorch",),
            "executorch",
            ("float32", "float16"),
            QUANTS,
            ("cpu",),
            64,
            1,
            tuple(BACKENDS),
        ),
        Target("inductor", "inductor", (), "", DTYPES, QUANTS, ("cpu", "cuda"), chunk=0, group_sizes=(32,)),
    )
}
