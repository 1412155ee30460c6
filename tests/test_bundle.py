"""A bundle is whole, of this version, and stays inside its directory; anything else is refused in one line."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liger_deploy.bundle import Bundle, Manifest
from liger_deploy.errors import BundleError, UserError
from liger_deploy.files import staged_directory
from liger_deploy.runtimes import load_session


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def values(tiny_bundle: Path) -> dict[str, Any]:
    return dict(json.loads((tiny_bundle / "manifest.json").read_text()))


def test_manifest_round_trips(values: dict[str, Any]) -> None:
    assert Manifest.from_dict(values).to_dict() == values


def edit(bundle: Path, **changes: object) -> None:
    path = bundle / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_wrong_checksum(bundle: Path) -> None:
    with (bundle / "tokenizer.json").open("r+b") as stream:
        stream.seek(100)
        stream.write(b"\x00")
    with pytest.raises(BundleError, match=r"tokenizer\.json does not match its checksum"):
        load_session(bundle)


def test_truncated_and_missing_files(bundle: Path) -> None:
    data = (bundle / "model.onnx").read_bytes()
    (bundle / "model.onnx").write_bytes(data[:-1])
    with pytest.raises(BundleError, match=f"has {len(data) - 1} bytes, the manifest says {len(data)}"):
        load_session(bundle)
    (bundle / "model.onnx").unlink()
    with pytest.raises(BundleError, match="is missing"):
        load_session(bundle)


def test_newer_format(bundle: Path) -> None:
    edit(bundle, format_version=99)
    with pytest.raises(BundleError, match="bundle format 99, this library reads up to 1: update liger-deploy"):
        load_session(bundle)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "..\\b", "C:b"])
def test_paths_outside_are_refused(bundle: Path, name: str, values: dict[str, Any]) -> None:
    edit(bundle, files={**values["files"], name: {"size": 1, "sha256": ""}})
    with pytest.raises(BundleError, match="outside the bundle"):
        load_session(bundle)
    edit(bundle, files=values["files"], tokenizer=name)
    with pytest.raises(BundleError, match="outside the bundle"):
        load_session(bundle)


def test_graph_that_is_not_the_manifests(bundle: Path, values: dict[str, Any]) -> None:
    graph = copy.deepcopy(values["graph"])
    graph["state"][0]["input"] = "something_else"
    edit(bundle, graph=graph)
    with pytest.raises(BundleError, match="not those of its manifest"):
        load_session(bundle)


def test_foreign_graph_file(bundle: Path, values: dict[str, Any]) -> None:
    import hashlib

    (bundle / "model.onnx").write_bytes(b"not a model")
    info = {"size": 11, "sha256": hashlib.sha256(b"not a model").hexdigest()}
    edit(bundle, files={**values["files"], "model.onnx": info})
    with pytest.raises(BundleError, match="does not load in onnxruntime"):
        load_session(bundle)


def test_unknown_target(bundle: Path) -> None:
    edit(bundle, target="abacus")
    with pytest.raises(BundleError, match="no runtime for target 'abacus'"):
        load_session(bundle)


def mutate(data: st.DataObject, value: Any) -> Any:
    """Replace one value, at any depth, by something else, or remove it."""
    junk = st.sampled_from([None, -1, 0, 1 << 40, 1.5, "", "../x", "\u0000", [], {}, True, [[]], float("nan")])
    if isinstance(value, dict) and value and data.draw(st.booleans()):
        key = data.draw(st.sampled_from(sorted(value)))
        if data.draw(st.integers(0, 5)) == 0:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: mutate(data, value[key])}
    if isinstance(value, list) and value and data.draw(st.booleans()):
        index = data.draw(st.integers(0, len(value) - 1))
        return [*value[:index], mutate(data, value[index]), *value[index + 1 :]]
    return data.draw(junk)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_damaged_manifests_are_refused_or_valid(values: dict[str, Any], data: st.DataObject) -> None:
    damaged = mutate(data, copy.deepcopy(values))
    if not isinstance(damaged, dict):
        return
    try:
        manifest = Manifest.from_dict(damaged)
    except BundleError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert all(".." not in name for name in manifest.files)
        assert manifest.spec.tensors


def test_open_refuses_what_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not a directory"):
        Bundle.open(tmp_path / "absent")
    with pytest.raises(BundleError, match=r"no manifest\.json"):
        Bundle.open(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(BundleError, match="not readable JSON"):
        Bundle.open(tmp_path)


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def write() -> None:
        with staged_directory(tmp_path / "out") as stage:
            (stage / "half").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no space left"), staged_directory(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []
