"""Export a linearized model to a bundle for one target."""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from liger_deploy import __version__
from liger_deploy.bundle import Bundle, Chat, GenerationDefaults, Manifest, write_manifest
from liger_deploy.errors import UserError
from liger_deploy.export.targets import TARGETS
from liger_deploy.export.targets import ExportOptions as ExportOptions
from liger_deploy.files import read_json, staged_directory
from liger_deploy.text import plain_form

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
EMBEDDED = Path(__file__).parents[1] / "assets" / "tiny" / "liger"


def export_bundle(
    model: PreTrainedModel | str | os.PathLike[str] | None = None,
    target: str = "onnx",
    out: str | os.PathLike[str] = "bundle",
    options: ExportOptions | None = None,
) -> Bundle:
    """Lower a model to `target` and write the bundle directory `out`, whole or not at all.

    `model` is a linearized model, a converted checkpoint's directory, or None for the embedded tiny model. A model in
    memory has no tokenizer; its bundle takes and gives token ids. A model of another dtype is copied, not changed.

    Raises:
        UserError: unknown target, missing package, bad options, bad checkpoint, `out` exists.
    """
    options = options or ExportOptions()
    if target not in TARGETS:
        raise UserError(f"unknown target {target!r}: choose one of {', '.join(TARGETS)}")
    row = TARGETS[target]
    row.check(options)
    lower = row.lower()
    options = dataclasses.replace(options, chunk=options.chunk or row.chunk)
    if Path(out).exists():
        raise UserError(f"{out} already exists: give another --out, or remove it first")
    source = EMBEDDED if model is None else model
    directory = Path(source) if isinstance(source, str | os.PathLike) else None
    loaded = _load(directory, options) if directory else _in_dtype(source, options)  # type: ignore[arg-type]
    manifest = _describe(loaded, target)  # type: ignore[arg-type]
    if options.calibrate:
        _calibrate(loaded, directory, options)  # type: ignore[arg-type]
    with staged_directory(out) as stage:
        graph = lower(loaded, stage, options)  # type: ignore[arg-type]
        if directory:
            manifest = _add_text(manifest, directory, stage)
        group_size = options.group_size if options.quant == "int4" else 0
        info = dataclasses.replace(manifest.model, quant=options.quant, group_size=group_size)
        write_manifest(stage, dataclasses.replace(manifest, graph=graph, model=info))
    return Bundle.open(out, checksums=False)


def _load(directory: Path, options: ExportOptions) -> PreTrainedModel:
    import torch

    from liger_deploy.model.linearize import load_model

    return load_model(directory, getattr(torch, options.dtype))


def _calibrate(model: PreTrainedModel, directory: Path | None, options: ExportOptions) -> None:
    from liger_deploy.export.calibrate import calibrate

    if directory is None:
        raise UserError("calibrate needs a tokenizer: export from a checkpoint's directory")
    calibrate(model, directory, options.calibrate, options.group_size)


def _in_dtype(model: PreTrainedModel, options: ExportOptions) -> PreTrainedModel:
    """The caller's model, or a copy of it in the bundle's dtype."""
    import torch

    dtype = getattr(torch, options.dtype)
    return model if next(model.parameters()).dtype == dtype else copy.deepcopy(model).to(dtype)


def _describe(model: PreTrainedModel, target: str) -> Manifest:
    from liger_deploy.model.describe import describe

    manifest = describe(model, target)
    packages = ("torch", "transformers", *TARGETS[target].packages)
    versions = {name: importlib.metadata.version(name) for name in packages}
    versions["liger_deploy"] = __version__
    return dataclasses.replace(manifest, versions=versions)


def _add_text(manifest: Manifest, source: Path, stage: Path) -> Manifest:
    """Copy the tokenizer, the chat template and the generation defaults of a checkpoint."""
    tokenizer, template, chat, generation = "", "", Chat(), _generation_defaults(source)
    if (source / TOKENIZER).is_file():
        for name in filter(lambda name: (source / name).is_file(), (TOKENIZER, TOKENIZER_CONFIG)):
            shutil.copy(source / name, stage / name)
        tokenizer = TOKENIZER
    text = _chat_template(source)
    if tokenizer and text:
        (stage / CHAT_TEMPLATE).write_text(text, encoding="utf-8")
        template, chat = CHAT_TEMPLATE, plain_form(text, _token(source / TOKENIZER, generation.bos_token_id))
    return dataclasses.replace(manifest, tokenizer=tokenizer, chat_template=template, chat=chat, generation=generation)


def _token(tokenizer: Path, id_: int) -> str:
    """The text of an added token; "" if there is none of this id."""
    added = read_json(tokenizer).get("added_tokens", [])
    return next((str(token["content"]) for token in added if token.get("id") == id_), "")


def _chat_template(source: Path) -> str:
    if (source / CHAT_TEMPLATE).is_file():
        return (source / CHAT_TEMPLATE).read_text(encoding="utf-8")
    if (source / TOKENIZER_CONFIG).is_file():
        value = read_json(source / TOKENIZER_CONFIG).get("chat_template")
        return value if isinstance(value, str) else ""
    return ""


def _generation_defaults(source: Path) -> GenerationDefaults:
    values = read_json(source / "config.json")
    if (source / "generation_config.json").is_file():
        values |= read_json(source / "generation_config.json")
    bos, eos = values.get("bos_token_id"), values.get("eos_token_id")
    ends = eos if isinstance(eos, list) else [eos]
    sample = values.get("do_sample") is True
    return GenerationDefaults(
        bos_token_id=bos if isinstance(bos, int) else -1,
        eos_token_ids=[token for token in ends if isinstance(token, int)],
        temperature=float(values.get("temperature") or 1.0) if sample else 0.0,
        top_k=int(values.get("top_k") or 0) if sample else 0,
        top_p=float(values.get("top_p") or 1.0) if sample else 1.0,
    )
