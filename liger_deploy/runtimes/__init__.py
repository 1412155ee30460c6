"""Runtimes: load a bundle, get a Session."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

from liger_deploy.bundle import Bundle
from liger_deploy.errors import BundleError, UserError

if TYPE_CHECKING:
    from liger_deploy.runtimes.session import BaseSession

# target -> (module, class, the package it needs, the extra that installs it)
_RUNTIMES = {
    "onnx": ("onnx", "OnnxSession", "onnxruntime", "onnx"),
    "executorch": ("executorch", "ExecuTorchSession", "executorch", "executorch"),
    "inductor": ("inductor", "InductorSession", "torch", "onnx"),
}


def load_session(bundle: str | os.PathLike[str] | Bundle, checksums: bool = True, threads: int = 0) -> BaseSession:
    """Load a bundle of any target. `threads`: of the runtime; 0 is its own choice.

    Raises:
        BundleError: missing, corrupt, newer than this library, or of an unknown target.
        UserError: the runtime's package is not installed.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle, checksums)
    target = opened.manifest.target
    if target not in _RUNTIMES:
        raise BundleError(f"{opened.path}: no runtime for target {target!r}; known are {', '.join(_RUNTIMES)}")
    module, name, package, extra = _RUNTIMES[target]
    try:
        importlib.import_module(package)
    except ImportError:
        raise UserError(f"a {target!r} bundle needs {package}: pip install 'liger-deploy[{extra}]'") from None
    session: BaseSession = getattr(importlib.import_module(f"liger_deploy.runtimes.{module}"), name)(opened, threads)
    return session
