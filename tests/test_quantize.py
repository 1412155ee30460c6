"""Weight-only quantization for ONNX Runtime: how far it is from float32, what it saves, what it refuses."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from transformers import PreTrainedModel

import liger_deploy as ld
from liger_deploy.export.calibrate import gptq
from liger_deploy.export.quantize import keep_grids
from liger_deploy.verify import QUANT_LIMITS, compare_quantized, verify
from tests.conftest import liger, relisted, small_llama
from tests.test_families import family

SHARE = {"int8": 0.5, "int4": 0.42}  # of the float32 bundle, whose tied head is stored once; it is stored twice here


@pytest.fixture(scope="module", params=["int8", "int4"])
def quant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def bundle(quant: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = ld.ExportOptions(quant=quant)  # type: ignore[arg-type]
    return ld.export_bundle(None, "onnx", tmp_path_factory.mktemp("quantized") / quant, options).path


def products(graph: onnx.GraphProto) -> list[tuple[int, int]]:
    """Bits and group size of each quantized product; those of the domain `liger` are 4 bits'."""
    nodes = [node for node in graph.node if "NBits" in node.op_type]
    attributes = [{a.name: a.i for a in node.attribute} for node in nodes]
    return [
        (a["bits"] if node.domain != "liger" else 4, a["block_size"]) for node, a in zip(nodes, attributes, strict=True)
    ]


def row_bytes(columns: int, group_size: int) -> int:
    """Of a row in 4 bits: whole groups of numbers, a float16 scale for each, and two zero points in a byte."""
    groups = -(-columns // group_size)
    return groups * group_size // 2 + 2 * groups + (groups + 1) // 2


def test_the_trained_model_stays_close(quant: str, bundle: Path) -> None:
    rows = {row.check: row for row in verify(bundle)}
    assert [row.check for row in rows.values() if not row.passed] == []
    divergence = rows["mean divergence (KL, nats a token)"].value
    assert 1e-5 < divergence < QUANT_LIMITS[quant][0] / 2  # it is quantized, and well within its limit


def test_it_saves_what_it_should(quant: str, bundle: Path, tiny_bundle: Path) -> None:
    sizes = [sum(p.stat().st_size for p in path.glob("model.onnx*")) for path in (bundle, tiny_bundle)]
    assert sizes[0] < SHARE[quant] * sizes[1]
    graph = onnx.load(bundle / "model.onnx").graph
    found = products(graph)
    assert len(found) == 17  # q, k and v are one, gate and up are one
    assert sorted({bits for bits, _ in found}) == ([8] if quant == "int8" else [4, 8])
    large = [w for w in graph.initializer if w.data_type == onnx.TensorProto.FLOAT and np.prod(w.dims) > 30_000]
    assert [w.name for w in large if not w.name.endswith((".scales", ".rope_cos", ".rope_sin"))] == []
    assert sum(w.name.endswith(".rope_cos") for w in graph.initializer) == 1  # one table for all layers


def test_a_wrong_scale_is_seen(quant: str, bundle: Path, tiny: PreTrainedModel) -> None:
    """The table fails when one matrix of 29 has the wrong sign."""
    model = onnx.load(bundle / "model.onnx")
    scales = next(w for w in model.graph.initializer if w.name.endswith(".scales"))
    scales.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(scales), scales.name))
    session, oracle = ld.load_session(bundle), ld.EagerSession(tiny)
    import onnxruntime as ort

    session._ort = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    text = np.random.default_rng(0).integers(0, 2048, 60).tolist()
    assert any(not row.passed for row in compare_quantized(session, oracle, text, quant))


@pytest.mark.slow
@pytest.mark.parametrize("config", [{"structure": "gsa", "slots": 8}, {"structure": "lolcats", "features": 8}], ids=str)
def test_other_structures(config: dict[str, object], tmp_path: Path) -> None:
    model = liger(small_llama(hidden_size=128, intermediate_size=256, head_dim=16), window=8, **config)
    ld.export_bundle(model, "onnx", tmp_path / "b", ld.ExportOptions(quant="int8"))
    rows = compare_quantized(ld.load_session(tmp_path / "b"), ld.EagerSession(model), list(range(90)), "int8")
    assert rows[0].value < 0.01


@pytest.mark.parametrize("group_size", [32, 64])
def test_gptq(group_size: int) -> None:
    """On grids of 16 values, and nearer to W x than rounding each group by itself; columns never seen are rounded."""
    torch.manual_seed(0)
    weight_ND, x_TD = torch.randn(50, 200), torch.randn(900, 200) @ torch.randn(200, 200)
    x_TD[:, 7] = 0
    rounded_ND = gptq(weight_ND, torch.eye(200), group_size)  # inputs that have nothing to do with each other
    chosen_ND = gptq(weight_ND, x_TD.T @ x_TD, group_size)
    errors = [float((x_TD @ (some_ND - weight_ND).T).square().mean()) for some_ND in (rounded_ND, chosen_ND)]
    assert errors[1] < 0.6 * errors[0]
    for some_ND in (rounded_ND, chosen_ND):
        groups = [group for row in some_ND.split(group_size, 1) for group in row]
        assert max(len(group.unique()) for group in groups) <= 16
        assert float((some_ND - weight_ND).abs().max()) < 1.5
    with pytest.raises(ld.UserError, match="not finite"):
        gptq(weight_ND, torch.full((200, 200), torch.nan), group_size)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 130), st.sampled_from([32, 64, 128]))
def test_grids_are_kept(seed: int, rows: int, columns: int, group: int) -> None:
    """A matrix on grids comes back from its 4 bits as it was; of another, nothing changes."""
    rng = np.random.default_rng(seed)
    groups = -(-columns // group)
    numbers_NGC, zero_NG = rng.integers(0, 16, (rows, groups, group)), rng.integers(0, 16, (rows, groups))
    step_NG = rng.uniform(0.01, 1, (rows, groups)).astype(np.float16).astype(np.float32)
    exact_NK = ((numbers_NGC - zero_NG[..., None]) * step_NG[..., None]).reshape(rows, -1)[:, :columns]

    def empty() -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # type: ignore[type-arg]
        packed, scales = np.zeros((rows, groups, group // 2), np.uint8), np.full((rows, groups), 7, np.float32)
        return packed, scales, np.full((rows, (groups + 1) // 2), 0x99, np.uint8)

    packed, scales, zeros = empty()
    keep_grids(exact_NK.T.astype(np.float32), packed, scales, zeros)
    numbers = np.stack([packed & 15, packed >> 4], 3).reshape(rows, groups, group).astype(np.float32)
    points = np.stack([zeros & 15, zeros >> 4], 2).reshape(rows, -1)[:, :groups, None]
    found_NK = ((numbers - points) * scales[..., None]).reshape(rows, -1)[:, :columns]
    np.testing.assert_allclose(found_NK, exact_NK, rtol=2e-6, atol=1e-6)

    if columns >= 24:
        kept = empty()
        keep_grids(rng.normal(size=(columns // group * group or columns, rows)).astype(np.float32), *kept)
        untouched = columns // group or 1  # groups that were filled
        assert (kept[1][:, :untouched] == 7).all()
        assert (kept[0][:, :untouched] == 0).all()


@pytest.mark.slow
def test_calibrated(tmp_path: Path) -> None:
    """4 bits chosen over a text are nearer to the model than rounded ones, on another text; states still move."""
    text = tmp_path / "text.txt"
    text.write_text(Path(ast.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    rows = {}
    for name, source in (("rounded", ""), ("chosen", str(text))):
        options = ld.ExportOptions(quant="int4", group_size=64, calibrate=source)
        rows[name] = verify(ld.export_bundle(None, "onnx", tmp_path / name, options).path)
    assert [row.check for row in rows["chosen"] if not row.passed] == []
    assert rows["chosen"][0].value < 0.85 * rows["rounded"][0].value
    sizes = [sum(p.stat().st_size for p in (tmp_path / name).glob("model.onnx*")) for name in rows]
    assert abs(sizes[0] - sizes[1]) < 500


def test_what_cannot_be_calibrated(tmp_path: Path, tiny: PreTrainedModel) -> None:
    for model, target, options, message in (
        (None, "onnx", ld.ExportOptions(calibrate="text.txt"), "goes with --quant int4"),
        (
            None,
            "executorch",
            ld.ExportOptions(quant="int4", calibrate="text.txt"),
            "chooses the 4 bits of target 'onnx'",
        ),
        (None, "onnx", ld.ExportOptions(quant="int4", calibrate=str(tmp_path / "no")), "is missing"),
        (tiny, "onnx", ld.ExportOptions(quant="int4", calibrate="text.txt"), "needs a tokenizer"),
    ):
        with pytest.raises(ld.UserError, match=message):
            ld.export_bundle(model, target, tmp_path / "b", options)
        assert not (tmp_path / "b").exists()


def test_experts_are_refused(tmp_path: Path) -> None:
    model = ld.linearize(family("qwen3_moe"))
    with pytest.raises(ld.UserError, match="--quant does not reach weight"):
        ld.export_bundle(model, "onnx", tmp_path / "b", ld.ExportOptions(quant="int4"))
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bits_for_a_gpu(dtype: str, tmp_path: Path) -> None:
    """The graph keeps no float32 matrix. Its float16 form is run on the CPU here, with the table of `verify`."""
    bundle = ld.export_bundle(None, "onnx", tmp_path / "b", ld.ExportOptions(dtype=dtype, device="cuda"))  # type: ignore[arg-type]
    assert bundle.manifest.graph.requires == {"device": "cuda"}
    assert {t.dtype for t in bundle.manifest.graph.state} == {"float32", "int64"}
    weights = onnx.load(bundle.path / "model.onnx").graph.initializer
    kinds = {w.data_type for w in weights if len(w.dims) == 2 and "rope" not in w.name}
    assert kinds == {getattr(onnx.TensorProto, dtype.upper())}
    with pytest.raises(ld.UserError, match="exported for a GPU, and this onnxruntime is for CPUs: pip install"):
        ld.load_session(bundle)
    if dtype == "float16":
        relisted(bundle.path, lambda m: dataclasses.replace(m, graph=dataclasses.replace(m.graph, requires={})))
        assert [row for row in verify(bundle.path, tokens=64) if not row.passed] == []


def test_16_bits_are_refused_on_a_cpu(tmp_path: Path) -> None:
    for options in (ld.ExportOptions(dtype="float16"), ld.ExportOptions(dtype="float16", device="cuda", quant="int4")):
        with pytest.raises(
            ld.UserError, match="--dtype float16 of target 'onnx' is for --device cuda, without --quant"
        ):
            ld.export_bundle(None, "onnx", tmp_path / "b", options)
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_groups_of_any_allowed_size(tmp_path: Path) -> None:
    """Larger groups make a smaller file, within the limit still; other sizes are refused."""
    sizes = {}
    for group_size in (32, 64):
        options = ld.ExportOptions(quant="int4", group_size=group_size)
        bundle = ld.export_bundle(None, "onnx", tmp_path / str(group_size), options)
        assert bundle.manifest.model.group_size == group_size
        sizes[group_size] = sum(info.size for name, info in bundle.manifest.files.items() if "model.onnx" in name)
        graph = onnx.load(bundle.path / "model.onnx", load_external_data=False).graph
        assert set(products(graph)) == {(4, group_size), (8, 128)}
    products_of_4 = [node for node in graph.node if node.domain == "liger" and "NBits" in node.op_type]
    shapes = [{a.name: a.i for a in node.attribute} for node in products_of_4]
    packed = [sum(a["N"] * row_bytes(a["K"], size) for a in shapes) for size in sizes]
    assert abs((sizes[32] - sizes[64]) - (packed[0] - packed[1])) < 200  # of a file of 2.2 MB
    assert [row.check for row in verify(tmp_path / "64", tokens=64) if not row.passed] == []
    for target, group_size, message in (
        ("onnx", 48, "target 'onnx' has --group-size 32 or 64 or 128"),
        ("inductor", 64, "target 'inductor' has --group-size 32"),
        ("executorch", 128, "needs rows in groups of 128, .* has 192 columns"),
    ):
        with pytest.raises(ld.UserError, match=message):
            ld.export_bundle(None, target, tmp_path / "b", ld.ExportOptions(quant="int4", group_size=group_size))
