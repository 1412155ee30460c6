"""Products with matrices in 4 bits on ONNX Runtime: this project's kernel and the nodes' body against float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

import liger_deploy as ld
from liger_deploy.export import onnx_ops
from liger_deploy.export.quantize import quantize
from liger_deploy.runtimes.onnx import OPS
from tests.conftest import liger, relative, small_llama
from tests.test_kernel import executed
from tests.tolerances import OP

FORMS = ["plain", "avx2", ""]
SHAPES = [(16, 32), (50, 96), (48, 1000), (64, 2816)]  # rows, columns: whole chunks and panels of the kernel, and not


def weights(rows: int, columns: int, group: int) -> dict[str, np.ndarray]:
    """Random numbers, scales and zero points."""
    generator, groups = np.random.default_rng(rows + columns), -(-columns // group)
    return {
        "numbers": generator.integers(0, 256, (rows, groups, group // 2), np.uint8),
        "scales": (generator.standard_normal((rows, groups)) / 100).astype(np.float16),
        "zeros": generator.integers(0, 256, (rows, (groups + 1) // 2), np.uint8),
    }


def dense(w: dict[str, np.ndarray], columns: int) -> np.ndarray:
    """The matrix [N, K] in float64."""
    halves = [np.stack([w[name] & 15, w[name] >> 4], -1) for name in ("numbers", "zeros")]
    zeros = halves[1].reshape(len(w["zeros"]), -1)[:, : w["scales"].shape[1], None]
    groups = (halves[0].reshape(*w["numbers"].shape[:2], -1).astype(float) - zeros) * w["scales"].astype(float)[
        ..., None
    ]
    return groups.reshape(len(groups), -1)[:, :columns]


def tokens(count: int, columns: int, group: int, exact: bool) -> np.ndarray:
    """Random; `exact`: whole numbers that reach 127 in each group, which 8 bits hold as they are."""
    generator = np.random.default_rng(count)
    if not exact:
        return generator.standard_normal((1, count, columns)).astype(np.float32)
    x = generator.integers(-127, 128, (1, count, columns)).astype(np.float32)
    x[..., ::group] = 127
    return x


def runtime(
    op: str, w: dict[str, np.ndarray], columns: int, group: int, ops: Path | None, constant: bool = True, **changes: Any
) -> ort.InferenceSession:
    attributes = {"K": columns, "N": len(w["numbers"]), "block_size": group, **changes}
    node = helper.make_node(op, ["x", *w], ["y"], domain="liger", **attributes)
    initializers = [numpy_helper.from_array(array, name) for name, array in w.items()]
    typed = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in "xy"]
    more = [] if constant else [helper.make_tensor_value_info(x.name, x.data_type, x.dims) for x in initializers]
    graph = helper.make_graph([node], "g", [typed[0], *more], typed[1:], initializers if constant else [])
    opsets = [helper.make_opsetid(d, v) for d, v in (("", 21), ("liger", 1), ("com.microsoft", 1))]
    found = [] if ops else [onnx_ops.product_function(op)]
    model = helper.make_model(graph, opset_imports=opsets, functions=found, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    if ops:
        options.register_custom_ops_library(str(ops))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def expected(op: str, w: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    y: np.ndarray = x.astype(float) @ dense(w, x.shape[-1]).T
    if op == onnx_ops.SWIGLU:
        gate, up = np.split(y, 2, -1)
        with np.errstate(over="ignore"):
            y = gate / (1 + np.exp(-gate)) * up
    return y


@pytest.mark.parametrize("limit", FORMS)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("op", [onnx_ops.PRODUCT, onnx_ops.SWIGLU])
def test_kernel_is_exact_where_8_bits_are(op: str, group: int, limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGER_SIMD", limit)
    for rows, columns in SHAPES:
        w = weights(rows, columns, group)
        session = runtime(op, w, columns, group, OPS)
        for count in (1, 3, 4, 9):
            x = tokens(count, columns, group, exact=True)
            assert relative(session.run(None, {"x": x})[0], expected(op, w, x)) < OP, (rows, columns, count)


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("op", [onnx_ops.PRODUCT, onnx_ops.SWIGLU])
def test_kernel_and_body_round_tokens_alike(op: str, group: int) -> None:
    """Both to 8 bits a group: within a percent of the exact product, and closer to each other."""
    for rows, columns in SHAPES[1:]:
        w = weights(rows, columns, group)
        x = tokens(5, columns, group, exact=False)
        ours, stock = (runtime(op, w, columns, group, ops).run(None, {"x": x})[0] for ops in (OPS, None))
        assert relative(ours, expected(op, w, x)) < 0.02
        assert relative(ours, stock) < 0.01


def test_zeros_and_poison() -> None:
    """A token of zeros gives zeros; NaN or infinity gives NaN, and does not touch the tokens beside it."""
    w = weights(48, 1000, 32)
    x = tokens(3, 1000, 32, exact=True)
    x[0, 1] = 0
    session = runtime(onnx_ops.PRODUCT, w, 1000, 32, OPS)
    before = session.run(None, {"x": x})[0]
    assert not before[0, 1].any()
    for poison in (np.nan, np.inf):
        x[0, 1, 70] = poison
        after = session.run(None, {"x": x})[0]
        np.testing.assert_array_equal(after[0, [0, 2]], before[0, [0, 2]])
        assert np.isnan(after[0, 1]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 16}, "block_size must be 32, 64 or 128"),
        ({"K": 64}, "the weights' shapes do not fit N, K and block_size"),
        ({"N": 0}, "N and K do not fit"),
        ({"constant": False}, "all inputs but the first must be initializers"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        runtime(onnx_ops.PRODUCT, weights(16, 96, 32), 96, 32, OPS, **changes)


def test_a_narrow_token_is_refused() -> None:
    session = runtime(onnx_ops.PRODUCT, weights(16, 96, 32), 96, 32, OPS)
    with pytest.raises(Exception, match="x must be K wide"):
        session.run(None, {"x": np.zeros((1, 1, 64), np.float32)})


def test_a_bundle_runs_our_kernel_or_its_body(tmp_path: Path) -> None:
    bundle = ld.export_bundle(liger(small_llama()), "onnx", tmp_path / "b", ld.ExportOptions(quant="int4")).path
    nodes = onnx.load(bundle / "model.onnx").graph.node
    kinds = [node.op_type for node in nodes if node.domain == "liger"]
    layers = kinds.count("Attention")
    assert kinds.count("SwiGLUNBits") == layers
    assert kinds.count("MatMulNBits") == 3 * layers
    ours, stock = (executed(bundle, ops, tmp_path) for ops in (OPS, None))
    assert ours & {"SwiGLUNBits", "QuickGelu"} == {"SwiGLUNBits"}
    assert stock & {"SwiGLUNBits", "QuickGelu"} == {"QuickGelu"}


@pytest.mark.parametrize(("factor", "domain"), [(1.0, "liger"), (1e-6, "com.microsoft")])
def test_scales_that_float16_does_not_hold_stay_float32(factor: float, domain: str) -> None:
    matrix = (np.random.default_rng(0).standard_normal((64, 96)) * factor).astype(np.float32)
    typed = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, (1, n)) for name, n in (("x", 64), ("y", 96))]
    tensor = numpy_helper.from_array(matrix, "w")
    logits = helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, (1, 7))
    product = helper.make_node("MatMul", ["x", "w"], ["y"])
    head = helper.make_node("Slice", ["y", "a", "b"], ["logits"])
    ends = [numpy_helper.from_array(np.array(value), name) for name, value in (("a", [0, 0]), ("b", [1, 7]))]
    graph = helper.make_graph([product, head], "g", typed[:1], [logits], [tensor, *ends])
    model = ir.serde.deserialize_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))
    quantize(model.graph, "int4", 32)
    assert [node.domain for node in model.graph if node.op_type == "MatMulNBits"] == [domain]
