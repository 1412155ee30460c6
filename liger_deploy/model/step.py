"""StepModel and PrefillModel: the two pure functions that every runtime executes.

    step:    token [B] int64, *state               -> logits [B, N] float32, *state
    prefill: tokens [B, T] int64, valid [B], *state -> logits [B, N] float32 of each row's last valid token, *state

The state is flat, in the order of `StateSpec`. Nothing is updated in place. The rest of the transformer is Hugging
Face's own forward: embeddings, norms, MLPs, logit scaling. Shape legend: B batch, T time, N vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from liger_deploy.errors import SessionError
from liger_deploy.model.attention import ModelState
from liger_deploy.model.linearize import liger_config, model_shape, state_spec
from liger_deploy.model.mixer import LayerState


class _Stateful(nn.Module):
    """A linearized model with its state as plain inputs and outputs."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.spec = state_spec(model)
        self.config = liger_config(model)
        self.layers = model_shape(model).layers
        # What transformers calls the state: `past_key_values` up to 5.23, `cache` from 5.24 on.
        self._state = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    def zeros(self, batch: int) -> tuple[Tensor, ...]:
        """The empty state, flat; windows in the model's dtype."""
        weight = next(self.model.parameters())
        return tuple(
            torch.zeros(
                batch, *spec.shape, device=weight.device, dtype=state_dtype(spec.name, spec.dtype, weight.dtype)
            )
            for spec in self.spec.tensors
        )

    def _unflatten(self, state: tuple[Tensor, ...], valid: Tensor | None) -> ModelState:
        layers: list[list[Tensor]] = [[] for _ in range(self.layers)]
        for spec, tensor in zip(self.spec.tensors[:-1], state, strict=False):
            layers[int(spec.name.split(".")[1])].append(tensor)
        return ModelState([LayerState(tuple(x[:-2]), *x[-2:]) for x in layers], state[-1], valid)

    def _run(self, tokens_BT: Tensor, state: ModelState) -> Tensor:
        positions = torch.zeros(1, 1, dtype=torch.long, device=tokens_BT.device)
        logits: Tensor = self.model(
            input_ids=tokens_BT, position_ids=positions, use_cache=False, **{self._state: state}
        ).logits
        if len(state.read) != self.layers:  # an answer would come from no state at all
            raise SessionError(
                "this transformers hands no state to attention layers: install a version that is supported"
            )
        return logits[:, 0].float()


def state_dtype(name: str, canonical: str, model: torch.dtype) -> torch.dtype:
    """Dtype of a state tensor inside a model's graph: windows and sinks follow the model, the rest is canonical."""
    return model if ".window_" in name or ".sink_" in name else getattr(torch, canonical)  # type: ignore[no-any-return]


class StepModel(_Stateful):
    """One token for each row."""

    def forward(self, token_B: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """See the module's docstring."""
        carried = self._unflatten(state, None)
        logits_BN = self._run(token_B[:, None], carried)
        return logits_BN, *(x for layer in carried.layers for x in layer.tensors()), carried.length + 1


class PrefillModel(_Stateful):
    """T tokens for each row, of which the first `valid` count; the rest leave state and logits untouched."""

    def forward(self, tokens_BT: Tensor, valid_B: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """See the module's docstring. 0 <= valid <= T; the logits of a row with valid 0 mean nothing."""
        carried = self._unflatten(state, valid_B)
        with _head_reads(self.model.lm_head, (valid_B - 1).clamp(min=0)):
            logits_BN = self._run(tokens_BT, carried)
        return logits_BN, *(x for layer in carried.layers for x in layer.tensors()), carried.length + valid_B


@contextmanager
def _head_reads(head: nn.Module, row_B: Tensor) -> Iterator[None]:
    """Let the output head see one position of each row only: N logits a row instead of T * N."""

    def select(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (hidden_BTD,) = inputs
        index = row_B[:, None, None].expand(-1, 1, hidden_BTD.shape[2])
        return (hidden_BTD.gather(1, index),)

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
