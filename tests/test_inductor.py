"""The inductor target: its rewrites are exact, its packages equal PyTorch, and what does not fit a machine says so."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch.fx import GraphModule
from transformers import PreTrainedModel

import liger_deploy as ld
from liger_deploy.bundle import Bundle, Manifest
from liger_deploy.export import EMBEDDED, inductor
from liger_deploy.export.linears import as_products, in_8_bits
from liger_deploy.export.rewrites import merge_linears, pack_linears, step_linears
from liger_deploy.runtimes import inductor as runtime
from liger_deploy.text import Text
from liger_deploy.verify import compare, verify
from tests.conftest import liger, relative, relisted, small_llama
from tests.test_families import FAMILIES, family
from tests.tolerances import MODEL


@pytest.fixture
def bundle(tiny_inductor: Path) -> Path:
    return tiny_inductor


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("chunk", [0, 12])
def test_rewrites_are_exact(name: str, chunk: int) -> None:
    """Merged and stepped graphs against the traced one, logits and state, on random states."""
    model = liger(family(name), window=6)
    graph = inductor._trace(model, 1, chunk, set())

    def run(module: GraphModule) -> list[torch.Tensor]:
        torch.manual_seed(1)
        inputs = [
            torch.randn_like(x) if x.is_floating_point() else torch.randint(5, 12, x.shape) for x in graph.arguments
        ]
        return [module(*inputs), *inputs]

    expected = run(graph.module)
    merge_linears(graph.module, {})
    if not chunk:
        step_linears(graph.module)
        targets = [str(node.target) for node in graph.module.graph.nodes]
        assert "aten.linear.default" not in targets
    for ours, theirs in zip(run(graph.module), expected, strict=True):
        assert relative(ours, theirs) < MODEL


@pytest.mark.parametrize("name", FAMILIES)
def test_products_of_one_row_are_those_of_matrices(name: str) -> None:
    """A traced step with every linear layer as sums of products."""
    linears, products = products_are_those_of_matrices(liger(family(name), window=6), 1, 0)
    assert linears == (2 if "moe" in name else 0)  # routers
    assert products == 0


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("batch", "chunk"), [(1, 12), (0, 12), (0, 0)])
def test_products_of_many_rows_are_those_of_matrices(name: str, batch: int, chunk: int) -> None:
    """oneDNN's, in prefill graphs and in steps of any number of rows."""
    model = liger(family(name), window=6)
    _, products = products_are_those_of_matrices(model, batch, chunk)
    found = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    assert products == found - (batch == 1)  # there the head reads the last position alone


def products_are_those_of_matrices(model: PreTrainedModel, batch: int, chunk: int) -> tuple[int, int]:
    """On random states; how many of torch's linear layers and of oneDNN's products the graph has."""
    expected = inductor._trace(model, batch, chunk, set())
    with as_products(model):
        ours = inductor._trace(model, batch, chunk, set())
    assert all("forward" not in module.__dict__ for module in model.modules())
    torch.manual_seed(1)
    random = [torch.randn_like(x) if x.is_floating_point() else torch.full_like(x, 7) for x in expected.arguments]
    assert relative(ours.module(*(x.clone() for x in random)), expected.module(*random)) < MODEL
    targets = [node.target for node in ours.module.graph.nodes]
    return targets.count(torch.ops.aten.linear.default), targets.count(torch.ops.mkldnn._linear_pointwise.default)


@pytest.mark.parametrize("name", [name for name in FAMILIES if "moe" not in name])
def test_8_bits_stay_close_in_every_family(name: str) -> None:
    model = liger(family(name), window=6)
    ids = torch.arange(5, 45)[None]
    assert relative(in_8_bits(model)(ids).logits, model(ids).logits) < 0.1


@pytest.mark.parametrize("tied", [False, True])
def test_8_bits_share_what_was_tied(tied: bool) -> None:
    model = liger(small_llama(tie_word_embeddings=tied))
    ours = in_8_bits(model)
    assert (ours.lm_head.table is ours.model.embed_tokens) == tied
    table = ours.model.layers[0].mlp.down_proj.table
    error = (table.rounded * table.scale - model.model.layers[0].mlp.down_proj.weight).abs()
    assert (error <= 0.5001 * table.scale).all()  # half a step of the row
    assert sum(p.numel() for p in ours.parameters()) < 0.02 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant": "int8"}, r"--quant does not reach weight 'model.layers.0.mlp\.experts"),
        ({"quant": "int4"}, "--quant int4 on a GPU only"),
        ({"quant": "int4", "device": "cuda"}, "--quant int4 is for one row on a GPU: add --batch 1"),
    ],
)
def test_what_quantization_does_not_reach(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ld.UserError, match=message):
        ld.export_bundle(liger(family("qwen3_moe")), "inductor", tmp_path / "b", ld.ExportOptions(**options))


@pytest.mark.parametrize(("name", "bits"), [("llama", 8), ("llama", 4), ("qwen2", 4), ("gemma3_text", 8)])
def test_packed_graphs(name: str, bits: int) -> None:
    """Linear layers and embeddings of a CUDA package in few bits: close to the model, and a step like its layers."""
    model = liger(family(name), window=6)
    graph = inductor._trace(model, 1, 0, set())
    torch.manual_seed(1)
    inputs = [torch.randn_like(x) if x.is_floating_point() else torch.full_like(x, 7) for x in graph.arguments]

    def run() -> torch.Tensor:
        logits: torch.Tensor = graph.module(*(x.clone() for x in inputs))
        return logits

    exact = run()
    merge_linears(graph.module, {})
    pack_linears(graph.module, bits, model.config.vocab_size, {})
    assert all(p.dim() == 1 for p in graph.module.parameters())  # norms and biases
    packed = run()
    assert 1e-4 < relative(packed, exact) < (0.05 if bits == 8 else 0.6)
    step_linears(graph.module)
    assert relative(run(), packed) < MODEL


def test_the_trained_model_packed_as_for_a_gpu() -> None:
    """Mean divergence on text, nats a token, of 8 and 4 bits."""
    model = ld.load_model(EMBEDDED, torch.float32)
    ids = Tokenizer.from_file(str(EMBEDDED / "tokenizer.json")).encode(Path(__file__).read_text()).ids[:100]
    exact = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    for bits, limit in ((8, 0.003), (4, 0.1)):
        graph = inductor._trace(model, 1, 0, set())
        pack_linears(graph.module, bits, model.config.vocab_size, {})
        state, found = list(graph.arguments[1:]), []
        for token in ids:
            found.append(graph.module(torch.tensor([token]), *state)[0].log_softmax(-1))
        ours = torch.stack(found)
        assert float((exact.exp() * (exact - ours)).sum(-1).mean()) < limit


@pytest.mark.slow
@pytest.mark.xdist_group("inductor")
def test_the_trained_model_in_8_bits_passes_its_table(tmp_path: Path) -> None:
    ld.export_bundle(None, "inductor", tmp_path / "b", ld.ExportOptions(quant="int8", batch=1))
    assert [row for row in verify(tmp_path / "b", tokens=64) if not row.passed] == []
    bfloat16 = (EMBEDDED / "model.safetensors").stat().st_size
    assert (
        tmp_path / "b" / "model.safetensors"
    ).stat().st_size < 0.85 * bfloat16  # RoPE tables are float32 and included


LOGITS = """
import sys
import liger_deploy as ld
session = ld.load_session(sys.argv[1], threads=int(sys.argv[2]))
print(float(session.prefill([[5, 6, 7]]).sum()), float(session.step([8]).sum()))
"""


@pytest.mark.xdist_group("inductor")
def test_a_package_takes_more_threads_than_its_maker_had(tmp_path: Path) -> None:
    """Rows this wide are summed in parallel; a buffer for the exporting machine's threads would be overrun."""
    model = liger(small_llama(hidden_size=4096, num_hidden_layers=1))
    ld.export_bundle(model, "inductor", tmp_path / "b", ld.ExportOptions(batch=1, chunk=4))
    found = []
    for threads in (1, 4 * (os.cpu_count() or 1) + 3):
        command = [sys.executable, "-c", LOGITS, str(tmp_path / "b"), str(threads)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append([float(word) for word in done.stdout.split()])
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-4)


def test_a_llama_step_is_five_products_a_layer() -> None:
    """q, k, v; o with the sum after it; gate, up with the norm before; down with its sum: four, and the head."""
    graph = inductor._trace(liger(small_llama()), 1, 0, set())
    merge_linears(graph.module, {})
    step_linears(graph.module)
    steps = graph.module.graph.find_nodes(op="call_function", target=torch.ops.liger.linear_step.default)
    found = [(node.args[3] is not None, node.args[5], node.args[6] is not None) for node in steps]
    layer = [(True, False, False), (False, False, True), (True, True, False), (False, False, True)]
    assert found == [*layer, *layer, (True, False, False)]


@pytest.mark.parametrize(
    "config", [{}, {"structure": "mamba2"}, {"structure": "window"}, {"softmax_layers": (1,), "sinks": 2}]
)
def test_graphs_on_rings(config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA compiles, run by PyTorch with interpreted kernels in the session: tokens and states of the model."""
    model = liger(small_llama(), window=6, **config)
    graphs: dict[str, GraphModule] = {}

    def keep(traced: dict[str, inductor.Graph], path: Path) -> None:
        graphs.update({name: graph.module for name, graph in traced.items()})
        path.write_bytes(b"kept in memory")

    monkeypatch.setattr(inductor, "_package", keep)
    monkeypatch.setattr(inductor, "_check_loads", lambda path: None)
    monkeypatch.setattr(inductor, "_on_gpu", lambda device: True)
    monkeypatch.setattr(runtime, "_load", lambda bundle, name, weights: torch.no_grad()(graphs[name]))
    bundle = ld.export_bundle(model, "inductor", tmp_path / "b", ld.ExportOptions(chunk=20))
    rings = {t.name for t in bundle.manifest.graph.state if t.ring}
    layers = [0] if "softmax_layers" in config else [0, 1]
    assert rings == {f"layers.{i}.window_{x}" for i in layers for x in "kv"}
    session = ld.load_session(bundle)
    rows = compare(session, ld.EagerSession(model), np.random.default_rng(0).integers(0, 97, 50).tolist(), 8)
    assert [row for row in rows if not row.passed] == []


def test_the_trained_model_passes_its_table(bundle: Path) -> None:
    """`export` and `verify` on the embedded model."""
    assert [row for row in verify(bundle, tokens=64) if not row.passed] == []


def test_states_move_to_onnx_and_back(bundle: Path, tiny_bundle: Path) -> None:
    """Greedy tokens after a handover, both ways, two ragged rows at once."""
    sessions = [ld.load_session(bundle), ld.load_session(tiny_bundle)]
    ids = Text(Bundle.open(bundle)).encode("def add(a, b):\n    return a + b\n\n\ndef ")
    rows, valid = [ids, ids[::-1]], [len(ids), len(ids) - 3]
    for first, second in (sessions, sessions[::-1]):
        for session in (first, second):
            session.reset()
        token = first.prefill(rows, valid).argmax(-1)
        second.load_state(first.state())
        for _ in range(40):
            ours, theirs = first.step(token), second.step(token)
            assert relative(ours, theirs) < MODEL
            token = ours.argmax(-1)


def test_fifty_forks_share_the_weights(bundle: Path) -> None:
    """Each gives what a lone session gives, and none copies a weight."""
    session = ld.load_session(bundle)
    session.prefill([[5, 6, 7]])
    lone = [session.fork().step([token])[0] for token in range(50)]
    twins = [session.fork() for _ in range(50)]
    kept = [twin.step([token])[0] for token, twin in enumerate(twins)]
    assert all(np.array_equal(a, b) for a, b in zip(kept, lone, strict=True))
    assert all(twin._weights is session._weights for twin in twins)  # type: ignore[attr-defined]
    assert len({twin._tensors[0].data_ptr() for twin in twins}) == 50  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("requires", "message"),
    [
        ({"torch": "2.5"}, "was compiled for torch 2.5, here it is"),
        ({"platform": "linux-sparc"}, "was compiled for platform linux-sparc"),
        ({"cpu": "AVX1024"}, "for a processor with AVX1024, this one has"),
        ({"device": "cuda", "compute": "9.0"}, "exported for a GPU, and this torch sees none"),
    ],
)
def test_another_machine_is_one_line(bundle: Path, tmp_path: Path, requires: dict[str, str], message: str) -> None:
    def change(manifest: Manifest) -> Manifest:
        graph = dataclasses.replace(manifest.graph, requires=manifest.graph.requires | requires)
        return dataclasses.replace(manifest, graph=graph)

    with pytest.raises(ld.UserError, match=message):
        ld.load_session(relisted(shutil.copytree(bundle, tmp_path / "b"), change))


def test_unbound_weights_are_refused(bundle: Path, tmp_path: Path) -> None:
    """To run with one would be a segmentation fault."""
    copy = shutil.copytree(bundle, tmp_path / "b")
    with safe_open(copy / "model.safetensors", "pt") as file:
        aliases = file.metadata()
    weights = load_file(copy / "model.safetensors")
    name = next(name for name in weights if name.endswith("k_proj.weight"))
    del weights[name]
    save_file(weights, copy / "model.safetensors", metadata=aliases)
    relisted(copy)
    with pytest.raises(ld.UserError, match=f"lacks weight '{name}' of graph 'decode'"):
        ld.load_session(copy)
    (copy / "model.safetensors").write_bytes(b"junk")
    relisted(copy)
    with pytest.raises(ld.UserError, match="is no weight file"):
        ld.load_session(copy)
    shutil.copy(bundle / "model.safetensors", copy)
    (copy / "model.pt2").write_bytes(b"junk")
    relisted(copy)
    with pytest.raises(ld.UserError, match=r"model.pt2 does not load: "):
        ld.load_session(copy)


def test_no_compiler_is_one_line(tmp_path: Path) -> None:
    nothing = torch._inductor.config.patch("cpp.cxx", ("no-such-compiler",))
    with nothing, pytest.raises(ld.UserError, match="compiles C\\+\\+: install g\\+\\+"):
        ld.export_bundle(liger(small_llama()), "inductor", tmp_path / "b", ld.ExportOptions(batch=1))
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
@pytest.mark.xdist_group("inductor")
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("phi3", {"structure": "gsa", "window": 6, "slots": 8}),
        ("qwen2", {"structure": "lolcats", "window": 6, "features": 12, "softmax_layers": (1,), "sinks": 2}),
    ],
)
def test_other_structures_compile(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    model: PreTrainedModel = ld.linearize(family(name), ld.LigerConfig(**config))
    bundle = ld.export_bundle(model, "inductor", tmp_path / "b", ld.ExportOptions(chunk=16, batch=1))
    prompt = np.random.default_rng(0).integers(0, 97, 40).tolist()
    rows = compare(ld.load_session(bundle), ld.EagerSession(model), prompt, 20)
    assert [row for row in rows if not row.passed] == []
