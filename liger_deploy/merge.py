"""merge: an adapter that `finetune` wrote + the checkpoint it was made for -> a plain Liger checkpoint.

The merged model is compared with the adapted one on the same tokens in float32 before anything is written.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from liger_deploy import cli
from liger_deploy.errors import CheckpointError, UserError
from liger_deploy.files import read_json, staged_directory
from liger_deploy.finetune import ADAPTER_INFO

TOLERANCE = 1e-5  # of the largest logit: (W + BA) x and W x + B (A x) differ by rounding
TOKENS = 256


def merge(model: str | os.PathLike[str], adapter: str | os.PathLike[str], out: str | os.PathLike[str]) -> float:
    """Write the merged checkpoint `out`; returns the largest difference of logits, relative to the largest.

    The weights keep the checkpoint's dtype; adding and comparing happen in float32.

    Raises:
        UserError: a bad checkpoint, an adapter of another one or damaged, a merge that changes the model, `out` exists.
    """
    import torch

    from liger_deploy.model import checkpoint
    from liger_deploy.model.linearize import fingerprint, load_model, save_model

    source, directory = Path(model), Path(adapter)
    base = _adapter_base(directory)
    loaded = load_model(source, torch.float32)
    dtype = getattr(torch, checkpoint.dtype(checkpoint.read_config(source)))
    if fingerprint(loaded) != base:
        raise CheckpointError(f"{directory} was trained on checkpoint {base}, {source} is {fingerprint(loaded)}")
    names = set(loaded.state_dict())
    adapted = _adapted(loaded, directory)
    before = _logits(adapted)
    merged = adapted.merge_and_unload()
    difference = float((_logits(merged) - before).abs().max() / before.abs().max())
    if not difference <= TOLERANCE:
        raise UserError(f"merging {directory} changes the logits by {difference:.1e}: its weights are damaged")
    if set(merged.state_dict()) != names:
        raise UserError(f"merging {directory} left {sorted(set(merged.state_dict()) ^ names)[0]!r} behind")
    with staged_directory(out) as stage:
        for path in checkpoint.companions(source):
            if path.name != checkpoint.INDEX:
                shutil.copyfile(path, stage / path.name)
        save_model(merged.to(dtype), stage)
    return difference


def _adapter_base(directory: Path) -> str:
    """Fingerprint of the checkpoint that an adapter was trained on."""
    if not (directory / ADAPTER_INFO).is_file():
        raise CheckpointError(f"{directory} is not an adapter that finetune wrote: it has no {ADAPTER_INFO}")
    base = read_json(directory / ADAPTER_INFO, CheckpointError).get("base")
    if not isinstance(base, str):
        raise CheckpointError(f"{directory / ADAPTER_INFO} names no base checkpoint")
    return base


def _adapted(model: Any, directory: Path) -> Any:
    try:
        from peft import PeftModel
    except ImportError:
        raise UserError("merge needs peft: pip install 'liger-deploy[finetune]'") from None
    import torch
    from safetensors import SafetensorError, safe_open

    weights = directory / "adapter_model.safetensors"
    try:
        with safe_open(weights, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                if not torch.isfinite(tensors.get_tensor(name)).all():
                    raise CheckpointError(f"{weights}: {name!r} holds NaN or infinity")
        return PeftModel.from_pretrained(model, str(directory)).eval()
    except (OSError, SafetensorError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{directory} does not load: {str(error).splitlines()[0]}") from None


def _logits(model: Any) -> Any:
    """Logits [1,T,N] of a fixed sequence of ids."""
    import torch

    vocab = model.config.vocab_size
    ids = torch.randint(vocab, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    parser.add_argument("--model", required=True, type=Path, help="the checkpoint that was fine-tuned")
    parser.add_argument("--adapter", required=True, type=Path, help="directory that finetune wrote")
    parser.add_argument("--out", required=True, type=Path, help="checkpoint directory to write")


def run(arguments: argparse.Namespace) -> int:
    """Run the verb."""
    difference = merge(arguments.model, arguments.adapter, arguments.out)
    print(f"wrote {arguments.out}: its logits differ from the adapter's by {difference:.1e} of the largest")
    print(f"next: liger-deploy export --target onnx --model {arguments.out}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the verb."""
    return cli.run("merge", "Put an adapter into its checkpoint.", add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
