"""Exact rewrites of an ONNX graph that leave fewer, larger nodes: at 4 bits a step is bound by their number.

They match what the exporter writes and leave alone what they do not know, so a model family they miss is slower and
not wrong. `graph` is `onnx_ir`'s.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from liger_deploy.export.onnx_ops import CONTRIB, DOMAIN


def rewrite(graph: ir.Graph) -> None:
    """All of them, in place."""
    _share_tables(graph)
    _store_transposed(graph)
    _drop_reshapes(graph)
    _fuse_norms(graph)
    _fuse_residuals(graph)
    _merge_products(graph)
    remove_unused(graph)


def replace(graph: ir.Graph, old: ir.Value, node: ir.Node, output: int = 0) -> None:
    """Put `node` where `old` was made, and its output in the place of `old`."""
    new, producer = node.outputs[output], old.producer()
    assert producer is not None
    new.shape, new.type = old.shape, old.type
    graph.insert_before(producer, node)
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def remove_unused(graph: ir.Graph) -> None:
    """Drop nodes and weights that nothing reads."""
    for node in reversed(list(graph)):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def weight(value: ir.Value | None) -> np.ndarray | None:  # type: ignore[type-arg]
    """The array of a weight or constant, None for anything else."""
    if value is None or value.const_value is None:
        return None
    array: np.ndarray = value.const_value.numpy()  # type: ignore[type-arg]
    return array


def add_weight(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:  # type: ignore[type-arg]
    """A new initializer."""
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _share_tables(graph: ir.Graph) -> None:
    """One copy of tables that every layer has (RoPE)."""
    first: dict[tuple[object, ...], ir.Value] = {}
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or ".rope_" not in str(value.name):
            continue
        kept = first.setdefault((tuple(tensor.shape), tensor.dtype, tensor.tobytes()), value)
        if kept is not value:
            value.replace_all_uses_with(kept)


def _store_transposed(graph: ir.Graph) -> None:
    """Transpose(weight) is a view of the weight: a tied head's, which would be turned at load or in every step."""
    for node in [n for n in graph if n.op_type == "Transpose"]:
        array = weight(node.inputs[0])
        if array is not None and array.ndim == 2:
            made = add_weight(graph, f"{node.inputs[0].name}.T", array.T)  # type: ignore[union-attr]
            node.outputs[0].replace_all_uses_with(made)


def _drop_reshapes(graph: ir.Graph) -> None:
    """Heads split and packed again on the way into and out of a `liger` node."""
    for node in [n for n in graph if n.domain == DOMAIN]:
        for index, value in enumerate(node.inputs[:4]):
            node.replace_input_with(index, _packed_source(value))
        for user in _reshapes_after(node.outputs[0]):
            if _last(user.outputs[0]) == _last(node.outputs[0]) and _rank(user.outputs[0]) == 3:
                user.outputs[0].replace_all_uses_with(node.outputs[0])


def _packed_source(value: ir.Value | None) -> ir.Value | None:
    found = source = value
    while source is not None and (producer := source.producer()) and producer.op_type == "Reshape":
        source = producer.inputs[0]
        if source is not None and _rank(source) == 3 and _last(source) == _last(value):
            found = source
    return found


def _reshapes_after(value: ir.Value) -> Iterator[ir.Node]:
    for user, _ in list(value.uses()):
        if user.op_type == "Reshape":
            yield user
            yield from _reshapes_after(user.outputs[0])


def _fuse_norms(graph: ir.Graph) -> None:
    """w * (x / sqrt(mean(x^2) + epsilon)) as one node."""
    for node in [n for n in graph if n.op_type == "Reciprocal"]:
        found = _norm_before(node)
        if found is None or len(node.outputs[0].uses()) != 1:
            continue
        x, epsilon = found
        ((normed, _),) = node.outputs[0].uses()
        users = list(normed.outputs[0].uses())
        if normed.op_type != "Mul" or x not in normed.inputs or len(users) != 1 or users[0][0].op_type != "Mul":
            continue
        scaled = users[0][0]
        scale = next((v for v in scaled.inputs if v is not normed.outputs[0]), None)
        if scale is not None and scale.const_value is not None and _rank(scale) == 1 and _last(scale) == _last(x):
            attributes = {"axis": -1, "epsilon": epsilon, "stash_type": 1}
            made = ir.node("SimplifiedLayerNormalization", [x, scale], attributes)
            replace(graph, scaled.outputs[0], made)
    remove_unused(graph)


def _norm_before(reciprocal: ir.Node) -> tuple[ir.Value, float] | None:
    """x and epsilon of 1 / Sqrt(Add(ReduceMean(Pow(x, 2), -1), epsilon)); None if it is something else."""
    chain, node = [], reciprocal
    for kind in ("Sqrt", "Add", "ReduceMean", "Pow"):
        producer = node.inputs[0].producer() if node.inputs[0] is not None else None
        if producer is None or producer.op_type != kind:
            return None
        chain.append(producer)
        node = producer
    epsilon, axes, power = (weight(n.inputs[1]) for n in chain[1:])
    x = node.inputs[0]
    if x is None or epsilon is None or axes is None or power is None or epsilon.size != 1 or axes.size != 1:
        return None
    if float(power) != 2 or int(axes.item()) not in (-1, (_rank(x) or 0) - 1):
        return None
    return x, float(epsilon.item())


def _fuse_residuals(graph: ir.Graph) -> None:
    """A residual sum and the norm that reads it."""
    for norm in [n for n in graph if n.op_type == "SimplifiedLayerNormalization"]:
        x, scale = norm.inputs
        add = x.producer() if x is not None else None
        if add is None or add.op_type != "Add" or _rank(x) != 3 or any(v is None or v.const_value for v in add.inputs):
            continue
        if any(v.shape != x.shape for v in add.inputs):  # type: ignore[union-attr]
            continue
        made = ir.node(
            "SkipSimplifiedLayerNormalization",
            [*add.inputs, scale],
            {"epsilon": norm.attributes["epsilon"].as_float()},
            domain=CONTRIB,
            num_outputs=4,
        )
        made.outputs[1].name = made.outputs[2].name = ""
        replace(graph, x, made, 3)  # type: ignore[arg-type]
        norm.outputs[0].replace_all_uses_with(made.outputs[0], replace_graph_outputs=True)
        made.outputs[0].shape, made.outputs[0].type = norm.outputs[0].shape, norm.outputs[0].type
    remove_unused(graph)


def _merge_products(graph: ir.Graph) -> None:
    """Products of one input with several weights (q, k and v; gate and up) as one product and a split."""
    readers: dict[ir.Value, list[ir.Node]] = {}
    for node in [n for n in graph if n.op_type == "MatMul"]:
        x, matrix = node.inputs
        if x is not None and _rank(matrix) == 2 and weight(matrix) is not None:
            readers.setdefault(x, []).append(node)
    for x, nodes in readers.items():
        if len(nodes) < 2:
            continue
        tensors = [n.inputs[1].const_value for n in nodes]  # type: ignore[union-attr]
        merged = _side_by_side(graph, [tensor for tensor in tensors if tensor is not None])
        widths = [n.outputs[0].shape[-1] for n in nodes]  # type: ignore[index]
        sizes = add_weight(graph, f"{merged.name}.sizes", np.array(widths, np.int64))
        product = ir.node("MatMul", [x, merged], name=f"{nodes[0].name}.merged")
        split = ir.node("Split", [product.outputs[0], sizes], {"axis": -1}, num_outputs=len(nodes))
        graph.insert_before(nodes[0], [product, split])
        for node, out in zip(nodes, split.outputs, strict=True):
            out.shape, out.type = node.outputs[0].shape, node.outputs[0].type
            node.outputs[0].replace_all_uses_with(out, replace_graph_outputs=True)


def _side_by_side(graph: ir.Graph, tensors: list[ir.TensorProtocol]) -> ir.Value:
    """Matrices of equal height as one, made only when it is written or quantized: no second copy of a model."""
    sizes = [tensor.shape.numpy() for tensor in tensors]
    name, shape = f"{tensors[0].name}.merged", ir.Shape([sizes[0][0], sum(size[1] for size in sizes)])

    def merge() -> ir.TensorProtocol:
        return ir.tensor(np.concatenate([tensor.numpy() for tensor in tensors], 1), name=name)

    lazy = ir.LazyTensor(merge, dtype=tensors[0].dtype, shape=shape, name=name)
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(lazy.dtype), const_value=lazy)
    graph.register_initializer(value)
    return value


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def _last(value: ir.Value | None) -> int | None:
    size = value.shape[-1] if value is not None and value.shape else None
    return size if isinstance(size, int) else None
