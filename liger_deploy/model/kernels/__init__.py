"""Triton kernels, one file an op. They run on CUDA, and on a CPU under TRITON_INTERPRET=1."""

from __future__ import annotations

import os
from typing import Any

from torch.library import wrap_triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def launcher(kernel: Any) -> Any:
    """What an op launches: the kernel as a graph may hold it, or, interpreted, the kernel itself."""
    return kernel if INTERPRETED else wrap_triton(kernel)
