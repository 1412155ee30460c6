"""FinetuneOptions: the recipe of `finetune`, with the paper's defaults and LoLCATs'."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from liger_deploy.config import LigerConfig, require
from liger_deploy.data import Packing
from liger_deploy.errors import ConfigError

Stage = Literal["lora", "attention-transfer"]
Schedule = Literal["constant", "cosine", "linear"]
QKV = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class FinetuneOptions:
    """How to train. Defaults are the paper's recipe, or LoLCATs' for a `lolcats` checkpoint.

    Attributes:
        stage: "lora", or LoLCATs' first stage, which trains the feature maps and writes a checkpoint.
        rank: of the adapter.
        alpha: the adapter's update is scaled by alpha / rank (8; lolcats: 16).
        dropout: of the adapter's input.
        targets: projections that get an adapter (q, k and v; lolcats: and o).
        lr: learning rate (1e-3; lolcats: 1e-4, its first stage 1e-2).
        schedule: of the learning rate.
        warmup_steps: steps over which it rises from 0.
        weight_decay: of AdamW (0.01, PyTorch's; lolcats: 0).
        max_grad_norm: gradients are clipped to it; 0 clips nothing, as the paper's code does.
        batch: blocks a step and process.
        accumulation: such batches added up for one step.
        max_length: tokens a block.
        epochs: passes over the data.
        max_tokens: stop after so many tokens instead (0: after `epochs`).
        packing: "isolate" keeps documents of a block apart; "concatenate" lets them leak, as the paper's code does.
        train_on_prompt: loss on instructions too.
        distill: weight of the divergence from the model's own softmax attention (not in the paper; 0: none).
        eval_data: data to evaluate on; empty: `eval_fraction` of the training documents, held out.
        eval_fraction: of the documents, when `eval_data` is not given.
        eval_steps: steps between evaluations, and between checkpoints.
        patience: evaluations without improvement after which training stops, keeping the best (0: never).
        dtype: of the frozen weights; the adapter is float32.
        gradient_checkpointing: trade time for memory.
        compile: let torch.compile make each layer's kernels: a slow first step, quicker ones after it.
        fsdp: shard weights, gradients and optimizer over the processes.
        seed: of the adapter, the data's order and dropout.
        tensorboard: write its event files into OUT.training/runs as well.
    """

    stage: Stage = "lora"
    rank: int = 8
    alpha: float = None  # type: ignore[assignment]
    dropout: float = 0.0
    targets: tuple[str, ...] = None  # type: ignore[assignment]
    lr: float = None  # type: ignore[assignment]
    schedule: Schedule = "constant"
    warmup_steps: int = 0
    weight_decay: float = None  # type: ignore[assignment]
    max_grad_norm: float = 1.0
    batch: int = 1
    accumulation: int = 8
    max_length: int = 1024
    epochs: float = 2.0
    max_tokens: int = 0
    packing: Packing = "isolate"
    train_on_prompt: bool = False
    distill: float = 0.0
    eval_data: str = ""
    eval_fraction: float = 0.02
    eval_steps: int = 100
    patience: int = 0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    gradient_checkpointing: bool = False
    compile: bool = False
    fsdp: bool = False
    seed: int = 0
    tensorboard: bool = False

    def resolved(self, liger: LigerConfig) -> FinetuneOptions:
        """Every default explicit for a checkpoint of this configuration.

        Raises:
            ConfigError: values that no training can use.
        """
        lolcats, transfer = liger.structure == "lolcats", self.stage == "attention-transfer"
        if transfer and not lolcats:
            raise ConfigError(f"--stage attention-transfer trains lolcats' maps; this checkpoint is {liger.structure}")
        if transfer and (self.distill or self.gradient_checkpointing or self.fsdp):
            raise ConfigError("--stage attention-transfer takes no --distill, --gradient-checkpointing or --fsdp")
        defaults = {
            "alpha": 16.0 if lolcats else 8.0,
            "targets": (*QKV, "o_proj") if lolcats else QKV,
            "lr": (1e-2 if transfer else 1e-4) if lolcats else 1e-3,
            "weight_decay": 0.0 if lolcats else 0.01,
        }
        given = {name: value for name in defaults if (value := getattr(self, name)) is not None}
        options = dataclasses.replace(self, **(defaults | given))
        for name in ("rank", "batch", "accumulation", "eval_steps"):
            require(getattr(options, name) >= 1, f"{name} must be at least 1", getattr(options, name))
        for name in ("alpha", "lr", "epochs"):
            value = getattr(options, name)
            require(math.isfinite(value) and value > 0, f"{name} must be positive", value)
        for name in ("warmup_steps", "weight_decay", "max_grad_norm", "max_tokens", "distill", "patience"):
            require(getattr(options, name) >= 0, f"{name} must not be negative", getattr(options, name))
        require(options.max_length >= 2, "max_length must be at least 2 tokens", options.max_length)
        require(0 <= options.dropout < 1, "dropout must be at least 0 and below 1", options.dropout)
        require(0 <= options.eval_fraction < 1, "eval_fraction must be at least 0 and below 1", options.eval_fraction)
        return options
