"""transformers' Trainer with this project's losses, metrics file and progress bar."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from liger_deploy.data import IGNORED
from liger_deploy.errors import UserError
from liger_deploy.model.attention import LigerAttention
from liger_deploy.model.linearize import softmax_attention

TRANSFER_SCALE = 1000.0  # of the mean squared error, as LoLCATs' authors have it


class LigerTrainer(Trainer):  # type: ignore[misc]
    """Cross-entropy, plus `distill` times the divergence from the same weights with softmax attention, adapter off.

    With `transfer` the loss is LoLCATs' first stage instead: each layer's heads against those of softmax attention,
    whose output goes on to the next layer.
    """

    def __init__(self, *args: Any, distill: float = 0.0, transfer: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.distill = distill
        self.transfer = transfer
        if transfer:
            self.model_accepts_loss_kwargs = False  # its loss is a batch's mean, not a sum over tokens

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Trainer's hook; `inputs` as `data.pack` makes them, [B,T] each."""
        if self.transfer:
            loss = self._transfer_loss(model, inputs)
            return (loss, {"loss": loss}) if return_outputs else loss
        teacher = self._teacher_logits(model, inputs) if self.distill and model.training else None
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if teacher is not None:
            trained = inputs["labels"][:, 1:] != IGNORED
            ours, theirs = (x[:, :-1][trained].float().log_softmax(-1) for x in (outputs["logits"], teacher))
            divergence = F.kl_div(ours, theirs, log_target=True, reduction="sum")
            count = trained.sum() if num_items_in_batch is None else num_items_in_batch
            processes = 1 if num_items_in_batch is None else self.accelerator.num_processes
            loss = loss + self.distill * divergence / count * processes
        return (loss, outputs) if return_outputs else loss

    def _teacher_logits(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """No second copy of the weights: the same model with its adapter off and its own attention on."""
        bare = self.accelerator.unwrap_model(model)
        with torch.no_grad(), bare.disable_adapter(), softmax_attention(bare):
            logits: Tensor = model(input_ids=inputs["input_ids"], segment_ids=inputs["segment_ids"]).logits
        return logits

    def _transfer_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        with torch.no_grad(), softmax_attention(model, "transfer"):
            model(input_ids=inputs["input_ids"], segment_ids=inputs["segment_ids"], logits_to_keep=1)
        attentions = (m for m in model.modules() if isinstance(m, LigerAttention))
        layers = [m.transfer_loss for m in attentions if m.transfer_loss is not None]
        return TRANSFER_SCALE * torch.stack(layers).mean()


class Metrics(TrainerCallback):  # type: ignore[misc]
    """Writes every log to a JSONL file, shows it on a progress bar, and stops at a loss that is not a number."""

    def __init__(self, path: Path, tokens_per_step: int, name: str) -> None:
        self.path, self.tokens_per_step, self.name = path, tokens_per_step, name
        self.bar: Any = None
        self.began = (0.0, 0)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Drop what an interrupted run logged after the checkpoint that this one continues from."""
        self.began = time.monotonic(), state.global_step
        if not state.is_world_process_zero:
            return
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= state.global_step]
        self.path.write_text("".join(f"{line}\n" for line in kept))
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.name, unit="step", disable=None)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Move the bar."""
        if self.bar:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """One line of JSON: step, tokens, tokens a second, and what Trainer logs."""
        logs = logs or {}
        if not math.isfinite(logs.get("loss", 0.0)):
            raise UserError(f"the loss is {logs['loss']} at step {state.global_step}: lower --lr, or check the weights")
        if not state.is_world_process_zero or self.bar is None:
            return
        seconds, steps = time.monotonic() - self.began[0], state.global_step - self.began[1]
        rate = steps * self.tokens_per_step / seconds
        line = {
            "step": state.global_step,
            "tokens": state.global_step * self.tokens_per_step,
            "tokens_per_second": rate,
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line | logs) + "\n")
        shown = {key: f"{logs[key]:.3f}" for key in ("loss", "eval_loss") if key in logs}
        self.bar.set_postfix(**shown, tokens=f"{rate:,.0f}/s")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close the bar."""
        if self.bar:
            self.bar.close()
