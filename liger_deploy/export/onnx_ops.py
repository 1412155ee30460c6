"""How the operators of `model/ops.py` are written in ONNX.

`liger::linear_attention` becomes `com.microsoft.LinearAttention`, ONNX Runtime's native operator (the standard operator
of opset 27 expands to a Scan there). `liger::attention` becomes a node of the domain `liger`, with a model-local
function as its body: ONNX Runtime runs this project's kernel where its library is registered, and inlines the body
where it is not, so one file runs everywhere. Products with matrices in 4 bits are such nodes too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx import helper
from torch import Tensor, nn
from torch.export import Dim

from liger_deploy.config import LigerConfig
from liger_deploy.model.mixer import Heads, LayerState, Mixer
from liger_deploy.model.ops import attention, linear_attention
from liger_deploy.model.recurrence import Recurrence

DOMAIN, VERSION = "liger", 1
OPSET = 21
CONTRIB = "com.microsoft"
PRODUCT, SWIGLU = "MatMulNBits", "SwiGLUNBits"  # of the domain `liger`: W x; silu(gate) * up of W x's two halves
ACCURACY = 4  # of com.microsoft.MatMulNBits: tokens in int8 inside the product


def _linear_attention(
    q_BTGRK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, g_BTGC: Tensor, state_BGKV: Tensor
) -> tuple[Tensor, Tensor]:
    """ONNX Runtime's operator packs heads into the last dimension."""
    rows, tokens, groups, queries, _ = q_BTGRK.shape
    packed = [x.flatten(2) for x in (q_BTGRK, k_BTGK, v_BTGV)]
    out_shape = (rows, tokens, groups * queries * v_BTGV.shape[-1])
    out, state = torch.onnx.ops.symbolic_multi_out(
        f"{CONTRIB}::LinearAttention",
        (*packed, state_BGKV, g_BTGC.flatten(2)),
        attrs={"q_num_heads": groups * queries, "kv_num_heads": groups, "update_rule": "gated", "scale": 1.0},
        dtypes=(torch.float32, torch.float32),
        shapes=(out_shape, state_BGKV.shape),
        version=1,
    )
    return out.unflatten(2, (groups, queries, -1)), state


def _attention(
    q_BTGRK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    gate_key_BTGK: Tensor,
    length_B: Tensor,
    valid_B: Tensor,
    recurrent: list[Tensor],
    window_k_BGWK: Tensor,
    window_v_BGWV: Tensor,
    cos_SK: Tensor,
    sin_SK: Tensor,
    config: str,
    scaling: float,
) -> list[Tensor]:
    """One `liger` node; its heads are packed into the last dimension, as the projections give them."""
    groups, queries, dim = q_BTGRK.shape[2:]
    kind = AttentionKind(config, scaling, groups, queries, dim, (cos_SK.shape[0], cos_SK.shape[1]))
    packed = [x.flatten(2) for x in (q_BTGRK, k_BTGK, v_BTGV, gate_key_BTGK)]
    state = [*recurrent, window_k_BGWK, window_v_BGWV]
    out_shape = (*q_BTGRK.shape[:2], groups * queries * dim)
    out, *new = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{kind.op_type}",
        (*packed, length_B, valid_B, *state, cos_SK, sin_SK),
        attrs=kind.attributes,
        dtypes=(torch.float32, *(x.dtype for x in state)),
        shapes=(out_shape, *(x.shape for x in state)),
        version=VERSION,
    )
    return [out.unflatten(2, (groups, queries, -1)), *new]


DECOMPOSITIONS = {linear_attention._opoverload: _linear_attention, attention._opoverload: _attention}


@dataclass(frozen=True)
class AttentionKind:
    """What is constant in a `liger` attention node: one kind, one function body."""

    config: str
    scaling: float
    groups: int
    queries: int
    head_dim: int
    rope: tuple[int, int]

    @property
    def liger(self) -> LigerConfig:
        """The layer's configuration."""
        return LigerConfig.from_dict(json.loads(self.config))

    @property
    def op_type(self) -> str:
        """`Attention`, or `WindowAttention` where a layer has no recurrence."""
        return "WindowAttention" if self.liger.row.width == "none" else "Attention"

    @property
    def attributes(self) -> dict[str, Any]:
        """Of the node: everything that a kernel needs to know."""
        liger = self.liger
        values: dict[str, Any] = {
            "q_num_heads": self.groups * self.queries,
            "kv_num_heads": self.groups,
            "scale": self.scaling,
            "window_weight": liger.window_weight,
        }
        if liger.row.width == "none":
            return values
        return values | {
            "structure": liger.structure,
            "feature_map": liger.feature_map,
            "recurrent_weight": liger.recurrent_weight,
            "gate_normalizer": liger.gate_normalizer,
            "lower_bound": liger.lower_bound,
        }

    @property
    def state(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the layer's state, without the batch."""
        dim, window = self.head_dim, (self.groups, self.liger.window, self.head_dim)
        recurrent = [] if self.liger.row.width == "none" else [(self.groups, dim, dim)]
        return (*recurrent, window, window)


def kinds(program: torch.export.ExportedProgram) -> list[AttentionKind]:
    """The kinds of `liger::attention` nodes in a traced program, each once."""
    found: dict[AttentionKind, None] = {}
    for node in program.graph.nodes:
        if node.target == attention._opoverload:
            q, cos = node.args[0].meta["val"], node.args[9].meta["val"]
            config, scaling = node.args[11:]
            groups, queries, dim = map(int, q.shape[2:])
            found[AttentionKind(config, scaling, groups, queries, dim, (cos.shape[0], cos.shape[1]))] = None
    return list(found)


def add_functions(model: ir.Model, bodies: list[onnx.FunctionProto]) -> None:
    """Give the model's `liger` nodes their bodies.

    Raises:
        AssertionError: two kinds under one name; no supported family mixes them.
    """
    for body in bodies:
        function = ir.serde.deserialize_function(body)
        assert function.identifier() not in model.functions, f"two kinds of {body.name}"
        model.functions[function.identifier()] = function
        model.opset_imports[DOMAIN] = VERSION
    model.opset_imports[CONTRIB] = 1


class Body(nn.Module):
    """What a `liger` node computes, around a recurrence: Microsoft's operator, or another with its signature."""

    def __init__(self, kind: AttentionKind, recurrence: Recurrence = _linear_attention) -> None:
        super().__init__()
        self.kind = kind
        self.mixer = Mixer(kind.liger, kind.scaling)
        self.mixer.recurrence = recurrence

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Inputs and outputs are those of the node."""
        packed, (length_B, valid_B), state = inputs[:4], inputs[4:6], inputs[6:-2]
        q, k, v, gate_key = (x.unflatten(2, (-1, self.kind.head_dim)) for x in packed)
        heads = Heads(q.unflatten(2, (-1, self.kind.queries)), k, v, gate_key)
        layer = LayerState(state[:-2], *state[-2:])
        out, layer = self.mixer.after_state(heads, (inputs[-2], inputs[-1]), layer, length_B, valid_B)
        return out.flatten(2), *layer.tensors()


def function(kind: AttentionKind, chunk: int) -> onnx.FunctionProto:
    """The plain-operator body of a kind of node, for up to `chunk` tokens."""
    body = Body(kind).eval()
    rows, tokens, groups = 3, min(chunk, 7), kind.groups
    width = groups * kind.head_dim
    packed = [torch.zeros(rows, tokens, n) for n in (width * kind.queries, width, width, width)]
    # No tensor twice: torch.export would take two inputs for one.
    counts = [torch.full((rows,), tokens) for _ in range(2)]
    state = [torch.zeros(rows, *shape) for shape in kind.state]
    tables = [torch.zeros(kind.rope) for _ in range(2)]
    batch, time = Dim("batch", min=1, max=1 << 16), Dim("tokens", min=1, max=chunk) if chunk > 1 else Dim.STATIC
    dims = [{0: batch, 1: time}] * 4 + [{0: batch}] * (2 + len(state)) + [{}] * 2
    with torch.no_grad():
        program = torch.export.export(
            body,
            (*packed, *counts, *state, *tables),
            dynamic_shapes=(tuple(dims),),
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    exported = torch.onnx.export(program, opset_version=OPSET, dynamo=True)
    assert exported is not None
    return _as_function(exported.model_proto, kind)


def product_functions(graph: ir.Graph) -> list[onnx.FunctionProto]:
    """Bodies of the products with matrices in 4 bits that a graph has: x, numbers, scales (float16), zeros -> y."""
    used = {node.op_type for node in graph if node.domain == DOMAIN}
    return [product_function(name) for name in (PRODUCT, SWIGLU) if name in used]


def product_function(name: str) -> onnx.FunctionProto:
    """The body of `PRODUCT` or `SWIGLU`."""
    inputs, attributes, op = ["x", "numbers", "scales", "zeros"], ["K", "N", "block_size"], helper.make_node
    product = op("MatMulNBits", ["x", "numbers", "scales32", "zeros"], ["y"], domain=CONTRIB, bits=4)
    product.attribute.append(helper.make_attribute("accuracy_level", ACCURACY))
    for attribute in attributes:  # the node's own
        product.attribute.append(
            onnx.AttributeProto(name=attribute, ref_attr_name=attribute, type=onnx.AttributeProto.INT)
        )
    nodes = [op("Cast", ["scales"], ["scales32"], to=onnx.TensorProto.FLOAT), product]
    if name == SWIGLU:
        nodes += [
            op("Split", ["y"], ["gate", "up"], axis=-1, num_outputs=2),
            op("Sigmoid", ["gate"], ["sigmoid"]),
            op("Mul", ["gate", "sigmoid"], ["silu"]),
            op("Mul", ["silu", "up"], ["out"]),
        ]
    opsets = [helper.make_opsetid(domain, version) for domain, version in (("", OPSET), (CONTRIB, 1))]
    return helper.make_function(DOMAIN, name, inputs, [nodes[-1].output[0]], nodes, opsets, attributes)


def _as_function(model: onnx.ModelProto, kind: AttentionKind) -> onnx.FunctionProto:
    """A graph as a function: weights become Constant nodes."""
    graph = model.graph
    constants = [helper.make_node("Constant", [], [weight.name], value=weight) for weight in graph.initializer]
    return helper.make_function(
        DOMAIN,
        kind.op_type,
        [x.name for x in graph.input],
        [x.name for x in graph.output],
        [*constants, *graph.node],
        [entry for entry in model.opset_import if entry.domain in ("", CONTRIB)],
        list(kind.attributes),
    )
