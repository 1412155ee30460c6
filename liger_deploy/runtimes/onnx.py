"""OnnxSession: a bundle on ONNX Runtime. Needs onnxruntime and numpy, neither torch nor transformers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from liger_deploy.bundle import Bundle
from liger_deploy.errors import BundleError, UserError
from liger_deploy.runtimes.session import BaseSession, Logits
from liger_deploy.state import Array

OPS = Path(__file__).parents[1] / "native" / "libliger_ort_ops.so"  # written by `make native`
OPS_VARIABLE = "LIGER_ORT_OPS"


def find_ops() -> Path | None:
    """The library with this project's kernels: the path in $LIGER_ORT_OPS ("none": no library), else the package's own.

    None where there is none: bundles then run on ONNX Runtime's operators alone, which is slower.
    """
    named = os.environ.get(OPS_VARIABLE)
    if named:
        return None if named == "none" else Path(named)
    return OPS if OPS.is_file() else None


_CPU: list[Any] = ["CPUExecutionProvider"]
_PROVIDERS = {"cpu": _CPU, "cuda": [("CUDAExecutionProvider", {"use_tf32": "0"}), *_CPU]}


@dataclass(frozen=True)
class _Run:
    """One bound call; holding the buffers keeps them alive."""

    binding: Any
    tokens: Any
    valid: Any
    logits: Any


class OnnxSession(BaseSession):
    """State lives in two sets of ONNX Runtime buffers, bound as input and output in turn: a step copies none of it."""

    def __init__(self, bundle: Bundle, threads: int = 0) -> None:
        """Load a bundle. `threads`: of ONNX Runtime; 0 is its own choice.

        Raises:
            BundleError: the graph does not load, or is not what the manifest says.
            UserError: the kernel library is not one, or the bundle is for a GPU and there is none to use.
        """
        super().__init__(bundle.manifest)
        self._sets: tuple[list[Any], ...] = ([], [])  # two sets of state buffers; `_turn` says which is current
        self._steps: dict[int, _Run] = {}
        self._turn = 0
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        self._device = self.manifest.graph.requires.get("device", "cpu")
        if self._device == "cuda":
            _check_cuda(bundle)
        elif ops := find_ops():
            _register(options, ops)
        try:
            self._ort = ort.InferenceSession(str(bundle.file("model")), options, providers=_PROVIDERS[self._device])
        except Exception as error:  # ONNX Runtime raises its own types, RuntimeError and others
            raise BundleError(f"{bundle.path} does not load in onnxruntime {ort.__version__}: {_line(error)}") from None
        if len(self._ort.get_providers()) < len(_PROVIDERS[self._device]):  # ONNX Runtime falls back to the CPU
            raise UserError(f"onnxruntime {ort.__version__} finds no CUDA or cuDNN that it can use on this machine")
        self._check_names(bundle)

    def _check_names(self, bundle: Bundle) -> None:
        """The graph has exactly the manifest's inputs and outputs."""
        state = self.manifest.graph.state
        inputs, outputs = ({x.name for x in values} for values in (self._ort.get_inputs(), self._ort.get_outputs()))
        if inputs != {"tokens", "valid", *(t.input for t in state)} or outputs != {
            "logits",
            *(t.output for t in state),
        }:
            raise BundleError(f"{bundle.path}: the graph's inputs and outputs are not those of its manifest")

    def _run(self, tokens_BT: Array, valid_B: Array) -> Logits:
        step = tokens_BT.shape[1] == 1 and valid_B.all()
        run = self._steps.get(self._turn) if step else None
        if run is None:
            run = self._bind(tokens_BT, valid_B)
            if step:  # a step's binding and buffers are used again: later steps allocate nothing but what they return
                self._steps[self._turn] = run
        else:
            run.tokens.update_inplace(tokens_BT)
        self._ort.run_with_iobinding(run.binding)
        self._turn = 1 - self._turn
        return np.array(run.logits.numpy())

    def _bind(self, tokens_BT: Array, valid_B: Array) -> _Run:
        """Tokens in, logits out, the state from the current set of buffers into the other."""
        logits = np.empty((len(tokens_BT), self.manifest.model.vocab_size), np.float32)
        # On the device: an input that is not is copied there when it is bound, and never again.
        tokens, valid = (ort.OrtValue.ortvalue_from_numpy(x, self._device, 0) for x in (tokens_BT, valid_B))
        run = _Run(self._ort.io_binding(), tokens, valid, ort.OrtValue.ortvalue_from_numpy(logits))
        run.binding.bind_ortvalue_input("tokens", run.tokens)
        run.binding.bind_ortvalue_input("valid", run.valid)
        run.binding.bind_ortvalue_output("logits", run.logits)
        old_set, new_set = self._sets[self._turn], self._sets[1 - self._turn]
        for tensor, old, new in zip(self.manifest.graph.state, old_set, new_set, strict=True):
            run.binding.bind_ortvalue_input(tensor.input, old)
            run.binding.bind_ortvalue_output(tensor.output, new)
        return run

    def _read(self) -> dict[str, Array]:
        named = zip(self.spec.tensors, self._sets[self._turn], strict=True)
        return {spec.name: np.array(value.numpy(), dtype=spec.dtype) for spec, value in named}

    def _write(self, tensors: dict[str, Array], batch: int) -> None:
        arrays = [np.ascontiguousarray(tensors[t.name], dtype=t.dtype) for t in self.manifest.graph.state]
        self._clear()
        put = ort.OrtValue.ortvalue_from_numpy
        self._sets = tuple([put(a.copy(), self._device, 0) for a in arrays] for _ in range(2))

    def _clear(self) -> None:
        self._sets, self._steps, self._turn = ([], []), {}, 0


def _check_cuda(bundle: Bundle) -> None:
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        hint = "pip install onnxruntime-gpu in its place, or export with --device cpu"
        raise UserError(f"{bundle.path} was exported for a GPU, and this onnxruntime is for CPUs: {hint}")
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # CUDA and cuDNN of pip's packages, where there are such


def _register(options: Any, ops: Path) -> None:
    try:
        options.register_custom_ops_library(str(ops))
    except Exception as error:
        hint = f"build it again with `make native`, or set {OPS_VARIABLE}=none to run without it"
        raise UserError(
            f"{ops} is no kernel library for onnxruntime {ort.__version__}: {_line(error)}; {hint}"
        ) from None


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
