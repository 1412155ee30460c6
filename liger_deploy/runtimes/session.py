"""The Session protocol, and the error contract that every runtime shares.

A session shares a model's weights and owns one state. It has no batch size until its first tokens: `prefill` or
`step` on an empty session sets it, `reset` and `load_state` change it. Arguments are checked before anything runs, so
a refused call changes nothing. If a run itself fails, the state may be half-written: the session is then poisoned, and
every call raises until `reset()` or `load_state()`.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from liger_deploy.bundle import Manifest
from liger_deploy.errors import SessionError, StateError, TokenError
from liger_deploy.state import Array, State, StateSpec

Logits = npt.NDArray[np.float32]
Tokens = npt.ArrayLike


class Session(Protocol):
    """One conversation (or a batch of them) over a loaded model."""

    manifest: Manifest

    def prefill(self, tokens: Tokens, valid: Tokens | None = None) -> Logits:
        """Feed tokens [B,T] (or [T] for one row); returns logits [B,N] float32 of each row's last valid token.

        `valid` [B] (1 .. T): how many tokens of each row are real; the rest leave the row's state untouched.
        """

    def step(self, tokens: Tokens) -> Logits:
        """Feed one token for each row, [B] (or a number for one row); returns logits [B,N] float32."""

    def state(self) -> State:
        """A copy of the state in canonical form."""

    def load_state(self, state: State) -> None:
        """Continue from a state of the same model, whichever runtime wrote it."""

    def fork(self) -> Self:
        """A second session with the same weights and a copy of the state."""

    def reset(self) -> None:
        """Forget all tokens and the batch size."""


class BaseSession(ABC):
    """Checks, chunking and poisoning, once for all runtimes; a runtime adds `_run`, `_read`, `_write` and `_clear`."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._batch = 0
        self._poison = ""

    def prefill(self, tokens: Tokens, valid: Tokens | None = None) -> Logits:
        """See `Session.prefill`.

        Raises:
            TokenError: wrong type, shape, range or batch.
            SessionError: the session is poisoned, or the runtime failed.
        """
        tokens_BT = self._checked(tokens, 2)
        rows, length = tokens_BT.shape
        valid_B = np.full(rows, length, np.int64) if valid is None else _checked_valid(valid, rows, length)
        chunk = self.manifest.graph.chunk
        logits = self._guarded(tokens_BT[:, :chunk], valid_B.clip(max=chunk))
        for start in range(chunk, int(valid_B.max()), chunk):
            left_B = (valid_B - start).clip(0, chunk)
            newer = self._guarded(tokens_BT[:, start : start + chunk], left_B)
            logits = np.where(left_B[:, None] > 0, newer, logits)
        return logits

    def step(self, tokens: Tokens) -> Logits:
        """See `Session.step`. Raises as `prefill` does."""
        tokens_B = self._checked(tokens, 1)
        return self._guarded(tokens_B[:, None], np.ones(len(tokens_B), np.int64))

    def state(self) -> State:
        """See `Session.state`.

        Raises:
            SessionError: the session is poisoned, or has seen no token.
        """
        self._check_usable()
        if not self._batch:
            raise SessionError("this session has no state yet: prefill it first")
        return State(self._read(), self.manifest.model.fingerprint)

    def load_state(self, state: State) -> None:
        """See `Session.load_state`.

        Raises:
            StateError: a state of another model, or of a batch that the graph does not take.
        """
        model = self.manifest.model
        if state.model != model.fingerprint:
            raise StateError(f"this state belongs to model {state.model or 'unknown'}, not to {model.fingerprint}")
        self.spec.check(state)
        self._check_batch(state.batch, StateError)
        self._write(state.tensors, state.batch)
        self._batch, self._poison = state.batch, ""

    def fork(self) -> Self:
        """See `Session.fork`."""
        self._check_usable()
        twin = copy.copy(self)
        twin._clear()
        if self._batch:
            twin._write(self._read(), self._batch)
        return twin

    def reset(self) -> None:
        """See `Session.reset`."""
        self._clear()
        self._batch, self._poison = 0, ""

    @property
    def spec(self) -> StateSpec:
        """Layout of the canonical state."""
        return self.manifest.spec

    @abstractmethod
    def _run(self, tokens_BT: Array, valid_B: Array) -> Logits:
        """Advance the state by at most `chunk` tokens; the arrays are int64 and checked."""

    @abstractmethod
    def _read(self) -> dict[str, Array]:
        """Copy the state out in canonical form."""

    @abstractmethod
    def _write(self, tensors: dict[str, Array], batch: int) -> None:
        """Replace the state by a checked canonical one."""

    def _start(self, batch: int) -> None:
        """Make the state before any token."""
        self._write(self.spec.zeros(batch), batch)

    @abstractmethod
    def _clear(self) -> None:
        """Let go of the state's buffers without touching those of a fork."""

    def _guarded(self, tokens_BT: Array, valid_B: Array) -> Logits:
        self._check_usable()
        if not self._batch:
            self._start(len(tokens_BT))
            self._batch = len(tokens_BT)
        try:
            return self._run(tokens_BT, valid_B)
        except BaseException as error:
            self._poison = f"{type(error).__name__}: {error}".splitlines()[0]
            if isinstance(error, Exception):
                raise SessionError(f"the {self.manifest.target} runtime failed: {self._poison}") from error
            raise

    def _check_usable(self) -> None:
        if self._poison:
            raise SessionError(f"this session failed earlier ({self._poison}): reset() it or load_state() first")

    def _checked(self, tokens: Tokens, rank: int) -> Array:
        """Token ids as int64 of this rank, in range, of this session's batch."""
        array = np.asarray(tokens)
        if array.ndim == rank - 1:
            array = array[None]
        if array.ndim != rank or (array.dtype.kind not in "iu" and array.size):
            raise TokenError(f"tokens must be integers of rank {rank}, not {array.dtype}{list(array.shape)}")
        if not array.size:
            raise TokenError("there are no tokens: the prompt is empty")
        vocab = self.manifest.model.vocab_size
        if array.min() < 0 or array.max() >= vocab:
            bad = array[(array < 0) | (array >= vocab)].flat[0]
            raise TokenError(f"token id {bad} is out of range: this model's ids are 0 .. {vocab - 1}")
        self._check_batch(len(array), TokenError)
        if self._batch and len(array) != self._batch:
            raise TokenError(f"{len(array)} rows of tokens for a session of {self._batch}: reset() it to change that")
        return array.astype(np.int64)

    def _check_batch(self, rows: int, error: type[TokenError] | type[StateError]) -> None:
        fixed = self.manifest.graph.batch
        if fixed and rows != fixed:
            raise error(f"this bundle was exported for a batch of {fixed}, not {rows}: export with --batch dynamic")


def _checked_valid(valid: Tokens, rows: int, length: int) -> Array:
    array = np.asarray(valid)
    if array.shape != (rows,) or array.dtype.kind not in "iu" or array.min() < 1 or array.max() > length:
        raise TokenError(f"valid must be {rows} integers between 1 and {length}")
    return array.astype(np.int64)
