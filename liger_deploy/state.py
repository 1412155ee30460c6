"""StateSpec and State: the only owner of the recurrent state's layout, the same in every runtime and language.

A state is a set of named arrays, batch first, float32 (`length`: int64), whatever dtype the model computes in: a
float32 holds every float16 and bfloat16 exactly, so a state moves between runtimes without negotiation.

    layers.{i}.recurrent   [B, G, K, V]   the recurrence, one per KV head (query heads of a group share it)
    layers.{i}.slots_k     [B, G, K, M]   gsa instead: slots of keys, and
    layers.{i}.slots_v     [B, G, M, V]   slots of values
    layers.{i}.features_v  [B, H, 2F, V]  lolcats instead: sums of what left the window, a query head each, and
    layers.{i}.features_1  [B, H, 2F]     its denominator
    layers.{i}.sink_k      [B, G, S, K]   first S keys before RoPE, where a layer has attention sinks
    layers.{i}.sink_v      [B, G, S, V]   first S values
    layers.{i}.window_k    [B, G, W, K]   last W keys before RoPE, oldest first, zeros until filled
    layers.{i}.window_v    [B, G, W, V]   last W values, oldest first
    length                 [B]            tokens seen by each row

B batch, G KV heads, H query heads, K key dim, V value dim (= K here), M slots, F features, S sinks, W window. The
structure `window`, and a layer that stays softmax attention (its W is larger), have no recurrence.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from liger_deploy.config import LigerConfig
from liger_deploy.errors import StateError
from liger_deploy.files import staged_file

FORMAT = "liger_state"
VERSION = 1
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that its state depends on."""

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the state. `shape` leaves out the leading batch dimension."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"


@dataclass(frozen=True)
class StateSpec:
    """Names, shapes and dtypes of a model's state, in the order in which graphs take and give them."""

    tensors: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, config: LigerConfig, shape: ModelShape) -> StateSpec:
        """The state of a model of this shape converted with this configuration."""
        layers = (spec for layer in range(shape.layers) for spec in layer_tensors(layer, config.layer(layer), shape))
        return cls((*layers, TensorSpec("length", (), "int64")))

    def nbytes(self, batch: int = 1) -> int:
        """Bytes of a canonical state of `batch` rows."""
        return sum(array.nbytes for array in self.zeros(1).values()) * batch

    def zeros(self, batch: int) -> dict[str, Array]:
        """The state before any token: all zeros."""
        return {spec.name: np.zeros((batch, *spec.shape), spec.dtype) for spec in self.tensors}

    def check(self, state: State) -> None:
        """Raise StateError unless `state` has exactly these tensors, with one batch size."""
        expected, found = {spec.name for spec in self.tensors}, set(state.tensors)
        if expected != found:
            odd = sorted(expected ^ found)[0]
            verb = "lacks" if odd in expected else "has an unexpected"
            raise StateError(f"the state {verb} tensor {odd!r}: it belongs to another model or configuration")
        for spec in self.tensors:
            array, want = state.tensors[spec.name], (state.batch, *spec.shape)
            if array.shape != want or array.dtype != spec.dtype:
                raise StateError(
                    f"state tensor {spec.name!r} is {array.dtype}{list(array.shape)}, "
                    f"this model needs {spec.dtype}{list(want)}: it belongs to another model or configuration"
                )


def layer_tensors(layer: int, config: LigerConfig, shape: ModelShape) -> Iterator[TensorSpec]:
    """One layer's tensors: the recurrence's or the sinks', then the window's two. `config` is that layer's own."""
    heads, dim = shape.kv_heads, shape.head_dim
    if config.row.width == "slot":
        yield TensorSpec(f"layers.{layer}.slots_k", (heads, dim, config.slots))
        yield TensorSpec(f"layers.{layer}.slots_v", (heads, config.slots, dim))
    elif config.row.width == "learned":
        yield TensorSpec(f"layers.{layer}.features_v", (shape.query_heads, 2 * config.features, dim))
        yield TensorSpec(f"layers.{layer}.features_1", (shape.query_heads, 2 * config.features))
    elif config.row.width != "none":
        yield TensorSpec(f"layers.{layer}.recurrent", (heads, dim, dim))
    if config.sinks:
        yield TensorSpec(f"layers.{layer}.sink_k", (heads, config.sinks, dim))
        yield TensorSpec(f"layers.{layer}.sink_v", (heads, config.sinks, dim))
    yield TensorSpec(f"layers.{layer}.window_k", (heads, config.window, dim))
    yield TensorSpec(f"layers.{layer}.window_v", (heads, config.window, dim))


@dataclass(frozen=True)
class State:
    """A canonical state: what a session knows of its tokens so far.

    Attributes:
        tensors: name -> array, as a `StateSpec` lays them out.
        model: fingerprint of the model that wrote it (`Manifest.model.fingerprint`).
    """

    tensors: dict[str, Array]
    model: str

    @property
    def batch(self) -> int:
        """Rows in the state."""
        return int(self.tensors["length"].shape[0])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all."""
        from safetensors.numpy import save_file

        arrays = {name: np.ascontiguousarray(array) for name, array in self.tensors.items()}
        meta = {"format": FORMAT, "version": str(VERSION), "model": self.model}
        with staged_file(path) as stage:
            save_file(arrays, stage, metadata=meta)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> State:
        """Read a file written by `save` on any runtime or language.

        Raises:
            StateError: missing, truncated, not a state, from a newer version, or with values that are not finite.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        meta = _metadata(Path(path))
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise StateError(f"{path} is not a readable state file: {error}") from None
        state = cls(tensors, meta.get("model", ""))
        _check_values(path, state)
        return state


def _metadata(path: Path) -> dict[str, str]:
    """The `__metadata__` of a safetensors header, checked to be that of a state this version reads."""
    try:
        with path.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            if size > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            meta = json.loads(stream.read(size))["__metadata__"]
            kind, version = meta["format"], int(meta["version"])
    except (OSError, ValueError, KeyError, TypeError, struct.error, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not written by State.save, or damaged"
        raise StateError(f"{path} is not a readable state file: {reason}") from None
    if kind != FORMAT:
        raise StateError(f"{path} is not a state file: its format is {kind!r}")
    if version > VERSION:
        raise StateError(f"{path} has state format {version}, this library reads up to {VERSION}: update liger-deploy")
    return dict(meta)


def _check_values(path: str | os.PathLike[str], state: State) -> None:
    length = state.tensors.get("length")
    if length is None or length.dtype != np.int64 or length.ndim != 1 or (length < 0).any():
        raise StateError(f"{path}: a state needs a tensor 'length' of int64 [batch], none negative")
    for name, array in state.tensors.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise StateError(f"{path}: tensor {name!r} holds values that are not finite")
