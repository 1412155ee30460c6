"""The same model for stock onnxruntime-genai: `genai.onnx` and `genai_config.json`, beside `model.onnx`.

onnxruntime-genai keeps a recurrent model's state by name: `past_key_values.{i}.conv_state` (rank 3) and
`past_key_values.{i}.recurrent_state` (rank 4), zeros at the start, outputs `present.{i}...`. So this graph is
`model.onnx` behind an adapter that packs a layer's state into those two, and it reads the same weights file:

    conv_state       [B, 1, N]        window_k and window_v, flat, and the number of tokens seen
    recurrent_state  [B, G, K, V]     the recurrence; where a layer has other tensors, [B, 1, 1, N], flat

It takes every layer's state to have the first layer's shape, so smaller ones are padded. `attention_mask` [B, total]
says how many of a call's tokens are real; padding stands on the right.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from liger_deploy.bundle import GraphTensor
from liger_deploy.export.onnx_rewrites import add_weight
from liger_deploy.files import write_json

MODEL, CONFIG = "genai.onnx", "genai_config.json"
CONV, RECURRENT = "conv_state", "recurrent_state"
IN_CONV = (".window_k", ".window_v")


def write_genai(
    directory: Path, model: str, state: list[GraphTensor], config: Any, heads: tuple[int, int, int]
) -> None:
    """Adapt the graph `model` of `directory`. `config`: the Hugging Face one; `heads`: query, KV, head dim."""
    program = ir.load(directory / model)
    _Adapter(program.graph, state).adapt()
    ir.save(program, directory / MODEL)
    write_json(directory / CONFIG, _config(config, heads))


class _Adapter:
    """Rewrites a graph's inputs and outputs in place."""

    def __init__(self, graph: ir.Graph, state: list[GraphTensor]) -> None:
        self.graph = graph
        self.state = state[:-1]  # without `length`
        self.inputs = {str(value.name): value for value in graph.inputs}
        self.outputs = {str(value.name): value for value in graph.outputs}
        self.before: list[ir.Node] = []
        self.after: list[ir.Node] = []

    def adapt(self) -> None:
        tokens = self.inputs["tokens"]
        tokens.name, tokens.shape = "input_ids", ir.Shape(["batch_size", "sequence_length"])
        mask = _value("attention_mask", ["batch_size", "total_sequence_length"], ir.DataType.INT64)
        new_inputs, new_outputs = [tokens, mask], []
        self._swap(self.inputs["valid"], self._count_valid(tokens, mask))
        layers = sorted({int(tensor.name.split(".")[1]) for tensor in self.state})
        for kind in (CONV, RECURRENT):
            groups = [self._tensors(layer, kind) for layer in layers]
            packed = _packed_shape(kind, groups)
            for layer, tensors in zip(layers, groups, strict=True):
                new_in, new_out = self._pack(layer, kind, tensors, packed)
                new_inputs.append(new_in)
                new_outputs.append(new_out)
        logits = self._node(self.after, "Unsqueeze", [self.outputs["logits"], self._ints("one", [1])])
        self.outputs["logits"].name = "logits.rows"
        vocab = self.outputs["logits"].shape[-1] if self.outputs["logits"].shape else None
        _describe(logits, "logits", ["batch_size", 1, vocab], ir.DataType.FLOAT)
        self.graph.inputs[:] = new_inputs
        self.graph.outputs[:] = [logits, *new_outputs]
        self.graph.insert_before(self.graph[0], self.before)
        self.graph.extend(self.after)

    def _count_valid(self, tokens: ir.Value, mask: ir.Value) -> ir.Value:
        """How many of the call's T tokens are real: the sum over the mask's last T columns."""
        length = self._node(self.before, "Shape", [tokens], {"start": 1, "end": 2})
        start = self._node(self.before, "Neg", [length])
        end = self._ints("end", [np.iinfo(np.int64).max])
        last = self._node(self.before, "Slice", [mask, start, end, self._ints("one", [1])])
        return self._node(self.before, "ReduceSum", [last, self._ints("one", [1])], {"keepdims": 0})

    def _tensors(self, layer: int, kind: str) -> list[GraphTensor]:
        own = [t for t in self.state if t.name.startswith(f"layers.{layer}.")]
        return [t for t in own if t.name.endswith(IN_CONV) == (kind == CONV)]

    def _pack(self, layer: int, kind: str, tensors: list[GraphTensor], packed: list[int]) -> tuple[ir.Value, ir.Value]:
        """The packed input that feeds these tensors, and the packed output made of their successors."""
        past = _value(f"past_key_values.{layer}.{kind}", ["batch_size", *packed], ir.DataType.FLOAT)
        if len(tensors) == 1 and tensors[0].shape == packed:
            self._swap(self.inputs[tensors[0].input], past)
            present = self._node(self.after, "Identity", [self.outputs[tensors[0].output]])
        else:
            present = self._flat(past, tensors, packed, layer == 0 and kind == CONV)
        _describe(present, f"present.{layer}.{kind}", ["batch_size", *packed], ir.DataType.FLOAT)
        return past, present

    def _flat(self, past: ir.Value, tensors: list[GraphTensor], packed: list[int], counts: bool) -> ir.Value:
        """Tensors one after the other, then what is left: padding, and in layer 0 the tokens seen as its last value."""
        sizes = [math.prod(tensor.shape) for tensor in tensors]
        sizes += [math.prod(packed) - sum(sizes) - counts, *([1] if counts else [])]
        split = ir.node("Split", [past, self._ints(f"{past.name}.sizes", sizes)], {"axis": -1}, num_outputs=len(sizes))
        self.before.append(split)
        flat = []
        for tensor, part in zip(tensors, split.outputs, strict=False):
            shape = self._ints(f"{tensor.name}.shape", [0, *tensor.shape])
            self._swap(self.inputs[tensor.input], self._node(self.before, "Reshape", [part, shape]))
            shape = self._ints(f"flat{len(packed)}", [0, *packed[:-1], -1])
            flat.append(self._node(self.after, "Reshape", [self.outputs[tensor.output], shape]))
        flat.append(split.outputs[len(tensors)])
        if counts:
            seen = self._node(self.before, "Reshape", [split.outputs[-1], self._ints("row", [-1])])
            to_int, to_float = ({"to": kind.value} for kind in (ir.DataType.INT64, ir.DataType.FLOAT))
            self._swap(self.inputs["length"], self._node(self.before, "Cast", [seen], to_int))
            now = self._node(self.after, "Cast", [self.outputs["next.length"]], to_float)
            flat.append(self._node(self.after, "Reshape", [now, self._ints("column", [-1, 1, 1])]))
        return self._node(self.after, "Concat", flat, {"axis": -1})

    def _swap(self, old: ir.Value, new: ir.Value) -> None:
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        for name, value in self.outputs.items():
            if value is old:
                self.outputs[name] = new

    def _ints(self, name: str, values: list[int]) -> ir.Value:
        known = self.graph.initializers.get(f"genai.{name}")
        return known or add_weight(self.graph, f"genai.{name}", np.array(values, np.int64))

    @staticmethod
    def _node(into: list[ir.Node], kind: str, inputs: list[ir.Value], attributes: Any = None) -> ir.Value:
        into.append(ir.node(kind, inputs, attributes or {}))
        return into[-1].outputs[0]


def _packed_shape(kind: str, layers: list[list[GraphTensor]]) -> list[int]:
    """Shape, without the batch, that holds each layer's tensors."""
    first = [tensor.shape for tensor in layers[0]]
    if kind == RECURRENT and all([t.shape for t in own] == first for own in layers) and [len(s) for s in first] == [3]:
        return first[0]
    size = max(sum(math.prod(tensor.shape) for tensor in own) for own in layers)
    return [1, size + 1] if kind == CONV else [1, 1, max(size, 1)]


def _value(name: str, shape: list[Any], kind: ir.DataType) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind))


def _describe(value: ir.Value, name: str, shape: list[Any], kind: ir.DataType) -> None:
    value.name, value.shape, value.type = name, ir.Shape(shape), ir.TensorType(kind)


def _config(config: Any, heads: tuple[int, int, int]) -> dict[str, Any]:
    """onnxruntime-genai's own configuration. Its names for a cache must be given, though the graph has none."""
    query_heads, kv_heads, head_dim = heads
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = [token for token in ends if token is not None]
    pad = config.pad_token_id if config.pad_token_id is not None else (ends or [0])[0]
    inputs = {
        "input_ids": "input_ids",
        "attention_mask": "attention_mask",
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    }
    outputs = {
        "logits": "logits",
        "present_key_names": "present.%d.key",
        "present_value_names": "present.%d.value",
    }
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": MODEL,
        "head_size": head_dim,
        "hidden_size": config.hidden_size,
        "inputs": inputs,
        "outputs": outputs,
        "num_attention_heads": query_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": kv_heads,
    }
    length = 1 << 20  # no cache grows with it
    return {
        "model": {
            "type": "llama",
            "bos_token_id": config.bos_token_id if config.bos_token_id is not None else pad,
            "eos_token_id": ends or [pad],  # genai needs one
            "pad_token_id": pad,
            "vocab_size": config.vocab_size,
            "context_length": length,
            "decoder": decoder,
        },
        "search": {"do_sample": False, "max_length": 4096, "num_beams": 1, "past_present_share_buffer": False},
    }
