"""Exact rewrites of a traced graph, for the inductor target on CUDA. They look at operators and know no model family.

Merged: linear layers that read one input become one (q, k, v; gate, up). Packed: their matrices are in 8 or 4 bits,
which is not exact. Stepped: in a graph of one token, each linear layer takes in what stands around it (the RMSNorm
before, SwiGLU, the residual sum after) as `liger::linear_step`. What is made for one graph is kept in `made`, by name,
for the next, so that graphs share their weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from liger_deploy.model.packed import pack, packed_rows, unpack

aten = torch.ops.aten
LINEAR, EMBEDDING, ADD = aten.linear.default, aten.embedding.default, aten.add.Tensor
MUL, TO = aten.mul.Tensor, aten.to.dtype


class Norm(NamedTuple):
    """weight * (x / sqrt(mean(x^2) + eps)) as Hugging Face writes it; the nodes of x and weight."""

    x: Node
    weight: Node
    eps: float


def merge_linears(module: GraphModule, made: dict[str, Tensor]) -> None:
    """One product for all linear layers of one input; results are slices of its result."""
    drop_assertions(module)
    groups: dict[tuple[Node, bool], list[Node]] = {}
    for node in module.graph.find_nodes(op="call_function", target=LINEAR):
        groups.setdefault((node.args[0], len(node.args) > 2), []).append(node)  # type: ignore[arg-type]
    for (_, biased), nodes in groups.items():
        if len(nodes) > 1:
            _merge(module, nodes, biased, made)
    _finish(module)


def _merge(module: GraphModule, nodes: list[Node], biased: bool, made: dict[str, Tensor]) -> None:
    sizes = [parameter(module, node.args[1]).shape[0] for node in nodes]
    with module.graph.inserting_before(nodes[0]):
        merged = [_joined(module, [node.args[i] for node in nodes], made) for i in ((1, 2) if biased else (1,))]  # type: ignore[misc]
        whole = module.graph.call_function(LINEAR, (nodes[0].args[0], *merged))
        for node, start, size in zip(nodes, _starts(sizes), sizes, strict=True):
            part = module.graph.call_function(aten.slice.Tensor, (whole, -1, start, start + size))
            part.meta["merged"] = (whole, start)
            node.replace_all_uses_with(part)


def _joined(module: GraphModule, nodes: list[Node], made: dict[str, Tensor]) -> Node:
    """A parameter that holds others one after the other, under a name made of theirs."""
    names = [str(node.target) for node in nodes]
    name = "_and_".join(n.replace(".", "_") for n in names)
    if name not in made:
        made[name] = torch.cat([parameter(module, node).detach() for node in nodes])
    module.register_parameter(name, nn.Parameter(made[name], requires_grad=False))
    return module.graph.get_attr(name)


def pack_linears(module: GraphModule, bits: int, vocab: int, made: dict[str, Tensor]) -> None:
    """Linear layers and embeddings over packed matrices; the head and the embedding, of `vocab` rows, in 8 bits."""
    for node in list(module.graph.nodes):
        if node.target not in (LINEAR, EMBEDDING):
            continue
        matrix = node.args[node.target == LINEAR]
        value = parameter(module, matrix)
        packed_nodes = _packed(module, matrix, 8 if node.target == EMBEDDING or len(value) == vocab else bits, made)
        with module.graph.inserting_before(node):
            kind = (value.shape[1], value.dtype)
            if node.target == LINEAR:
                node.replace_input_with(matrix, module.graph.call_function(unpack, (*packed_nodes, *kind)))
            else:
                rows = module.graph.call_function(packed_rows, (*packed_nodes, node.args[1], *kind))
                node.replace_all_uses_with(rows)
    _finish(module)


def _packed(module: GraphModule, matrix: Node, bits: int, made: dict[str, Tensor]) -> tuple[Node, Node]:
    """Buffers that hold a matrix in so many bits, under names made of its own."""
    names = [f"{str(matrix.target).replace('.', '_')}_{part}" for part in ("packed", "scale")]
    if names[0] not in made:
        made |= dict(zip(names, pack(parameter(module, matrix), bits), strict=True))
    for name in names:
        module.register_buffer(name, made[name])
    with module.graph.inserting_after(matrix):
        scale, numbers = (module.graph.get_attr(name) for name in reversed(names))
    return numbers, scale


def step_linears(module: GraphModule) -> None:
    """`liger::linear_step` for each linear layer of a graph of one row and one token, after the others."""
    import liger_deploy.model.kernels.linear_step  # noqa: F401  (registers the operator)

    for node in list(module.graph.find_nodes(op="call_function", target=LINEAR)):
        x, weight, *bias = node.args
        matrix = weight.args[:2] if weight.target is unpack else (weight, None)
        norm = match_norm(x)
        last, swiglu = _swiglu(node)
        residual: Node | None = bias[0] if bias else None  # type: ignore[assignment]
        if swiglu and bias:
            continue
        addition, other = (None, None) if residual else _residual(last)
        with module.graph.inserting_before(addition or last if swiglu or addition else node):
            arguments = (norm.x if norm else x, *matrix, norm and norm.weight, norm.eps if norm else 0.0)
            fused = module.graph.call_function(
                torch.ops.liger.linear_step.default, (*arguments, swiglu, other if addition else residual)
            )
        (addition or last).replace_all_uses_with(fused)
    _finish(module)


def match_norm(node: object) -> Norm | None:
    """The RMSNorm that ends in this node, if one does."""
    scaled = _call(_through(node), MUL)
    if scaled is None:
        return None
    weight, normed = scaled.args
    product = _call(_through(normed, TO), MUL)
    root = product and _call(product.args[1], aten.rsqrt.default)
    total = root and _call(root.args[0], ADD)
    mean = total and _call(total.args[0], aten.mean.dim)
    square = mean and _call(mean.args[0], aten.pow.Tensor_Scalar)
    if not (product and total and mean and square) or not isinstance(weight, Node) or weight.op != "get_attr":
        return None
    if square.args != (product.args[0], 2) or list(mean.args[1]) != [-1]:  # type: ignore[arg-type]
        return None
    return Norm(_through(square.args[0], TO), weight, float(total.args[1]))  # type: ignore[arg-type]


def _swiglu(linear: Node) -> tuple[Node, bool]:
    """The product silu(first half) * second half of a merged layer, and True; or the layer itself, and False."""
    parts = [user for user in linear.users if user.meta.get("merged")]
    if len(parts) == 2 and len(linear.users) == 2:
        first, second = sorted(parts, key=lambda part: part.meta["merged"][1])
        silu = _only_user(first, aten.silu.default)
        product = silu and _only_user(silu, MUL)
        if product and set(product.args) == {silu, second} and len(second.users) == 1:
            return product, True
    return linear, False


def _residual(node: Node) -> tuple[Node | None, Node | None]:
    """The sum that takes this node alone and another of the same shape, and that other."""
    addition = _only_user(node, ADD)
    if addition is None or addition.kwargs:
        return None, None
    other = addition.args[0] if addition.args[1] is node else addition.args[1]
    if not isinstance(other, Node) or other.op == "get_attr":
        return None, None
    return addition, other


def drop_assertions(module: GraphModule) -> None:
    """Checks of what the trace already fixes."""
    for node in module.graph.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default):
        module.graph.erase_node(node)


def parameter(module: GraphModule, node: object) -> Tensor:
    """The tensor that a get_attr node reads."""
    assert isinstance(node, Node)
    assert node.op == "get_attr", node
    value: object = module
    for name in str(node.target).split("."):
        value = getattr(value, name)
    assert isinstance(value, Tensor)
    return value


def _finish(module: GraphModule) -> None:
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    used = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for name, _ in list(module.named_parameters(remove_duplicate=False)):
        if name not in used:
            owner, _, leaf = name.rpartition(".")
            delattr(module.get_submodule(owner), leaf)
    module.recompile()


def _through(node: object, *targets: object) -> Node:
    """Past views of the whole, and casts if asked."""
    while isinstance(node, Node) and node.target in (aten.alias.default, *targets):
        node = node.args[0]
    return node  # type: ignore[return-value]


def _call(node: object, target: object) -> Node | None:
    return node if isinstance(node, Node) and node.target == target else None


def _only_user(node: Node, target: object) -> Node | None:
    users = list(node.users)
    return _call(users[0], target) if len(users) == 1 else None


def _starts(sizes: list[int]) -> Iterator[int]:
    start = 0
    for size in sizes:
        yield start
        start += size
