"""The C++ kernel of the `liger` nodes and their plain-operator body: both equal the float64 loops, in ONNX Runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper
from transformers import PreTrainedModel

import liger_deploy as ld
from benchmarks.attention_op import node
from liger_deploy import gates
from liger_deploy.export.onnx_ops import AttentionKind
from liger_deploy.model import reference
from liger_deploy.model.ops import has_one_node
from liger_deploy.runtimes.onnx import OPS, OPS_VARIABLE
from liger_deploy.verify import compare
from tests.conftest import liger, relative, small_llama
from tests.tolerances import OP

CHUNK = 200
STRUCTURES = [name for name in gates.STRUCTURES if has_one_node(ld.LigerConfig(name))]
# head dim, query heads per KV head, window: one query head and more than four; whole vectors (a step has a form of its
# own for them) and not.
SIZES = [(16, 1, 5), (64, 4, 64), (20, 3, 7), (32, 6, 33), (64, 6, 33)]
GROUPS = 2


def kind(structure: str, dim: int, queries: int, window: int, **changes: Any) -> AttentionKind:
    config = ld.LigerConfig(structure, window, **changes)
    text = json.dumps(config.to_dict())
    return AttentionKind(text, dim**-0.5, GROUPS, queries, dim, (window + CHUNK, dim // 4 * 2))


def frequencies(of: AttentionKind) -> torch.Tensor:
    half = of.rope[1] // 2
    return 100.0 ** -(torch.arange(half, dtype=torch.float64) / half)


def inputs(of: AttentionKind, tokens: int, gate: float = 3) -> list[np.ndarray]:
    """q, k, v and the gate's key of one row, and the tables; random, gates up to `gate` and more."""
    generator = np.random.default_rng(tokens)
    width = of.groups * of.head_dim
    packed = [generator.standard_normal((1, tokens, n)).astype(np.float32) for n in (width * of.queries, width, width)]
    key = (generator.standard_normal((1, tokens, width)) * gate).astype(np.float32)
    angles = np.arange(of.rope[0])[:, None] * np.tile(frequencies(of).numpy(), 2)
    return [*packed, key, np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)]


def runtime(of: AttentionKind, ops: Path | None, body: bool = True) -> ort.InferenceSession:
    """A graph of one node, with its body or (for the kernel alone) without."""
    options = ort.SessionOptions()
    if ops:
        options.register_custom_ops_library(str(ops))
    return ort.InferenceSession(node(of, CHUNK if body else None), options, providers=["CPUExecutionProvider"])


def run(
    session: ort.InferenceSession, of: AttentionKind, arrays: list[np.ndarray], cuts: list[int]
) -> list[np.ndarray]:
    """The tokens in parts, each continuing the state of the last: out [T, H*K], and the final state."""
    state: list[Any] = [np.zeros((1, *shape), np.float32) for shape in of.state]
    outs, start = [], 0
    for count in cuts:
        part = [x[:, start : start + count] for x in arrays[:4]]
        counts = [np.array([start]), np.array([count])]
        names = [x.name for x in session.get_inputs()]
        out, *state = session.run(None, dict(zip(names, [*part, *counts, *state, *arrays[4:]], strict=True)))
        outs.append(out[0])
        start += count
    return [np.concatenate(outs), *state]


def expected(of: AttentionKind, arrays: list[np.ndarray]) -> torch.Tensor:
    """[T, H*K] by the float64 loops, with the key that feeds the gate apart from the key."""
    q, k, v, key = (torch.from_numpy(x[0]).unflatten(-1, (-1, of.head_dim)) for x in arrays[:4])
    config, outs = of.liger, []
    turned = frequencies(of)
    for head in range(q.shape[1]):
        shared = head // of.queries
        heads = q[:, head], k[:, shared], v[:, shared]
        near = partial_rope_window(*heads, config.window, of.scaling, turned)
        if config.structure == "window":
            outs.append(config.window_weight * near)
            continue
        decay = reference.alpha(reference.pool(key[:, shared], config), config, shared)
        phi = [x.double().softmax(-1) if config.feature_map == "softmax" else x for x in heads[:2]]
        long, _ = reference.recurrent(phi[0], 1 - decay if config.structure == "hgrn2" else phi[1], heads[2], decay)
        outs.append(config.recurrent_weight * long + config.window_weight * near)
    return torch.cat(outs, -1)


def partial_rope_window(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: int, scale: float, turned: torch.Tensor
) -> torch.Tensor:
    """`reference.window`, with rotary embedding of the first channels alone (Phi's partial rotary factor)."""
    q, k, v, half = q.double(), k.double(), v.double(), len(turned)
    outs = []
    for t in range(len(q)):
        seen = torch.arange(max(0, t - keys + 1), t + 1)
        angle = (t - seen)[:, None] * turned  # the query turns by its distance to each key
        a, b, rest = q[t, :half], q[t, half : 2 * half], q[t, 2 * half :].expand(len(seen), -1)
        query = torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest], -1)
        outs.append(((query * k[seen]).sum(-1) * scale).softmax(0) @ v[seen])
    return torch.stack(outs)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_kernel_is_the_equations(structure: str, size: tuple[int, int, int]) -> None:
    of = kind(structure, *size)
    session = runtime(of, OPS, body=False)
    for tokens in (1, 63, 64, 65, 200):
        arrays = inputs(of, tokens)
        out, *_ = run(session, of, arrays, [tokens])
        assert relative(out, expected(of, arrays)) < 5 * OP, tokens


@pytest.mark.parametrize("limit", ["plain", "avx2", ""])
@pytest.mark.parametrize("structure", ["gla", "hgrn2", "mamba2", "window"])
def test_every_instruction_set(structure: str, limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGER_SIMD", limit)
    for size in SIZES:
        of = kind(structure, *size)
        arrays = inputs(of, 90)
        assert relative(run(runtime(of, OPS, body=False), of, arrays, [90])[0], expected(of, arrays)) < 5 * OP


@pytest.mark.parametrize("changes", [{}, {"feature_map": "identity"}, {"gate_normalizer": 1.0}], ids=str)
@pytest.mark.parametrize("structure", ["gla", "hgrn2", "rwkv6", "mamba2", "mlstm", "fixed_decay"])
def test_extreme_gates(structure: str, changes: dict[str, Any]) -> None:
    of = kind(structure, 16, 2, 4, **changes)
    arrays = inputs(of, 40, gate=60)
    assert np.abs(arrays[3]).max() > 100
    assert relative(run(runtime(of, OPS, body=False), of, arrays, [40])[0], expected(of, arrays)) < 5 * OP


def test_bounded_gate() -> None:
    of = kind("hgrn2", 20, 2, 4, lower_bound=0.3, gate_normalizer=3.0)
    arrays = inputs(of, 40, gate=20)
    assert relative(run(runtime(of, OPS, body=False), of, arrays, [40])[0], expected(of, arrays)) < 5 * OP


@pytest.mark.parametrize("structure", ["gla", "mamba2", "window"])
def test_body_is_kernel_in_any_split(structure: str) -> None:
    of = kind(structure, 32, 3, 16)
    arrays = inputs(of, 150)
    whole = run(runtime(of, OPS, body=False), of, arrays, [150])
    for session in (runtime(of, OPS), runtime(of, None)):
        for cuts in ([150], [1, 149], [16, 15, 17, 102], [1] * 30 + [120]):
            for ours, want in zip(run(session, of, arrays, cuts), whole, strict=True):
                assert relative(ours, want) < 5 * OP


def test_rows_of_different_lengths_are_rows_alone() -> None:
    """Ragged `valid`, rows with different pasts; what lies behind `valid` must not matter, so it is NaN here."""
    of, session = kind("gla", 20, 3, 7), runtime(kind("gla", 20, 3, 7), OPS, body=False)
    arrays = inputs(of, 40)
    names = [x.name for x in session.get_inputs()]
    generator = np.random.default_rng(0)
    state = [generator.standard_normal((3, *shape)).astype(np.float32) for shape in of.state]
    lengths, valid = np.array([0, 3, 90]), np.array([40, 1, 17])
    part = [np.repeat(x, 3, 0) for x in arrays[:4]]
    for row, count in enumerate(valid):
        for x in part:
            x[row, count:] = np.nan
    together = session.run(None, dict(zip(names, [*part, lengths, valid, *state, *arrays[4:]], strict=True)))
    for row, count in enumerate(valid):
        own = [x[row : row + 1, :count] for x in part]
        one = [x[row : row + 1] for x in (lengths, valid, *state)]
        alone = session.run(None, dict(zip(names, [*own, *one, *arrays[4:]], strict=True)))
        np.testing.assert_array_equal(together[0][row, :count], alone[0][0])
        for both, single in zip(together[1:], alone[1:], strict=True):
            np.testing.assert_array_equal(both[row], single[0])


def test_unfilled_slots_are_never_read() -> None:
    """Poison where no token was yet changes nothing."""
    of = kind("gla", 16, 2, 8)
    session, arrays = runtime(of, OPS, body=False), inputs(of, 3)
    names = [x.name for x in session.get_inputs()]
    outs = []
    for poison in (0.0, np.nan):
        state = [np.zeros((1, *of.state[0]), np.float32), *(np.full((1, *s), poison, np.float32) for s in of.state[1:])]
        counts = [np.array([0]), np.array([3])]
        outs.append(session.run(None, dict(zip(names, [*arrays[:4], *counts, *state, *arrays[4:]], strict=True)))[0])
    np.testing.assert_array_equal(*outs)


@pytest.mark.parametrize("shape", [(1, 5, 33), (1, 4, 32), (2, 5, 32)], ids=str)
def test_shapes_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    of = kind("gla", 16, 2, 8)
    session, arrays = runtime(of, OPS, body=False), inputs(of, 5)
    arrays[2] = np.zeros(shape, np.float32)
    names = [x.name for x in session.get_inputs()]
    state = [np.zeros((1, *s), np.float32) for s in of.state]
    with pytest.raises(Exception, match="the inputs' shapes do not fit each other"):
        session.run(
            None, dict(zip(names, [*arrays[:4], np.array([0]), np.array([5]), *state, *arrays[4:]], strict=True))
        )


def test_an_unknown_structure_is_refused() -> None:
    of = kind("gla", 16, 2, 8)
    one = helper.make_node("Attention", list("abcdefghijk"), list("wxyz"), domain="liger", **of.attributes)
    next(a for a in one.attribute if a.name == "structure").s = b"delta_net"
    typed = [helper.make_tensor_value_info(n, onnx.TensorProto.INT64 if n in "ef" else 1, None) for n in "abcdefghijk"]
    graph = helper.make_graph([one], "g", typed, [helper.make_tensor_value_info(n, 1, None) for n in "wxyz"])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid(d, 1) for d in ("liger",)], ir_version=10)
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(OPS))
    with pytest.raises(Exception, match="unknown structure 'delta_net': this library is older than the model"):
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


# What a bundle runs, proved by ONNX Runtime's profiler.
def executed(bundle: Path, ops: Path | None, tmp_path: Path) -> set[str]:
    options = ort.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    if ops:
        options.register_custom_ops_library(str(ops))
    session = ort.InferenceSession(str(bundle / "model.onnx"), options, providers=["CPUExecutionProvider"])
    shapes = {x.name: [d if isinstance(d, int) else 1 for d in x.shape] for x in session.get_inputs()}
    integers = {x.name for x in session.get_inputs() if x.type == "tensor(int64)"}
    session.run(None, {n: np.ones(s, np.int64 if n in integers else np.float32) for n, s in shapes.items()})
    events = json.loads(Path(session.end_profiling()).read_text())
    return {event["args"]["op_name"] for event in events if event.get("cat") == "Node" and "op_name" in event["args"]}


def test_one_file_runs_our_kernel_or_its_body(tiny_bundle: Path, tmp_path: Path) -> None:
    ours, stock = (executed(tiny_bundle, ops, tmp_path) for ops in (OPS, None))
    assert ours & {"Attention", "LinearAttention"} == {"Attention"}
    assert stock & {"Attention", "LinearAttention"} == {"LinearAttention"}
    assert len(ours) < 20  # few kinds of node: norms and projections are fused too
    assert {"SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization"} <= ours & stock


@pytest.mark.parametrize("config", [{"structure": "hgrn2"}, {"softmax_layers": (1,), "softmax_window": 70}], ids=str)
def test_bundles_on_both(config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = liger(small_llama(), window=9, **config)
    ld.export_bundle(model, "onnx", tmp_path / "b")
    prompt = np.random.default_rng(0).integers(0, 97, 300).tolist()
    for ops in (str(OPS), "none"):
        monkeypatch.setenv(OPS_VARIABLE, ops)
        rows = compare(ld.load_session(tmp_path / "b"), ld.EagerSession(model), prompt, tokens=60)
        assert [row.check for row in rows if not row.passed] == []


@pytest.mark.parametrize("what", ["missing", "text", "another"])
def test_a_wrong_library_is_named(
    what: str, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: PreTrainedModel
) -> None:
    path = tmp_path / "lib.so"
    if what == "text":
        path.write_text("not a library")
    elif what == "another":
        path = next(Path(torch.__file__).parent.glob("lib/libc10.so"))
    monkeypatch.setenv(OPS_VARIABLE, str(path))
    with pytest.raises(ld.UserError, match=r"is no kernel library for onnxruntime .*make native"):
        ld.load_session(tiny_bundle)
