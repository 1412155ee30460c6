"""Matrices of an ONNX graph in fewer bits: every one, the tied or untied head and the embedding included.

"int8": all in 8 bits. "int4": the layers' matrices in 4 bits; head and embedding stay at 8, as they hurt most.

Products become `com.microsoft.MatMulNBits`, whose groups of 32 or more weights share a scale, by ONNX Runtime's own
quantizer: 128 at 8 bits. In 4 bits that is the body of a node of the domain `liger` (`onnx_ops.py`), whose scales
are float16 and which takes in SwiGLU, so that this project's kernel can run in its place.
It has no 8-bit embedding; that is a Gather of int8 rows times a Gather of their scales here.

"float16", "bfloat16", for a GPU: matrices in that dtype, and their products' inputs and outputs.

Norms, biases, recurrences and the state stay float32. `graph` is `onnx_ir`'s; one matrix at a time is in memory twice.
"""

from __future__ import annotations

import logging

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from liger_deploy.errors import UserError
from liger_deploy.export.onnx_ops import ACCURACY, CONTRIB, DOMAIN, PRODUCT, SWIGLU
from liger_deploy.export.onnx_rewrites import add_weight, remove_unused, replace, weight

GROUP = 128  # of 8 bits
LARGE = 0.01  # share of all weights from which a matrix must not stay float32
READERS = ("MatMul", "Gemm", "Gather", "GatherND", "Transpose", "Reshape", "Einsum")
SMALLEST = float(np.finfo(np.float16).smallest_normal)


def quantize(graph: ir.Graph, quant: str, group_size: int, calibrated: bool = False) -> None:
    """Quantize a graph in place. `quant`: "int4", in groups of `group_size`, or "int8".

    `calibrated`: the matrices' groups lie on grids of 16 values already (`calibrate.py`).
    """
    (logits,) = (value for value in graph.outputs if value.name == "logits")
    vocab = logits.shape[-1] if logits.shape else None
    for node in list(graph):
        if node.op_type == "Gather":
            _embed_int8(graph, node)
        elif node.op_type == "MatMul":
            head = node.outputs[0].shape is not None and node.outputs[0].shape[-1] == vocab
            bits, size = (8, GROUP) if head or quant == "int8" else (4, group_size)
            _product(graph, node, bits, size, calibrated)
    for node in [n for n in graph if n.domain == DOMAIN and n.op_type == PRODUCT]:
        _take_in_swiglu(graph, node)
    remove_unused(graph)
    check_quantized(graph)


def narrow(graph: ir.Graph, dtype: str) -> None:
    """Put matrices in 16 bits: MatMul(x, W) -> Cast(MatMul(Cast(x), W16)), Gather(W, i) -> Cast(Gather(W16, i))."""
    kind = ir.DataType[dtype.upper()]
    made: dict[ir.Value, ir.Value] = {}
    for node in [n for n in graph if n.op_type in ("MatMul", "Gather")]:
        place = int(node.op_type == "MatMul")
        matrix, array = node.inputs[place], weight(node.inputs[place])
        if matrix is None or array is None or array.ndim != 2 or array.dtype != np.float32:
            continue
        if matrix not in made:
            made[matrix] = add_weight(graph, f"{matrix.name}.{dtype}", array.astype(kind.numpy()))
        inputs, before = [made[matrix], node.inputs[1]], []
        if place:
            before = [ir.node("Cast", [node.inputs[0]], {"to": kind.value})]
            inputs = [before[0].outputs[0], made[matrix]]
        product = ir.node(node.op_type, inputs, node.attributes)
        graph.insert_before(node, [*before, product])
        replace(graph, node.outputs[0], ir.node("Cast", [product.outputs[0]], {"to": ir.DataType.FLOAT.value}))
        graph.remove(node, safe=True)
    remove_unused(graph)
    check_quantized(graph)


def check_quantized(graph: ir.Graph) -> None:
    """No large float matrix is left: a forgotten one would cost what quantization saves, silently.

    Raises:
        UserError: weights that the quantizer does not reach (the experts of a mixture, three-dimensional).
    """
    tensors = {value: value.const_value for value in graph.initializers.values() if value.const_value is not None}
    large = sum(tensor.size for tensor in tensors.values()) * LARGE
    for value, tensor in tensors.items():
        shape = [int(size) for size in tensor.shape.numpy()]
        matrix = len(shape) > 1 and shape[-1] > 1 and tensor.dtype == ir.DataType.FLOAT
        if matrix and tensor.size > large and any(node.op_type in READERS for node, _ in value.uses()):
            raise UserError(f"--quant does not reach weight {value.name} {shape}: export with --quant none")


def _product(graph: ir.Graph, node: ir.Node, bits: int, group_size: int, calibrated: bool) -> None:
    """MatMul(x, W) -> MatMulNBits; 4 bits with a zero point a group, which measured better than without."""
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer

    array, (x, matrix) = weight(node.inputs[1]), node.inputs
    if array is None or array.ndim != 2 or matrix is None:
        return
    symmetric = bits == 8
    config = DefaultWeightOnlyQuantConfig(group_size, symmetric, ACCURACY, op_types_to_quantize=("MatMul",), bits=bits)
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        packed, scales, zeros = DefaultWeightOnlyQuantizer(config).qbits_block_quant(np.ascontiguousarray(array))
    finally:
        logging.disable(level)
    if bits == 4 and calibrated:
        keep_grids(array, packed, scales, zeros)
    attributes = {"K": array.shape[0], "N": array.shape[1], "block_size": group_size}
    if bits == 4 and _fits_float16(scales):
        scales, domain, name = scales.astype(np.float16), DOMAIN, PRODUCT
    else:
        attributes |= {"bits": bits, "accuracy_level": ACCURACY}
        domain, name = CONTRIB, "MatMulNBits"
    parts = {"int": packed, "scales": scales} | ({} if symmetric else {"zero_points": zeros})
    weights = [add_weight(graph, f"{matrix.name}.{bits}bit.{part}", values) for part, values in parts.items()]
    replace(graph, node.outputs[0], ir.node(name, [x, *weights], attributes, domain=domain))
    graph.remove(node, safe=True)
    if not matrix.uses():
        del graph.initializers[str(matrix.name)]


def keep_grids(
    array_KN: NDArray[np.float32],
    packed: NDArray[np.uint8],
    scales: NDArray[np.float32],
    zeros: NDArray[np.uint8],
) -> None:
    """Groups whose values lie on a grid of 16 get that one. ONNX Runtime goes by their extremes, which need not be its.

    packed [N, G, group / 2], scales [N, G] and zeros [N, (G + 1) / 2] are ONNX Runtime's, and change in place.
    """
    rows, groups, half = packed.shape
    w_NGC = np.zeros((rows, groups * half * 2), np.float32)
    w_NGC[:, : len(array_KN)] = array_KN.T
    w_NGC = w_NGC.reshape(rows, groups, half * 2)
    top_NG, found_NG = np.abs(w_NGC).max(2), np.zeros((rows, groups), bool)
    numbers_NGC, zero_NG = np.zeros(w_NGC.shape, np.uint8), np.zeros((rows, groups), np.uint8)
    for steps in range(1, 16):  # from 0 to the largest value
        step_NG = np.where(top_NG > 0, top_NG / steps, 1)
        whole_NGC = np.rint(w_NGC / step_NG[..., None])
        least_NG = np.minimum(whole_NGC.min(2), 0)
        on_it = np.abs(whole_NGC * step_NG[..., None] - w_NGC).max(2) < 1e-3 * step_NG
        new_NG = on_it & (np.maximum(whole_NGC.max(2), 0) - least_NG <= 15) & ~found_NG
        numbers_NGC[new_NG] = (whole_NGC - least_NG[..., None])[new_NG]
        zero_NG[new_NG], scales[new_NG] = -least_NG[new_NG], step_NG[new_NG]
        found_NG |= new_NG
    packed[found_NG] = (numbers_NGC[..., ::2] | numbers_NGC[..., 1::2] << 4)[found_NG]
    both = np.stack([zeros & 15, zeros >> 4], 2).reshape(rows, -1)
    both[:, :groups][found_NG] = zero_NG[found_NG]
    zeros[:] = both[:, ::2] | both[:, 1::2] << 4


def _fits_float16(scales: np.ndarray) -> bool:  # type: ignore[type-arg]
    """Whether float16 keeps them to 11 bits."""
    sizes = np.abs(scales)
    return bool(((sizes == 0) | (sizes >= SMALLEST)).all() and sizes.max(initial=0) <= np.finfo(np.float16).max)


def _take_in_swiglu(graph: ir.Graph, product: ir.Node) -> None:
    """Split(W x) -> gate, up; gate * Sigmoid(gate) * up, as one node."""
    users = [node for node, _ in product.outputs[0].uses()]
    if len(users) != 1 or users[0].op_type != "Split" or len(users[0].outputs) != 2:
        return
    gate, up = users[0].outputs
    sigmoids = [node for node, _ in gate.uses() if node.op_type == "Sigmoid"]
    if len(sigmoids) != 1 or gate.shape is None or up.shape is None or gate.shape[-1] != up.shape[-1]:
        return
    for silu in [node for node, _ in sigmoids[0].outputs[0].uses() if node.op_type == "Mul" and gate in node.inputs]:
        for last in [node for node, _ in silu.outputs[0].uses() if node.op_type == "Mul" and up in node.inputs]:
            fused = ir.node(SWIGLU, product.inputs, product.attributes, domain=DOMAIN)
            replace(graph, last.outputs[0], fused)


def _embed_int8(graph: ir.Graph, node: ir.Node) -> None:
    """Gather(W, i) -> Cast(Gather(W8, i)) * Gather(s, i), a scale a row."""
    table, ids = node.inputs
    rows = weight(table)
    if rows is None or rows.ndim != 2 or table is None or rows.dtype != np.float32:
        return
    scale = np.maximum(np.abs(rows).max(1, keepdims=True) / 127, 1e-30).astype(np.float32)
    small = add_weight(graph, f"{table.name}.int8", np.round(rows / scale).astype(np.int8))
    scales = add_weight(graph, f"{table.name}.scale", scale)
    gathered, factor = ir.node("Gather", [small, ids]), ir.node("Gather", [scales, ids])
    cast = ir.node("Cast", [gathered.outputs[0]], {"to": ir.DataType.FLOAT.value})
    graph.insert_before(node, [gathered, factor, cast])
    replace(graph, node.outputs[0], ir.node("Mul", [cast.outputs[0], factor.outputs[0]]))
