"""Bundle and Manifest: what an export writes and every runtime loads.

A bundle is a directory: `manifest.json`, the target's graph and weight files, and the model's tokenizer files. The
manifest names every file with its size and SHA-256, the state's tensors with the names they have in the graph, and
what a program needs to generate text. Readers in other languages need nothing else.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from liger_deploy.config import LigerConfig
from liger_deploy.errors import BundleError, ConfigError
from liger_deploy.files import read_json, sha256, write_json
from liger_deploy.state import StateSpec, TensorSpec

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_LIMIT = 1 << 31  # no size in a manifest is larger; readers may allocate what it says
_DTYPES = ("float32", "float16", "bfloat16", "int64")
T = TypeVar("T")


@dataclass(frozen=True)
class ModelInfo:
    """What the graphs compute.

    Attributes:
        architecture: Hugging Face `model_type` of the base model.
        fingerprint: ties a state to its model, equal for every target and dtype of one checkpoint.
        vocab_size: logits per row.
        dtype: of the weights that are not quantized, and of the windows inside the graph.
        quant: "none" or the weight quantization.
        group_size: at 4 bits, weights of a row that share a scale.
    """

    architecture: str
    fingerprint: str
    vocab_size: int
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    dtype: str = "float32"
    quant: str = "none"
    group_size: int = 0


@dataclass(frozen=True)
class GraphTensor:
    """One tensor of the state: canonical name and shape (no batch), and its dtype and names in the graph.

    A `ring` is a window whose graph keeps token t in slot t mod W; the canonical one is oldest first.
    """

    name: str
    shape: list[int]
    dtype: str
    input: str
    output: str
    ring: bool = False


@dataclass(frozen=True)
class GraphInfo:
    """How to call the graph.

    Attributes:
        files: role -> file in the bundle; the target says which roles it has.
        chunk: most tokens that one prefill call takes.
        batch: rows that the graph takes, or 0 for any number.
        state: the state's tensors in call order.
        requires: what the machine must have to load the files, by name; empty where any will do.
    """

    files: dict[str, str]
    chunk: int
    batch: int
    state: list[GraphTensor]
    requires: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class GenerationDefaults:
    """What `generate` uses unless told otherwise."""

    bos_token_id: int = -1
    eos_token_ids: list[int] = field(default_factory=list)
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True)
class Chat:
    """What the chat template puts around messages, for programs that render no templates; empty where a model has no
    template, or one that changes the messages themselves.

    Attributes:
        before: what a conversation begins with, up to the first user message.
        after: from a user message up to where the answer begins.
        between: from an answer up to the next user message.
    """

    before: str = ""
    after: str = ""
    between: str = ""


@dataclass(frozen=True)
class FileInfo:
    """Size in bytes and hex SHA-256."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`, checked. `tokenizer` and `chat_template` are file names, empty where a model has none."""

    target: str
    model: ModelInfo
    liger: LigerConfig
    graph: GraphInfo
    generation: GenerationDefaults
    tokenizer: str = ""
    chat_template: str = ""
    chat: Chat = field(default_factory=Chat)
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, FileInfo] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def spec(self) -> StateSpec:
        """Layout of the canonical state."""
        canonical = (TensorSpec(t.name, tuple(t.shape), _canonical(t.dtype)) for t in self.graph.state)
        return StateSpec(tuple(canonical))

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = MANIFEST) -> Manifest:
        """Check every key, type and bound of a parsed manifest.

        Raises:
            BundleError: what is wrong and at which key.
        """
        version = values.get("format_version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise BundleError(f"{where}: format_version must be a positive integer")
        if version > FORMAT_VERSION:
            raise BundleError(
                f"{where} has bundle format {version}, this library reads up to {FORMAT_VERSION}: update liger-deploy"
            )
        manifest: Manifest = _parse(cls, values, where)
        _check_bounds(manifest, where)
        return manifest

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, format_version first."""
        values = dataclasses.asdict(self) | {"liger": self.liger.to_dict()}
        return {"format_version": values.pop("format_version"), **values}


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose manifest has been checked."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str], checksums: bool = True) -> Bundle:
        """Read the manifest and check every file's presence, size and (unless told not to) SHA-256.

        Raises:
            BundleError: missing, corrupt, or newer than this library.
        """
        path = Path(path)
        if not path.is_dir():
            raise BundleError(f"{path} is not a directory: --bundle takes a directory that export wrote")
        if not (path / MANIFEST).is_file():
            raise BundleError(f"{path} is not a bundle: it has no {MANIFEST}")
        manifest = Manifest.from_dict(read_json(path / MANIFEST, BundleError), str(path / MANIFEST))
        for name, info in manifest.files.items():
            _check_file(path / name, info, checksums)
        return cls(path, manifest)

    def file(self, role: str) -> Path:
        """The graph file with this role."""
        name = self.manifest.graph.files.get(role)
        if name is None:
            raise BundleError(f"{self.path / MANIFEST}: graph.files has no {role!r}")
        return self.path / name


def write_manifest(directory: Path, manifest: Manifest) -> Manifest:
    """Add every file of `directory` to the manifest's `files` and write it there."""
    names = sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())
    files = {name: FileInfo((directory / name).stat().st_size, sha256(directory / name)) for name in names}
    manifest = dataclasses.replace(manifest, files=files)
    write_json(directory / MANIFEST, manifest.to_dict())
    return manifest


def _canonical(dtype: str) -> str:
    return dtype if dtype == "int64" else "float32"


def _check_file(path: Path, info: FileInfo, checksums: bool) -> None:
    if not path.is_file():
        raise BundleError(f"{path} is missing: the bundle is incomplete; export or copy it again")
    if path.stat().st_size != info.size:
        raise BundleError(f"{path} has {path.stat().st_size} bytes, the manifest says {info.size}: copy it again")
    if checksums and sha256(path) != info.sha256:
        raise BundleError(f"{path} does not match its checksum: it is damaged or was edited; copy it again")


def _parse(kind: type[T], values: object, where: str) -> T:
    """Build a dataclass from JSON, strictly: no unknown key, no missing key, no wrong type."""
    if not isinstance(values, dict):
        raise BundleError(f"{where} must be an object")
    if kind is LigerConfig:
        try:
            return LigerConfig.from_dict(values, where)  # type: ignore[return-value]
        except ConfigError as error:
            raise BundleError(str(error)) from None
    hints = get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - set(fields)):
        raise BundleError(f"{where} has unknown key {unknown[0]!r}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise BundleError(f"{where} lacks key {name!r}")
    return kind(**{name: _value(hints[name], value, f"{where}: {name}") for name, value in values.items()})


def _value(hint: Any, value: object, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _parse(hint, value, where)  # type: ignore[arg-type]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is list and isinstance(value, list):
        return [_value(arguments[0], item, where) for item in value]
    if origin is dict and isinstance(value, dict):
        return {str(key): _value(arguments[1], item, where) for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if origin is None and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise BundleError(f"{where} has the wrong type")


def _check_bounds(manifest: Manifest, where: str) -> None:
    """Names stay inside the bundle, and sizes are those of a model that could exist."""
    named = [*manifest.graph.files.values(), manifest.tokenizer, manifest.chat_template]
    for name in [*manifest.files, *filter(None, named)]:
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or "\\" in name or ":" in name or not pure.parts:
            raise BundleError(f"{where} names a file outside the bundle: {name!r}")
    for name in filter(None, named):
        if name not in manifest.files:
            raise BundleError(f"{where}: file {name!r} is used but not listed in files")
    model, graph = manifest.model, manifest.graph
    sizes = [model.vocab_size, model.layers, model.query_heads, model.kv_heads, model.head_dim, graph.chunk]
    sizes += [size for tensor in graph.state for size in tensor.shape]
    if not all(0 < size < _LIMIT for size in sizes) or not 0 <= graph.batch < _LIMIT:
        raise BundleError(f"{where} holds a size that is not positive or is absurdly large")
    if not graph.state or graph.state[-1].name != "length":
        raise BundleError(f"{where}: the state must end with 'length'")
    if odd := [t.dtype for t in graph.state if t.dtype not in _DTYPES]:
        raise BundleError(f"{where}: unknown dtype {odd[0]!r}")
    if len({t.name for t in graph.state}) != len(graph.state):
        raise BundleError(f"{where}: two state tensors have one name")
