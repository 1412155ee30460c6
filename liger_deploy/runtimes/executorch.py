"""ExecuTorchSession: a bundle on the ExecuTorch runtime. Needs executorch and torch, not transformers."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from liger_deploy.bundle import Bundle
from liger_deploy.errors import BundleError, UserError
from liger_deploy.runtimes.session import BaseSession, Logits
from liger_deploy.state import Array

OPS = Path(__file__).parents[1] / "native" / "libliger_executorch_ops.so"  # written by `make native`


class ExecuTorchSession(BaseSession):
    """Runs the methods `prefill` and `decode` of one loaded program; the state is tensors handed in and out."""

    def __init__(self, bundle: Bundle, threads: int = 0) -> None:
        """Load a bundle. `threads`: of ExecuTorch's one pool, shared by the process; 0 leaves it as it is.

        A loaded program keeps the pool that it was loaded with, so the number is set by the process's first session.

        Raises:
            BundleError: the program does not load: not one, for another runtime version, or with a backend or an
                operator that this build of the runtime lacks.
            UserError: another number of threads than the process's first session had.
        """
        from executorch.runtime import Runtime

        super().__init__(bundle.manifest)
        self._tensors: tuple[torch.Tensor, ...] = ()
        import executorch.kernels.quantized  # noqa: F401  (registers its operators with the runtime)

        path = str(bundle.file("model"))
        requires = self.manifest.graph.requires
        _check_backend(path, requires.get("backend", ""))
        if "operators" in requires:
            _load_operators(path)
        _set_threads(threads)
        with _captured_log() as log:
            try:
                weights = bundle.file("weights") if "weights" in self.manifest.graph.files else None
                self._program = Runtime.get().load_program(path, data_path=weights)
                if missing := {"decode", "prefill"} - self._program.method_names:
                    raise ValueError(f"it has no method {missing.pop()!r}")
                self._decode, self._prefill = (self._program.load_method(name) for name in ("decode", "prefill"))
            except Exception as error:  # the runtime raises RuntimeError, KeyError and others
                raise BundleError(f"{path} does not load in ExecuTorch: {_reason(log(), error)}") from None
        self._check_inputs(path)

    def _check_inputs(self, path: str) -> None:
        """Both methods take and give what the manifest says."""
        graph = self.manifest.graph
        state = [(graph.batch, *t.shape) for t in graph.state]
        expected = {
            "decode": [(graph.batch,), *state],
            "prefill": [(graph.batch, graph.chunk), (graph.batch,), *state],
        }
        logits = (graph.batch, self.manifest.model.vocab_size)
        for name, shapes in expected.items():
            meta = self._program.metadata(name)
            inputs = [tuple(meta.input_tensor_meta(i).sizes()) for i in range(meta.num_inputs())]
            outputs = [tuple(meta.output_tensor_meta(i).sizes()) for i in range(meta.num_outputs())]
            if inputs != shapes or outputs != [logits, *state]:
                raise BundleError(f"{path}: the inputs or outputs of {name!r} are not those of the manifest")

    def _run(self, tokens_BT: Array, valid_B: Array) -> Logits:
        if tokens_BT.shape[1] == 1 and valid_B.all():
            logits, *state = self._decode.execute((torch.from_numpy(tokens_BT[:, 0].copy()), *self._tensors))
        else:
            padding = self.manifest.graph.chunk - tokens_BT.shape[1]
            tokens = torch.from_numpy(np.pad(tokens_BT, ((0, 0), (0, padding))))
            logits, *state = self._prefill.execute((tokens, torch.from_numpy(valid_B), *self._tensors))
        self._tensors = tuple(state)
        return logits.numpy()  # type: ignore[no-any-return]

    def _read(self) -> dict[str, Array]:
        pairs = zip(self.spec.tensors, self._tensors, strict=True)
        return {s.name: np.array(t.to(getattr(torch, s.dtype)).numpy()) for s, t in pairs}

    def _write(self, tensors: dict[str, Array], batch: int) -> None:
        state = self.manifest.graph.state
        self._tensors = tuple(torch.from_numpy(np.array(tensors[t.name])).to(getattr(torch, t.dtype)) for t in state)

    def _clear(self) -> None:
        self._tensors = ()


def _check_backend(path: str, needed: str) -> None:
    """The runtime has the delegate that the program was lowered for."""
    from executorch.runtime import Runtime

    names = Runtime.get().backend_registry.registered_backend_names
    if needed and needed not in names:
        raise UserError(
            f"{path} was lowered for {needed}, and this build of ExecuTorch has {', '.join(names)}: "
            "run it where that is, or export with --backend xnnpack"
        )


def _load_operators(path: str) -> None:
    """Register this project's operator with the runtime."""
    if not OPS.is_file():
        raise UserError(
            f"{path} was lowered with --backend liger, and {OPS} is not there: build it with `make native`, "
            "or export with --backend xnnpack"
        )
    ctypes.CDLL(str(OPS))


_pool: list[int] = []  # how many threads the pool has, once a program was loaded


def _set_threads(threads: int) -> None:
    """Size the pool before a program is loaded: a delegate keeps the pool it was made with, and crashes on another."""
    from executorch.extension.pybindings import portable_lib

    if not _pool:
        if threads:
            portable_lib._unsafe_reset_threadpool(threads)
        _pool.append(portable_lib._threadpool_get_thread_count())
    if threads not in (0, _pool[0]):
        raise UserError(
            f"ExecuTorch's pool has {_pool[0]} threads in this process, not {threads}: start another process"
        )


@contextlib.contextmanager
def _captured_log() -> Iterator[Any]:
    """Yields a reader of the runtime's log: it goes to Python's stderr, or to the process's, by where it arises."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile("w+", errors="replace") as file:

        def read() -> str:
            file.flush()
            file.seek(0)
            return file.read()

        os.dup2(file.fileno(), 2)
        try:
            with contextlib.redirect_stderr(file):
                yield read
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _reason(log: str, error: Exception) -> str:
    """The first line of the log that is not a note, without its source location; else the exception's own."""
    lines = (re.sub(r"^(\[[^\]]*\]\s*)+", "", line).strip() for line in log.splitlines() if "cpuinfo" not in line)
    return next(filter(None, lines), str(error).strip().splitlines()[0])
