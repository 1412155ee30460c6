"""Trace StepModel and PrefillModel to ExportedPrograms, and check what came out."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedModel

from liger_deploy.model.attention import LigerAttention
from liger_deploy.model.mixer import Mixer
from liger_deploy.model.ops import attention_after_state, has_one_node, linear_attention
from liger_deploy.model.recurrence import slot_scores
from liger_deploy.model.step import PrefillModel


def trace_prefill(model: PreTrainedModel, chunk: int, batch: int) -> ExportedProgram:
    """The prefill graph with 1 .. chunk tokens (dynamic) and a dynamic batch, or a fixed one if `batch` is not 0.

    It serves decoding too, with one token. What a layer does between its projections and o_proj is one
    `liger::attention` node where there is one for its structure; else its recurrence is one `liger::linear_attention`
    node. Both run in PyTorch, and a target lowers them as it likes.
    """
    prefill = PrefillModel(model).eval()
    rows, tokens = batch or 3, min(chunk, 7)
    arguments = (torch.zeros(rows, tokens, dtype=torch.long), torch.full((rows,), tokens), *prefill.zeros(rows))
    row_dim = Dim.STATIC if batch else Dim("batch", min=1, max=1 << 16)
    token_dim = Dim("tokens", min=1, max=chunk) if chunk > 1 else Dim.STATIC
    state = tuple({0: row_dim} for _ in prefill.spec.tensors)
    shapes = {"tokens_BT": {0: row_dim, 1: token_dim}, "valid_B": {0: row_dim}, "state": state}
    with torch.no_grad(), _attention_as_one_node(model), dense_experts(model):
        # Deferred: guards such as min(T, T * T) == T hold for every T, and only the solver does not know.
        program = torch.export.export(
            prefill,
            arguments,
            dynamic_shapes=shapes,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    check_program(program, 2 + len(state), 1 + len(state))
    return program


def check_program(program: ExportedProgram, inputs: int, outputs: int) -> None:
    """The traced function is pure: plain inputs and outputs of the expected number, nothing mutated."""
    signature = program.graph_signature
    found = (len(signature.user_inputs), len(signature.user_outputs))
    if found != (inputs, outputs):
        raise AssertionError(f"the traced graph has {found} inputs and outputs, expected {(inputs, outputs)}")
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        raise AssertionError("the traced graph mutates its inputs or buffers")


@contextlib.contextmanager
def _attention_as_one_node(model: PreTrainedModel) -> Iterator[None]:
    layers = [module for module in model.modules() if isinstance(module, LigerAttention)]
    with contextlib.ExitStack() as stack:
        for layer in layers:
            if has_one_node(layer.liger):
                stack.callback(setattr, layer, "after_state", layer.after_state)
                layer.after_state = attention_after_state
            else:
                stack.enter_context(_recurrence_as_one_node(layer.mixer))
        yield


@contextlib.contextmanager
def _recurrence_as_one_node(mixer: Mixer) -> Iterator[None]:
    plain = mixer.recurrence, mixer.slot_scores
    mixer.recurrence, mixer.slot_scores = linear_attention, _slot_scores
    try:
        yield
    finally:
        mixer.recurrence, mixer.slot_scores = plain


@contextlib.contextmanager
def dense_experts(model: PreTrainedModel) -> Iterator[None]:
    """Mixture-of-experts layers as batched products: the default form's operator exists in PyTorch alone."""
    name = "_experts_implementation"
    before = getattr(model.config, name, None)
    if before is not None:
        setattr(model.config, name, "batched_mm")
    try:
        yield
    finally:
        if before is not None:
            setattr(model.config, name, before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' progress lines, notes and warnings: they say nothing that a user can act on."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(level)


def _slot_scores(q: Tensor, k: Tensor, s: Tensor, g: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """All T tokens as one block: the only form that a graph with a dynamic T can hold."""
    return slot_scores(q, k, s, g, keys, chunk=q.shape[1])
