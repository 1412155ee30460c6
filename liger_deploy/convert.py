"""convert: a Hugging Face checkpoint -> its Liger form.

Conversion adds no parameter: the weights are copied file by file (each tensor checked to be finite, one at a time in
memory) and `config.json` gains the key `liger`. The result still loads in transformers as the base model.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from liger_deploy import cli
from liger_deploy.config import LigerConfig
from liger_deploy.errors import CheckpointError
from liger_deploy.files import staged_directory, write_json
from liger_deploy.gates import STRUCTURES


def convert(model: str | os.PathLike[str], out: str | os.PathLike[str], config: LigerConfig | None = None) -> Path:
    """Write the Liger form of checkpoint `model` (a directory, or a hub id) to the directory `out`.

    Raises:
        UserError: not a checkpoint, unsupported, damaged, weights that are not finite, already converted, `out` exists.
    """
    from liger_deploy.model import checkpoint

    source = _local(model)
    config = config or LigerConfig()
    values = checkpoint.read_config(source)
    checkpoint.check_supported(values, source)
    if "liger" in values:
        raise CheckpointError(f"{source} is already converted: start from the base checkpoint")
    checkpoint.check_fits(values, config, source)
    weights = checkpoint.weight_files(source)
    with staged_directory(out) as stage:
        for path in checkpoint.companions(source):
            shutil.copy(path, stage / path.name)
        write_json(stage / "config.json", {**values, "liger": config.to_dict()})
        _copy_weights(weights, stage)
    return Path(out)


def _copy_weights(weights: list[Path], stage: Path) -> None:
    import torch
    from safetensors import SafetensorError, safe_open
    from tqdm import tqdm

    for path in tqdm(weights, desc="convert", unit="file", disable=None):
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                    tensor = tensors.get_tensor(name)
                    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                        raise CheckpointError(f"{path}: weight {name!r} holds NaN or infinity")
        except SafetensorError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from None
        shutil.copyfile(path, stage / path.name)


def _local(model: str | os.PathLike[str]) -> Path:
    """A directory as it is; a hub id downloaded."""
    path = Path(model)
    looks_like_id = isinstance(model, str) and model.count("/") == 1 and not model.startswith((".", "/"))
    if path.exists() or not looks_like_id:
        return path
    from huggingface_hub import snapshot_download

    from liger_deploy.model.checkpoint import COMPANIONS

    try:
        return Path(snapshot_download(str(model), allow_patterns=["*.safetensors", *COMPANIONS]))
    except Exception as error:
        reason = type(error).__name__
        raise CheckpointError(f"{model} is no directory, and could not be downloaded from the hub ({reason})") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags: one for each field of LigerConfig."""
    parser.add_argument("--model", required=True, help="checkpoint directory, or hub id")
    parser.add_argument("--out", required=True, type=Path, help="directory to write")
    for field in dataclasses.fields(LigerConfig):
        flag, kind = f"--{field.name.replace('_', '-')}", FLAG_TYPES.get(field.name, float)
        choices = sorted(STRUCTURES) if field.name == "structure" else None
        parser.add_argument(flag, type=kind, choices=choices, help=f"LigerConfig.{field.name} ({field.default})")


def _layers(text: str) -> tuple[int, ...]:
    """Layer numbers: "7,15,23"."""
    return tuple(int(part) for part in text.split(",") if part)


_layers.__name__ = "list of layer numbers"  # argparse names it so: "invalid list of layer numbers value: 'x'"
FLAG_TYPES: dict[str, Any] = {
    "structure": str,
    "window": int,
    "slots": int,
    "gate_source": str,
    "feature_map": str,
    "features": int,
    "softmax_layers": _layers,
    "softmax_window": int,
    "sinks": int,
}


def run(arguments: argparse.Namespace) -> int:
    """Run the verb."""
    names = [field.name for field in dataclasses.fields(LigerConfig)]
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    out = convert(arguments.model, arguments.out, LigerConfig(**given))
    print(f"wrote {out}; next: liger-deploy export --target onnx --model {out}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the verb."""
    return cli.run("convert", "Turn a Hugging Face checkpoint into its Liger form.", add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
