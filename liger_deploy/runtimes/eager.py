"""EagerSession: a linearized PyTorch model as a Session, the oracle that every other runtime is held to."""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel

from liger_deploy.model.describe import describe
from liger_deploy.model.step import PrefillModel, StepModel
from liger_deploy.runtimes.session import BaseSession, Logits
from liger_deploy.state import Array

DEFAULT_CHUNK = 64


class EagerSession(BaseSession):
    """Runs StepModel and PrefillModel in PyTorch, in the model's dtype, on the model's device."""

    def __init__(self, model: PreTrainedModel, chunk: int = DEFAULT_CHUNK) -> None:
        super().__init__(describe(model, "eager", chunk))
        self._step = StepModel(model).eval()
        self._prefill = PrefillModel(model).eval()
        self._device = next(model.parameters()).device
        self._tensors: tuple[torch.Tensor, ...] = ()

    @torch.no_grad()
    def _run(self, tokens_BT: Array, valid_B: Array) -> Logits:
        tokens = torch.from_numpy(tokens_BT).to(self._device)
        if tokens.shape[1] == 1 and valid_B.all():
            logits, *state = self._step(tokens[:, 0], *self._tensors)
        else:
            logits, *state = self._prefill(tokens, torch.from_numpy(valid_B).to(self._device), *self._tensors)
        self._tensors = tuple(state)
        return logits.cpu().numpy()  # type: ignore[no-any-return]

    def _read(self) -> dict[str, Array]:
        pairs = zip(self.spec.tensors, self._tensors, strict=True)
        return {s.name: np.array(t.to(getattr(torch, s.dtype)).cpu().numpy()) for s, t in pairs}

    def _write(self, tensors: dict[str, Array], batch: int) -> None:
        graph = self.manifest.graph.state
        self._tensors = tuple(
            torch.from_numpy(np.array(tensors[t.name])).to(self._device, getattr(torch, t.dtype)) for t in graph
        )

    def _clear(self) -> None:
        self._tensors = ()
