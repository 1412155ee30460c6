"""One `liger::Attention` node on ONNX Runtime, in three forms, for a step and for a prompt's chunk.

    python -m benchmarks.attention_op        (after `make native`)

fused: this project's kernel.  contrib: the node's body around com.microsoft.LinearAttention, which stock ONNX Runtime
runs.  plain: standard operators alone, the recurrence in its chunked form.  A layer of the 291M shape (4 KV heads of 64
with 4 queries each, window 64), Liger-GLA, one thread. Calls of the three take turns; results are compared first.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import helper

import liger_deploy as ld
from benchmarks.report import write
from liger_deploy.export import onnx_ops
from liger_deploy.model.recurrence import gated_chunked
from liger_deploy.runtimes.onnx import OPS

GROUPS, QUERIES, DIM = 4, 4, 64
NAMES = ("q", "k", "v", "gate_key", "length", "valid", "recurrent", "window_k", "window_v", "cos", "sin")
CHUNK, ROUNDS = 256, 300


def kind() -> onnx_ops.AttentionKind:
    """The layer's constants."""
    liger = ld.LigerConfig()
    rope = (liger.window + CHUNK, DIM)
    return onnx_ops.AttentionKind(json.dumps(liger.to_dict()), DIM**-0.5, GROUPS, QUERIES, DIM, rope)


def arrays(of: onnx_ops.AttentionKind, tokens: int) -> dict[str, Any]:
    """Random inputs of a call after 1,000 tokens."""
    rng = np.random.default_rng(0)
    wide = [rng.standard_normal((1, tokens, n)) for n in (GROUPS * QUERIES * DIM, *[GROUPS * DIM] * 3)]
    state = [rng.standard_normal((1, *shape)) for shape in of.state]
    angles = np.arange(of.rope[0])[:, None] * np.tile(1e4 ** -(np.arange(DIM // 2) / (DIM // 2)), 2)
    floats = iter([*wide, *state, np.cos(angles), np.sin(angles)])
    counts = {"length": np.array([1000]), "valid": np.array([tokens])}
    return {name: counts[name] if name in counts else next(floats).astype(np.float32) for name in NAMES}


def node(of: onnx_ops.AttentionKind, chunk: int | None) -> bytes:
    """A graph of the node; with its body, for up to `chunk` tokens, or alone."""
    state = NAMES[9 - len(of.state) : 9]
    names = [*NAMES[:6], *state, *NAMES[9:]]
    outputs = ["out", *(f"new_{name}" for name in state)]
    one = helper.make_node(of.op_type, names, outputs, domain=onnx_ops.DOMAIN, **of.attributes)
    infos = [[_info(name) for name in part] for part in (names, outputs)]
    opsets = [helper.make_opsetid(d, v) for d, v in (("", onnx_ops.OPSET), (onnx_ops.DOMAIN, 1), (onnx_ops.CONTRIB, 1))]
    functions = [] if chunk is None else [onnx_ops.function(of, chunk)]
    graph = helper.make_graph([one], "one", *infos)
    whole = helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)
    model: bytes = whole.SerializeToString()
    return model


def _info(name: str) -> onnx.ValueInfoProto:
    element = onnx.TensorProto.INT64 if name in ("length", "valid") else onnx.TensorProto.FLOAT
    return helper.make_tensor_value_info(name, element, None)


def plain(of: onnx_ops.AttentionKind, inputs: dict[str, Any]) -> bytes:
    """The same as standard operators, for this number of tokens."""
    body = onnx_ops.Body(of, gated_chunked).eval()
    with torch.no_grad():
        program = torch.export.export(body, tuple(torch.from_numpy(x) for x in inputs.values()), strict=False)
    exported = torch.onnx.export(program, input_names=NAMES, opset_version=onnx_ops.OPSET, dynamo=True)
    assert exported is not None
    model: bytes = exported.model_proto.SerializeToString()
    return model


def session(model: bytes, fused: bool) -> ort.InferenceSession:
    """With this project's kernels or without."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if fused:
        options.register_custom_ops_library(str(OPS))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def main() -> None:
    """Command line."""
    rows, of = [], kind()
    model = node(of, CHUNK)
    for tokens in (1, CHUNK):
        inputs = arrays(of, tokens)
        forms = {
            "fused": session(model, True),
            "contrib": session(model, False),
            "plain": session(plain(of, inputs), False),
        }
        outs = {name: form.run(None, inputs) for name, form in forms.items()}
        seconds: dict[str, list[float]] = {name: [] for name in forms}
        for _ in range(ROUNDS):
            for name, form in forms.items():
                form.run(None, inputs)
                start = time.perf_counter()
                form.run(None, inputs)
                seconds[name].append(time.perf_counter() - start)
        for name, times in seconds.items():
            off = max(float(abs(a - b).max() / abs(b).max()) for a, b in zip(outs[name], outs["plain"], strict=True))
            rows.append({"tokens": tokens, "form": name, "us": 1e6 * statistics.median(times), "difference": off})
            print(rows[-1], flush=True)
    write("attention_op", "python -m benchmarks.attention_op", rows)


if __name__ == "__main__":
    main()
