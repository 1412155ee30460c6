"""Triton kernels, one file an op; `attention_step` has a second one, for many heads.

They run on CUDA, and on a CPU under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.library import wrap_triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def start_followers():
    """Let the kernel after this one start as soon as all of this one's programs run. Returns 0."""
    text: tl.constexpr = "griddepcontrol.launch_dependents; mov.u32 $0, 0;"
    return tl.inline_asm_elementwise(text, "=r", [], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def predecessor_done():
    """Wait until the kernel before this one has ended. Returns 0.

    Whatever that kernel wrote must be read at addresses to which the result was added. (Triton's `gdc_wait` needs no
    such thing, but counts as impure, and AOTInductor then takes every argument of a kernel for mutated.)
    """
    text: tl.constexpr = "griddepcontrol.wait; mov.u32 $0, 0;"
    return tl.inline_asm_elementwise(text, "=r", [], dtype=tl.int32, is_pure=True, pack=1)


def overlaps() -> bool:
    """Whether kernels may start before the one ahead of them has ended (programmatic dependent launch)."""
    return not INTERPRETED and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def launcher(kernel: Any, argument: Tensor) -> Any:
    """What an op launches: the kernel as a graph may hold it; interpreted, the kernel itself, unless its arguments are
    fake ones of a trace."""
    if not INTERPRETED:
        return wrap_triton(kernel)
    return _Nothing() if isinstance(argument, FakeTensor | FunctionalTensor) else kernel


class _Nothing:
    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: None
