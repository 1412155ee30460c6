"""The Triton kernels against float64, on the GPU where there is one, else interpreted on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from liger_deploy.config import LigerConfig
from liger_deploy.model.kernels.attention_prefill import attention_prefill, prefill_on_ring
from liger_deploy.model.kernels.attention_sequence import SUB, attention_sequence
from liger_deploy.model.kernels.attention_step import attention_step, step_on_ring, supports, tiling
from liger_deploy.model.kernels.linear_step import linear_step
from liger_deploy.model.mixer import Heads, LayerState, Mixer, Segments
from liger_deploy.model.packed import pack, unpack
from liger_deploy.model.training import by_kernels
from liger_deploy.model.window import from_ring, to_ring
from tests.conftest import relative
from tests.tolerances import EXTREME, GRADIENT, OP

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # interpreted there: see conftest.py

STRUCTURES = ["gla", "hgrn2", "rwkv6", "mamba2", "mlstm", "gated_retention", "linear", "fixed_decay", "window"]
# rows, KV heads, queries per KV head, head dim, window, rotary channels, tokens seen before
SIZES = [
    (2, 2, 3, 16, 6, 16, (0, 11)),
    (1, 2, 1, 24, 7, 16, (3,)),
    (1, 1, 2, 16, 8, 0, (8,)),
    (1, 2, 3, 72, 5, 48, (4,)),
    (3, 8, 4, 64, 64, 64, (0, 63, 200)) if DEVICE == "cuda" else (2, 2, 2, 64, 64, 64, (63, 200)),
]
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter lacks bfloat16


def _table(window: int, rotary: int) -> tuple[Tensor, Tensor]:
    """cos and sin [W+1, rotary], float64."""
    frequency_H = 1e4 ** -(torch.arange(0, rotary, 2, dtype=torch.float64) / max(rotary, 1))
    angle_SK = torch.outer(torch.arange(window + 1, dtype=torch.float64), frequency_H).repeat(1, 2)
    return angle_SK.cos(), angle_SK.sin()


@pytest.mark.parametrize(
    ("strength", "dtype", "heads", "state"),
    [
        (1.0, torch.float32, 0, torch.float32),
        (60.0, torch.float32, 0, torch.float32),
        (1.0, HALF, 0, torch.float32),
        (1.0, torch.float32, 128, torch.float32),
        (1.0, HALF, 1024, HALF),
        (60.0, torch.float32, 1024, torch.float32),
    ],
)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_attention_step(
    structure: str,
    size: tuple[int, int, int, int, int, int, tuple[int, ...]],
    strength: float,
    dtype: torch.dtype,
    heads: int,
    state: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three tokens, gates weak and extreme, cut as for as many heads; the unfilled part of the ring is poisoned."""
    if heads:
        monkeypatch.setattr("liger_deploy.model.kernels.attention_step.tiling", lambda _, *sizes: tiling(heads, *sizes))
    batch, groups, queries, dim, window, rotary, seen = size
    tolerance = OP if dtype == torch.float32 else 1e-2
    torch.manual_seed(len(structure) + dim)
    config = LigerConfig(structure=structure, window=window, lower_bound=0.25 if structure == "hgrn2" else 0)
    assert supports(config, dim)
    cos_SK, sin_SK = (1.1 * x for x in _table(window, rotary))  # as YaRN's
    mixer, rope, length = Mixer(config, dim**-0.5), (cos_SK, sin_SK), torch.tensor(seen)
    filled = (torch.arange(window) >= window - length[:, None])[:, None, :, None]
    straight = [torch.randn(batch, groups, window, dim, dtype=torch.float64) * filled for _ in range(2)]
    recurrent = (torch.randn(batch, groups, dim, dim, dtype=torch.float64),) if structure != "window" else ()
    rings = [to_ring(x.masked_fill(~filled, torch.nan), length).to(DEVICE, dtype) for x in straight]
    ours = LayerState(tuple(x.to(DEVICE, state) for x in recurrent), *rings)
    theirs = LayerState(recurrent, *straight)
    for _ in range(3):
        wide = torch.randn(batch, 1, (queries + 3) * groups * dim, dtype=torch.float64)
        wide[..., -groups * dim :] *= strength
        wide = wide.to(dtype).double()
        exact, single = (_heads(x, groups, queries, dim) for x in (wide, wide.to(DEVICE, dtype)))
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "float", lambda x: x)  # the module's float32 casts: float64 throughout
            expected, theirs = mixer.after_state(exact, rope, theirs, length)
        table = [x.float().to(DEVICE) for x in rope]
        out, _ = step_on_ring(mixer, single, (table[0], table[1]), ours, length.to(DEVICE))
        length = length + 1
        assert relative(out.float().cpu(), expected) < tolerance
    filled = (torch.arange(window) >= window - length[:, None])[:, None, :, None]
    for found, value in zip((ours.window_k, ours.window_v), (theirs.window_k, theirs.window_v), strict=True):
        assert relative(from_ring(found.float().cpu(), length).masked_fill(~filled, 0), value * filled) < tolerance
    for found, value in zip(ours.recurrent, theirs.recurrent, strict=True):
        assert relative(found.float().cpu(), value) < tolerance


# rows, KV heads, queries per KV head, head dim, window, rotary channels, tokens, (seen before), (valid)
PREFILLS = [
    (2, 2, 3, 16, 6, 16, 21, (0, 11), (21, 3)),
    (1, 1, 1, 24, 7, 16, 70, (3,), (70,)),
    (2, 1, 2, 16, 8, 0, 1, (8, 2), (1, 0)),
    (3, 8, 4, 64, 64, 64, 200, (0, 63, 200), (200, 130, 65)) if DEVICE == "cuda"
    else (1, 1, 4, 16, 20, 16, 130, (200,), (129,)),
]  # fmt: skip


@pytest.mark.parametrize(("strength", "dtype"), [(1.0, torch.float32), (60.0, torch.float32), (1.0, HALF)])
@pytest.mark.parametrize("size", PREFILLS, ids=str)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_attention_prefill(
    structure: str,
    size: tuple[int, int, int, int, int, int, int, tuple[int, ...], tuple[int, ...]],
    strength: float,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two ragged calls, gates weak and extreme; what is not valid and not filled is poisoned."""
    batch, groups, queries, dim, window, rotary, tokens, seen, counts = size
    tolerance = (OP if strength == 1 else EXTREME) if dtype == torch.float32 else 1e-2
    torch.manual_seed(len(structure) + dim)
    config = LigerConfig(structure=structure, window=window, lower_bound=0.25 if structure == "hgrn2" else 0)
    mixer, length, valid = Mixer(config, dim**-0.5), torch.tensor(seen), torch.tensor(counts)
    rope = _table(window + tokens, rotary)
    filled = (torch.arange(window) >= window - length[:, None])[:, None, :, None]
    straight = [torch.randn(batch, groups, window, dim, dtype=torch.float64) * filled for _ in range(2)]
    recurrent = (torch.randn(batch, groups, dim, dim, dtype=torch.float64),) if structure != "window" else ()
    rings = [to_ring(x.masked_fill(~filled, torch.nan), length).to(DEVICE, dtype) for x in straight]
    ours = LayerState(tuple(x.float().to(DEVICE) for x in recurrent), *rings)
    theirs = LayerState(recurrent, *straight)
    real = (torch.arange(tokens) < valid[:, None])[:, :, None]
    for _ in range(2):
        wide = torch.randn(batch, tokens, (queries + 3) * groups * dim, dtype=torch.float64)
        wide[..., -groups * dim :] *= strength
        wide = wide.to(dtype).double()
        poisoned = wide.masked_fill(~real, torch.nan).to(DEVICE, dtype)
        exact, single = (_heads(x, groups, queries, dim) for x in (wide * real, poisoned))
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "float", lambda x: x)  # the module's float32 casts: float64 throughout
            expected, theirs = mixer.after_state(exact, rope, theirs, length, valid)
        table = [x.float().to(DEVICE) for x in rope]
        out, _ = prefill_on_ring(mixer, single, (table[0], table[1]), ours, length.to(DEVICE), valid.to(DEVICE))
        length = length + valid
        shown = real[..., None, None].expand_as(expected)
        assert relative(out.double().cpu()[shown], expected[shown]) < tolerance
    filled = (torch.arange(window) >= window - length[:, None])[:, None, :, None]
    for found, value in zip((ours.window_k, ours.window_v), (theirs.window_k, theirs.window_v), strict=True):
        assert relative(from_ring(found.float().cpu(), length).masked_fill(~filled, 0), value * filled) < tolerance
    for found, value in zip(ours.recurrent, theirs.recurrent, strict=True):
        assert relative(found.cpu(), value) < tolerance


# structure, gate strength, rows, KV heads, queries per KV head, head dim, window, rotary channels, tokens, documents
SEQUENCES = [
    ("gla", 1.0, 1, 1, 2, 16, 8, 16, 70, None),
    ("gla", 60.0, 1, 1, 1, 24, 20, 16, 150, (30, 70, 40)),
    ("hgrn2", 1.0, 1, 2, 3, 16, 70, 0, 33, None),
    ("rwkv6", 3.0, 2, 1, 2, 16, 6, 16, 65, (1, 60)),
    ("mamba2", 1.0, 1, 2, 3, 16, 6, 16, 70, None),
    ("linear", 1.0, 1, 1, 1, 16, 16, 16, 130, (129,)),
]  # fmt: skip
if DEVICE == "cuda":
    SEQUENCES += [
        ("gla", 1.0, 2, 8, 4, 64, 64, 64, 1000, (300, 500, 150)),
        ("gla", 60.0, 2, 8, 4, 64, 64, 64, 1000, (300, 500, 150)),
        ("mlstm", 1.0, 1, 2, 4, 128, 64, 128, 500, None),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("case", SEQUENCES, ids=str)
def test_attention_sequence(
    case: tuple[str, float, int, int, int, int, int, int, int, tuple[int, ...] | None],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Outputs and gradients, documents kept apart, padding at the end."""
    structure, strength, batch, groups, queries, dim, window, rotary, tokens, documents = case
    torch.manual_seed(tokens)
    config = LigerConfig(structure=structure, window=window)
    mixer, rope = Mixer(config, dim**-0.5), tuple(x.to(DEVICE) for x in _table(2 * window + SUB, rotary))
    lengths = torch.tensor([*(documents or (tokens,)), tokens - sum(documents or (tokens,))])
    numbers = torch.tensor([*range(1, len(lengths)), 0])
    segment = numbers.repeat_interleave(lengths).expand(batch, -1).contiguous().to(DEVICE)
    wide = torch.randn(batch, tokens, (queries + 3) * groups * dim, dtype=torch.float64)
    wide[..., -groups * dim :] *= strength
    single = wide.to(DEVICE, dtype).requires_grad_()
    exact = single.detach().double().requires_grad_()
    grad = torch.randn(batch, tokens, groups, queries, dim, dtype=torch.float64).to(DEVICE, dtype)
    grad *= (segment > 0)[:, :, None, None, None]
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "float", lambda x: x)  # the module's float32 casts: float64 throughout
        patch.setattr(mixer, "_zeros", lambda q: tuple(x.double() for x in Mixer._zeros(mixer, q)))
        segments = Segments.of(exact, None, segment)
        expected = mixer.sequence(_heads(exact, groups, queries, dim), rope, segments)
        (wanted,) = torch.autograd.grad(expected, exact, grad.double())
    cos, sin = (x.float() for x in rope)
    segments = Segments.of(single, None, segment)
    out = by_kernels(mixer, _heads(single, groups, queries, dim), (cos, sin), segments)
    assert out.dtype == dtype
    (found,) = torch.autograd.grad(out, single, grad)
    shown = (segment > 0)[..., None, None, None].expand_as(expected)
    tolerance = (OP if strength == 1 else EXTREME, GRADIENT) if dtype == torch.float32 else (1e-2, 2e-2)
    assert relative(out.double()[shown].cpu(), expected[shown].cpu()) < tolerance[0]
    parts = (_heads(x, groups, queries, dim) for x in (found.double(), wanted))
    for name, ours, theirs in zip(Heads._fields, *parts, strict=True):
        # The gate's gradient is a difference of sums that are rounded to 16 bits.
        allowed = 5e-2 if name == "gate_key" and dtype == HALF else tolerance[1]
        error = float((ours - theirs).norm()) / max(float(theirs.norm()), 1e-12)
        assert error <= allowed, f"{name}: {error:.1e}"


def test_attention_sequence_is_registered_as_it_behaves() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 20, 2, 2, 16, device=DEVICE), torch.randn(1, 20, 2, 16, device=DEVICE)
    cos, sin = (x.float().to(DEVICE) for x in _table(24, 16))
    tensors = [x.requires_grad_() for x in (q, k, k.clone(), k.detach().softmax(-1), -k.detach().abs())]
    segment = torch.ones(1, 20, dtype=torch.long, device=DEVICE)
    torch.library.opcheck(attention_sequence, (*tensors, segment, cos, sin, True, 0.5, 0.5, 0.25, 8))


def _heads(wide: Tensor, groups: int, queries: int, dim: int) -> Heads:
    q, k, v, gate = wide.split([queries * groups * dim, *[groups * dim] * 3], -1)
    return Heads(q.unflatten(-1, (groups, queries, dim)), *(x.unflatten(-1, (groups, dim)) for x in (k, v, gate)))


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("rows", "width"), [(20, 48), (13, 48), (7, 96), (7, 3001), (33, 2048), (9, 5000)])
@pytest.mark.parametrize(("norm", "swiglu", "residual"), [(1, 0, 0), (0, 1, 1), (1, 1, 0), (0, 0, 1), (1, 0, 1)])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_linear_step(
    bits: int, rows: int, width: int, norm: bool, swiglu: bool, residual: bool, dtype: torch.dtype
) -> None:
    """Odd sizes, with everything that may stand around the product; packed weights stand for what `unpack` gives."""
    torch.manual_seed(rows)
    x, weight = torch.randn(1, 1, width).to(dtype), torch.randn(rows * (1 + swiglu), width).to(dtype)
    packed = None if bits == 16 else pack(weight, bits)
    if packed:
        weight = unpack(*packed, width, torch.float32)
    scale = torch.randn(width).to(dtype) if norm else None
    other = torch.randn(1, 1, rows).to(dtype) if residual else None
    here = [t if t is None else t.to(DEVICE) for t in (x, *(packed or (weight, None)), scale, other)]
    out = linear_step(*here[:4], 1e-5, bool(swiglu), here[4]).cpu()
    exact = x.double()
    if scale is not None:
        exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5) * scale.double()
    exact = exact @ weight.double().T
    if swiglu:
        exact = torch.nn.functional.silu(exact[..., :rows]) * exact[..., rows:]
    if other is not None:
        exact = exact + other.double()
    assert relative(out.float(), exact) < (OP if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("width", [48, 256])
def test_packed_numbers(width: int) -> None:
    """Half a step of a row, or of a group's scale where that was not shrunk; a row of zeros stays one."""
    torch.manual_seed(width)
    weight = torch.randn(20, width)
    weight[3] = 0
    eight, four = pack(weight, 8), pack(weight, 4)
    assert (eight.words.shape, eight.scale.shape) == ((20, width // 4), (20,))
    assert ((unpack(*eight, width, torch.float32) - weight).abs() <= 0.5001 * eight.scale[:, None]).all()
    groups = -(-width // 32)
    assert (four.words.shape, four.scale.shape) == ((20, 4 * groups), (20, groups))
    q, scale = torch.arange(-8.0, 8.0).repeat(20, width // 16), torch.full((20, 1), 0.25)
    scale[3] = 0
    assert torch.equal(unpack(*pack(q * scale, 4), width, torch.float32), q * scale)  # what fits exactly is kept so
    assert relative(unpack(*four, width, torch.float32), weight) < 0.15
    assert not unpack(*four, width, torch.float32)[3].any()


def test_the_ops_are_registered_as_they_behave() -> None:
    """torch.library.opcheck: schema, fake tensors, mutation."""
    # Interpreted, a kernel would run on the fake tensors.
    checks = ("test_schema", "test_faketensor") if DEVICE == "cuda" else ("test_schema",)
    q, k = torch.randn(1, 2, 2, 16, device=DEVICE), torch.randn(1, 2, 16, device=DEVICE)
    rings = [torch.randn(1, 2, 4, 16, device=DEVICE) for _ in range(2)]
    rope = [x.float().to(DEVICE) for x in _table(4, 16)]
    state, length = torch.randn(1, 2, 16, 16, device=DEVICE), torch.tensor([7], device=DEVICE)
    arguments = (q, k, k, k, length, state, *rings, *rope, "gla", True, 16.0, 0.0, 0.5, 0.5, 0.25)
    torch.library.opcheck(attention_step, arguments, test_utils=checks)
    q, k, valid = (x[:, None] for x in (q, k, length * 0 + 1))
    rope = [x.float().to(DEVICE) for x in _table(20, 16)]
    arguments = (q, k, k, k, length, valid[:, 0], state, *rings, *rope, "gla", True, 16.0, 0.0, 0.5, 0.5, 0.25)
    torch.library.opcheck(attention_prefill, arguments, test_utils=checks)
    x, weight = torch.randn(1, 1, 16, device=DEVICE), torch.randn(8, 16, device=DEVICE)
    for matrix in ((weight, None), pack(weight, 8), pack(weight, 4)):
        torch.library.opcheck(linear_step, (x, *matrix, None, 0.0, False, None), test_utils=checks)


ANALYSIS = """
import torch, triton
from triton.backends.compiler import GPUTarget

class Hopper:  # what the compiler asks of a GPU, where there is none
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)

triton.runtime.driver.set_active(Hopper())
from torch._higher_order_ops import triton_kernel_wrap as wrap
from liger_deploy.model.kernels.attention_prefill import (
    _prefill_keep, _prefill_read, _prefill_scan, _prefill_write,
)
from liger_deploy.model.kernels.attention_sequence import SUB, attention_sequence
from liger_deploy.model.kernels.attention_step import _attention_step
from liger_deploy.model.kernels.attention_step_many import _attention_step_many
from liger_deploy.model.kernels.linear_step import _linear_step, _linear_step_packed

def half(*shape):
    return torch.empty(*shape, dtype=torch.bfloat16)

linear = dict(
    x_ptr=half(64), norm_ptr=half(64), residual_ptr=half(64), out_ptr=half(64), eps=1e-5,
    N=64, D=64, BN=2, BD=64, NORM=True, SWIGLU=False, RESIDUAL=True, OVERLAP=True,
)
packed = dict(linear, words_ptr=torch.zeros(64, 8, dtype=torch.int32), scale_ptr=half(64, 2), W=8, BITS=4, BG=2, J=4)
linear |= dict(weight_ptr=half(64, 64))
state, ring, heads = torch.empty(2, 16, 16), half(2, 16, 16), half(2, 16)
attention = dict(
    q_ptr=heads, k_ptr=heads, v_ptr=heads, gate_ptr=heads, length_ptr=torch.zeros(1).long(), state_ptr=state,
    ring_k_ptr=ring, ring_v_ptr=ring.clone(), cos_ptr=state, sin_ptr=state, out_ptr=heads, channels_ptr=state, q_row=32,
    k_row=32, v_row=32, gate_row=32, normalizer=16.0, lower_bound=0.0, recurrent_weight=0.5, window_weight=0.5,
    scale=0.25, G=2, R=1, K=16, V=16, W=16, ROTARY=16, GATE=0, SCALAR=False, SOFTMAX=True, KEY_FROM_GATE=False, BR=16,
    BK=16, BV=16, BW=16, BH=16, BREST=16, BQ=1, BC=16, BJ=16, STAGES=1, OVERLAP=True,
)
strides = {f"{name}_{part}": 32 for name in "qkv" for part in ("batch", "row")} | dict(gate_batch=32, gate_row=32)
shape = dict(K=16, V=16, GATE=0, SCALAR=False, SOFTMAX=True, KEY_FROM_GATE=False, C=64, BK=16, BV=16, G=2, N=1)
names = "q k v gate length valid state before writes total prefix key faded ring_k ring_v cos sin out".split()
whole = dict(
    {f"{name}_ptr": half(2, 16, 16) for name in names}, **strides, **shape, normalizer=16.0, lower_bound=0.0, T=64,
    W=16, recurrent_weight=0.5, window_weight=0.5, scale=0.25, R=1, ROTARY=16, S=16, J=16, BR=1, BH=16, BREST=16, BW=16,
    BC=16, E=256, A=4, RECURS=True, STAGES=3,
)
whole |= {f"{name}_ptr": torch.empty(2, 16, 16) for name in "state writes total prefix".split()}
whole |= dict(length_ptr=torch.zeros(1).long(), valid_ptr=torch.zeros(1).long())

def taken(kernel):
    return {name: whole[name] for name in kernel.arg_names}

prefill = [(kernel, taken(kernel)) for kernel in (_prefill_write, _prefill_scan, _prefill_read, _prefill_keep)]
steps = [(_linear_step, linear), (_linear_step_packed, packed)]
steps += [(kernel, attention) for kernel in (_attention_step, _attention_step_many)]
for kernel, arguments in (*steps, *prefill):
    arguments = {name: arguments[name] for name in kernel.arg_names}
    if hasattr(wrap, "identify_accessed_tensors"):
        found = wrap.identify_accessed_tensors(kernel, arguments, {})
        print(*sorted(write.name for write in found.read_writes.writes))
    else:  # torch 2.11
        print(*sorted(wrap.identify_mutated_tensors(kernel, arguments, {})))
"""


def test_torch_sees_what_the_kernels_write() -> None:
    """Compiled for Hopper with overlapping launches: were the analysis to give up, every argument, weights too, would
    count as written."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", ANALYSIS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:8] == [
        "out_ptr", "out_ptr", "out_ptr ring_k_ptr ring_v_ptr state_ptr",
        "channels_ptr out_ptr ring_k_ptr ring_v_ptr state_ptr",
        "faded_ptr key_ptr prefix_ptr total_ptr writes_ptr", "before_ptr state_ptr", "out_ptr", "ring_k_ptr ring_v_ptr",
    ]  # fmt: skip
