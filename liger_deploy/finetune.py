"""finetune: repair a converted checkpoint with LoRA (arXiv 2503.01496, section 4.1), or train LoLCATs' feature maps.

peft makes the adapter, transformers' Trainer trains it; this module wires them. Training happens in `OUT.training`,
from which `--resume` continues; OUT appears when it is done. Under `accelerate launch` or `torchrun` every process runs
the same command.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import math
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from liger_deploy import cli
from liger_deploy.data import Corpus, Document, Packing
from liger_deploy.errors import CheckpointError, ConfigError, UserError
from liger_deploy.files import read_json, staged_directory, write_json
from liger_deploy.recipe import QKV, Schedule, Stage
from liger_deploy.recipe import FinetuneOptions as FinetuneOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from liger_deploy.trainer import LigerTrainer

ADAPTER_INFO = "liger_adapter.json"
METRICS = "metrics.jsonl"
RUN = "run.json"
NO_FSDP = "--fsdp needs several processes with a GPU each: use torchrun or accelerate launch"


def finetune(
    model: str | os.PathLike[str],
    data: str,
    out: str | os.PathLike[str],
    options: FinetuneOptions | None = None,
    resume: bool = False,
) -> Path:
    """Train on `data` and write `out`: a peft adapter for `merge`, or, for LoLCATs' first stage, a checkpoint.

    Raises:
        UserError: bad checkpoint, data or options, `out` exists, an interrupted run in the way, a diverged loss.
    """
    _require("peft", "accelerate")
    from liger_deploy.model.linearize import fingerprint, liger_config
    from liger_deploy.model.training import quicken

    source, target = Path(model), Path(out)
    work = target.with_name(f"{target.name}.training")
    if target.exists():
        raise UserError(f"{target} already exists: give another --out, or remove it first")
    loaded = _load(source, (options or FinetuneOptions()).dtype)
    options = (options or FinetuneOptions()).resolved(liger_config(loaded))
    if options.fsdp and _processes() == 1:
        raise UserError(NO_FSDP)
    run = _run_values(fingerprint(loaded), data, options)
    _check_work(work, run, resume)
    quicken(loaded, options.compile)
    trained = _trainable(loaded, options)
    train, held_out = _blocks(source, data, options)
    if _rank() == 0:
        work.mkdir(parents=True, exist_ok=True)
        write_json(work / RUN, run)
    trainer = _trainer(trained, train, held_out, work, options)
    trainer.train(resume_from_checkpoint=str(last) if resume and (last := _last_checkpoint(work)) else None)
    trainer.save_model(str(work / "final"))
    if trainer.is_world_process_zero():
        _publish(work, target, source, trainer, run)
    trainer.accelerator.wait_for_everyone()
    return target


def _load(source: Path, dtype: str) -> PreTrainedModel:
    import torch

    from liger_deploy.model.linearize import load_model

    return load_model(source, None if dtype == "auto" else getattr(torch, dtype))


def _run_values(model: str, data: str, options: FinetuneOptions) -> dict[str, Any]:
    """What makes two runs the same, as JSON."""
    values = {name: list(x) if isinstance(x, tuple) else x for name, x in dataclasses.asdict(options).items()}
    return {"model": model, "data": data, "options": values}


def _check_work(work: Path, run: dict[str, Any], resume: bool) -> None:
    """Nothing is in the way of a new run; or what is there to resume is this run."""
    if not resume:
        if (work / RUN).exists() and _rank() == 0:
            raise UserError(f"{work} holds an interrupted run: continue it with --resume, or remove it")
        return
    if not (work / RUN).exists():
        raise UserError(f"there is nothing to resume: {work} does not exist")
    before = read_json(work / RUN)
    changed = [key for key in ("model", "data") if before.get(key) != run[key]]
    changed += [key for key, value in run["options"].items() if before.get("options", {}).get(key) != value]
    if changed:
        raise UserError(f"{work} was begun with another {', '.join(changed)}: resume with the same, or remove it")


def _trainable(model: PreTrainedModel, options: FinetuneOptions) -> Any:
    """The model with an adapter, or with nothing but the feature maps trained."""
    import torch

    model.config.use_cache = False
    torch.manual_seed(options.seed)
    if options.stage == "attention-transfer":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".lolcats." in name)
            if ".lolcats." in name:
                parameter.data = parameter.data.float()
        return model
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=_targets(model, options.targets),
        task_type="CAUSAL_LM",
    )
    if options.gradient_checkpointing:
        model.enable_input_require_grads()
    return get_peft_model(model, config)


def _targets(model: PreTrainedModel, names: tuple[str, ...]) -> list[str]:
    """Names of linear layers that exist; q, k and v are one matrix in some families (Phi 3)."""
    import torch

    linear = {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    wanted = list(dict.fromkeys("qkv_proj" if n in QKV and "qkv_proj" in linear else n for n in names))
    if unknown := [name for name in wanted if name not in linear]:
        raise ConfigError(f"--targets {unknown[0]} is no linear layer of this model: {', '.join(sorted(linear))}")
    if "lm_head" in wanted and model.config.tie_word_embeddings:
        raise ConfigError(
            "lm_head shares its weights with the embedding: an adapter on it cannot be merged; leave it out"
        )
    return wanted


def _blocks(source: Path, data: str, options: FinetuneOptions) -> tuple[list[Any], list[Any]]:
    """Training and evaluation blocks; says on stderr what was read and what was not."""
    from liger_deploy.data import load_tokenizer, pack, read_corpus

    tokenizer = load_tokenizer(source)
    corpus = read_corpus(data, tokenizer, options.train_on_prompt)
    _report(data, corpus)
    documents, held_out = corpus.documents, list[Document]()
    if options.eval_data:
        other = read_corpus(options.eval_data, tokenizer, options.train_on_prompt)
        _report(options.eval_data, other)
        held_out = other.documents
    elif options.eval_fraction and len(documents) > 1:
        count = max(1, int(len(documents) * options.eval_fraction))
        every = len(documents) // count
        held_out = documents[::every][:count]
        documents = [d for i, d in enumerate(documents) if i % every or i >= every * count]
    vocab = read_json(source / "config.json")["vocab_size"]
    if any(int(d.ids.max()) >= vocab for d in (*documents, *held_out)):
        raise CheckpointError(f"{source}: its tokenizer makes ids beyond the model's {vocab}")
    train, test = (pack(x, options.max_length, options.packing) for x in (documents, held_out))
    if options.patience and not test:
        raise UserError("--patience needs evaluation data: give --eval-data, or an --eval-fraction above 0")
    if not train:
        raise UserError(f"{data} holds too little to fill a block: lower --max-length (now {options.max_length})")
    return train, test


def _report(source: str, corpus: Corpus) -> None:
    if _rank() == 0:
        print(f"{source}: {corpus.summary()}", file=sys.stderr)


def _trainer(model: Any, train: list[Any], test: list[Any], work: Path, options: FinetuneOptions) -> LigerTrainer:
    import torch
    from accelerate.utils import DistributedType
    from transformers import EarlyStoppingCallback, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    from liger_deploy.trainer import LigerTrainer, Metrics

    processes = _processes()
    tokens_per_step = options.batch * options.accumulation * options.max_length * processes
    steps = math.ceil(options.max_tokens / tokens_per_step) if options.max_tokens else -1
    warm = "constant_with_warmup" if options.schedule == "constant" and options.warmup_steps else options.schedule
    arguments = TrainingArguments(
        output_dir=str(work),
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=options.batch,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=options.lr,
        lr_scheduler_type=warm,
        warmup_steps=options.warmup_steps,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        num_train_epochs=options.epochs,
        max_steps=steps,
        eval_strategy="steps" if test else "no",
        eval_steps=options.eval_steps,
        save_strategy="steps",
        save_steps=options.eval_steps,
        save_total_limit=2,
        load_best_model_at_end=bool(options.patience and test),
        metric_for_best_model="eval_loss" if test else None,
        greater_is_better=False if test else None,
        gradient_checkpointing=options.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if options.gradient_checkpointing else None,
        logging_steps=min(10, options.eval_steps),
        logging_first_step=True,
        logging_nan_inf_filter=False,
        report_to=["tensorboard"] if options.tensorboard else [],
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        prediction_loss_only=True,
        use_cpu=not torch.cuda.is_available(),
        seed=options.seed,
        fsdp=options.fsdp or None,
        fsdp_config=_fsdp(model) if options.fsdp else None,
    )
    if processes == 1 and arguments.n_gpu > 1:
        arguments._n_gpu = 1  # Trainer would split batches over all GPUs that it sees, and multiply their size
    callbacks = [Metrics(work / METRICS, tokens_per_step, options.stage)]
    if options.patience and test:
        callbacks.append(EarlyStoppingCallback(options.patience))
    trainer = LigerTrainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=test or None,
        callbacks=callbacks,
        distill=options.distill,
        transfer=options.stage == "attention-transfer",
    )
    trainer.remove_callback(PrinterCallback)
    if options.fsdp and trainer.accelerator.distributed_type != DistributedType.FSDP:
        raise UserError(NO_FSDP)  # accelerate copies the model to processes on a CPU, and says nothing
    return trainer


def _fsdp(model: Any) -> dict[str, Any]:
    """Shard layer by layer, whatever the family calls its layer.

    Not with FSDP's own activation checkpointing: it renames the layers, and peft then saves an adapter without weights.
    """
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {
        "version": 2,
        "transformer_layer_cls_to_wrap": [type(bare.model.layers[0]).__name__],
        "state_dict_type": "FULL_STATE_DICT",
    }


def _last_checkpoint(work: Path) -> Path | None:
    """The newest checkpoint that was written whole (Trainer writes its state last)."""
    whole = [p for p in work.glob("checkpoint-*") if (p / "trainer_state.json").is_file()]
    return max(whole, key=lambda p: int(p.name.rsplit("-", 1)[-1]), default=None)


def _publish(work: Path, target: Path, source: Path, trainer: LigerTrainer, run: dict[str, Any]) -> None:
    """Move the result to its place, whole, and remove the working directory."""
    from safetensors import safe_open

    from liger_deploy.model import checkpoint

    with staged_directory(target) as stage:
        if run["options"]["stage"] == "lora":
            with safe_open(work / "final" / "adapter_model.safetensors", framework="pt") as tensors:
                if not tensors.keys():
                    raise AssertionError("peft saved an adapter without weights")
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                shutil.copyfile(work / "final" / name, stage / name)
            write_json(stage / ADAPTER_INFO, {"format": 1, "base": run["model"], "options": run["options"]})
        else:
            for path in checkpoint.companions(source):
                shutil.copyfile(path, stage / path.name)
            from liger_deploy.model.linearize import save_model

            save_model(trainer.model, stage)
        shutil.copyfile(work / METRICS, stage / METRICS)
    shutil.rmtree(work)


def _require(*packages: str) -> None:
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError:
            raise UserError(f"finetune needs {package}: pip install 'liger-deploy[finetune]'") from None


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


CHOICES = {"stage": get_args(Stage), "schedule": get_args(Schedule), "packing": get_args(Packing)}
CHOICES["dtype"] = ("auto", "float32", "bfloat16")
KINDS = {"alpha": float, "lr": float, "weight_decay": float}


def _names(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags: one for each field of FinetuneOptions."""
    parser.add_argument("--model", required=True, type=Path, help="converted checkpoint directory")
    parser.add_argument("--data", required=True, help="file (.jsonl, .json, .txt), folder, or hub data set id")
    parser.add_argument("--out", required=True, type=Path, help="adapter directory to write")
    parser.add_argument("--resume", action="store_true", help="continue the interrupted run of this --out")
    for field in dataclasses.fields(FinetuneOptions):
        flag, text = f"--{field.name.replace('_', '-')}", f"FinetuneOptions.{field.name} ({field.default})"
        if isinstance(field.default, bool):
            parser.add_argument(flag, action="store_true", default=None, help=text)
        else:
            kind = _names if field.name == "targets" else KINDS.get(field.name, type(field.default))
            parser.add_argument(flag, type=kind, choices=CHOICES.get(field.name), help=text)  # type: ignore[arg-type]


def run(arguments: argparse.Namespace) -> int:
    """Run the verb."""
    names = [field.name for field in dataclasses.fields(FinetuneOptions)]
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    options = FinetuneOptions(**given)
    out = finetune(arguments.model, arguments.data, arguments.out, options, arguments.resume)
    if _rank() == 0:
        then = f"merge --model {arguments.model} --adapter {out} --out DIR"
        print(f"wrote {out}; next: liger-deploy {then if options.stage == 'lora' else f'finetune --model {out}'}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the verb."""
    return cli.run("finetune", "Repair a converted checkpoint with LoRA.", add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
