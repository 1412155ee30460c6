"""Weight-only quantization of an ONNX graph: every matrix, the tied or untied head and the embedding included.

"int8": all in 8 bits. "int4": the layers' matrices in 4 bits; head and embedding stay at 8, as they hurt most.

ONNX Runtime's own quantizer writes `com.microsoft.MatMulNBits`, whose blocks of 32 weights share a scale. It has no
8-bit embedding; that is a Gather of int8 rows times a Gather of their scales here. Norms, biases, recurrences and the
state stay float32.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from liger_deploy.errors import UserError

BLOCK = 32
LARGE = 0.01  # share of all weights from which a matrix must not stay float32
READERS = ("MatMul", "Gemm", "Gather", "GatherND", "Transpose", "Reshape", "Einsum")
ACCURACY = 4  # activations in int8 inside the product


def quantize(path: Path, quant: str) -> None:
    """Quantize the graph at `path`, in place. `quant`: "int4" or "int8"."""
    model = onnx.load(path)
    external = any(weight.external_data for weight in onnx.load(path, load_external_data=False).graph.initializer)
    _fold_transposes(model.graph)
    _embed_int8(model.graph)
    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    if quant == "int4":
        head = {node.name for node in _heads(products, model.graph)}
        model = _matrices(model, 4, exclude=head)
    model = _matrices(model, 8, exclude=set())
    data = path.with_name(f"{path.name}.data")
    data.unlink(missing_ok=True)
    onnx.save(model, path, save_as_external_data=external, location=data.name)
    check_quantized(path)


def check_quantized(path: Path) -> None:
    """No large float matrix is left: a forgotten one would cost what quantization saves, silently.

    Raises:
        UserError: weights that the quantizer does not reach (the experts of a mixture, three-dimensional).
    """
    graph = onnx.load(path, load_external_data=False).graph
    sizes = {weight.name: math.prod(weight.dims) for weight in graph.initializer}
    large = sum(sizes.values()) * LARGE
    read = {name for node in graph.node if node.op_type in READERS for name in node.input}
    for weight in graph.initializer:
        matrix = len(weight.dims) > 1 and weight.dims[-1] > 1 and weight.data_type == onnx.TensorProto.FLOAT
        if matrix and weight.name in read and sizes[weight.name] > large:
            shape = list(weight.dims)
            raise UserError(f"--quant does not reach weight {weight.name} {shape}: export with --quant none")


def _matrices(model: onnx.ModelProto, bits: int, exclude: set[str]) -> onnx.ModelProto:
    """Every product with a weight, in `bits`; 4 bits with a zero point a block, which measured better than without."""
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    config = DefaultWeightOnlyQuantConfig(
        block_size=BLOCK,
        is_symmetric=bits == 8,
        accuracy_level=ACCURACY,
        op_types_to_quantize=("MatMul",),
        bits=bits,
    )
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        quantizer = MatMulNBitsQuantizer(model, algo_config=config, nodes_to_exclude=sorted(exclude))
        quantizer.process()
    finally:
        logging.disable(level)
    quantized: onnx.ModelProto = quantizer.model.model
    return quantized


def _heads(products: list[onnx.NodeProto], graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The product that makes the logits: its weight has a column a token of the vocabulary."""
    (logits,) = (x for x in graph.output if x.name == "logits")
    vocab = logits.type.tensor_type.shape.dim[-1].dim_value
    wide = {weight.name for weight in graph.initializer if len(weight.dims) == 2 and weight.dims[1] == vocab}
    return [node for node in products if wide.intersection(node.input)]


def _fold_transposes(graph: onnx.GraphProto) -> None:
    """Store what a Transpose makes of a weight: a tied head's, which the quantizer would not see as a weight."""
    weights = {weight.name: weight for weight in graph.initializer}
    for node in [n for n in graph.node if n.op_type == "Transpose" and n.input[0] in weights]:
        permutation = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
        turned = numpy_helper.to_array(weights[node.input[0]]).transpose(permutation).copy()
        graph.initializer.append(numpy_helper.from_array(turned, node.output[0]))
        graph.node.remove(node)


def _embed_int8(graph: onnx.GraphProto) -> None:
    """Gather(W, i) -> Cast(Gather(W8, i)) * Gather(s, i), a scale a row."""
    weights = {weight.name: weight for weight in graph.initializer if len(weight.dims) == 2}
    for place, node in reversed(list(enumerate(graph.node))):
        if node.op_type != "Gather" or node.input[0] not in weights:
            continue
        name, ids, out = node.input[0], node.input[1], node.output[0]
        rows = numpy_helper.to_array(weights[name])
        scale = np.maximum(np.abs(rows).max(1, keepdims=True) / 127, 1e-30).astype(np.float32)
        graph.initializer.append(numpy_helper.from_array(np.round(rows / scale).astype(np.int8), f"{name}.int8"))
        graph.initializer.append(numpy_helper.from_array(scale, f"{name}.scale"))
        new = [
            helper.make_node("Gather", [f"{name}.int8", ids], [f"{out}.int8"]),
            helper.make_node("Cast", [f"{out}.int8"], [f"{out}.float"], to=onnx.TensorProto.FLOAT),
            helper.make_node("Gather", [f"{name}.scale", ids], [f"{out}.scale"]),
            helper.make_node("Mul", [f"{out}.float", f"{out}.scale"], [out]),
        ]
        graph.node.remove(node)
        for made in reversed(new):
            graph.node.insert(place, made)
    used = {name for node in graph.node for name in node.input}
    for weight in [w for w in graph.initializer if w.name not in used]:
        graph.initializer.remove(weight)
