"""Turn a softmax-attention language model into a gated linear recurrent one, and run it anywhere.

The public names are imported when first used: `import liger_deploy` loads no framework.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from liger_deploy.bundle import Bundle as Bundle
    from liger_deploy.bundle import Manifest as Manifest
    from liger_deploy.config import LigerConfig as LigerConfig
    from liger_deploy.errors import UserError as UserError
    from liger_deploy.export import ExportOptions as ExportOptions
    from liger_deploy.export import export_bundle as export_bundle
    from liger_deploy.model.linearize import linearize as linearize
    from liger_deploy.model.linearize import load_model as load_model
    from liger_deploy.model.linearize import save_model as save_model
    from liger_deploy.runtimes import load_session as load_session
    from liger_deploy.runtimes.eager import EagerSession as EagerSession
    from liger_deploy.runtimes.session import Session as Session
    from liger_deploy.state import State as State

__version__ = "0.1.0"

_HOME = {
    "Bundle": "bundle",
    "Manifest": "bundle",
    "LigerConfig": "config",
    "UserError": "errors",
    "ExportOptions": "export",
    "export_bundle": "export",
    "linearize": "model.linearize",
    "load_model": "model.linearize",
    "save_model": "model.linearize",
    "load_session": "runtimes",
    "EagerSession": "runtimes.eager",
    "Session": "runtimes.session",
    "State": "state",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'liger_deploy' has no attribute {name!r}")
    return getattr(importlib.import_module(f"liger_deploy.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
