"""evaluate: bits per byte of text under checkpoints, softmax or Liger, side by side.

Cross-entropy in bits for each byte of UTF-8, so that models with different tokenizers compare. Long documents are read
in windows of `--context` tokens, each from an empty state, for softmax and Liger models alike.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from liger_deploy import cli
from liger_deploy.errors import UserError
from liger_deploy.files import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH = 8


def evaluate(model: str | os.PathLike[str], data: str, context: int = 1024, max_tokens: int = 0) -> float:
    """Bits per byte of the plain text in `data` (a file or folder, as `finetune` takes) under a checkpoint.

    `max_tokens` (0: all) stops after so many tokens.

    Raises:
        UserError: a bad checkpoint or data, or a tokenizer that does not give the text back.
    """
    import torch

    from liger_deploy.data import load_tokenizer
    from liger_deploy.model import checkpoint
    from liger_deploy.model.linearize import linearize, load_base_model, load_model, softmax_attention

    if context < 2 or max_tokens < 0:
        raise UserError("--context must be at least 2 tokens, --max-tokens not negative")
    path = Path(model)
    tokenizer = load_tokenizer(path)
    liger = "liger" in checkpoint.read_config(path)
    loaded = load_model(path, torch.float32) if liger else linearize(load_base_model(path, torch.float32))
    loaded.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    with contextlib.nullcontext() if liger else softmax_attention(loaded):
        return _bits_per_byte(loaded, tokenizer, data, context, max_tokens)


def _bits_per_byte(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: str, context: int, max_tokens: int
) -> float:
    import torch
    from tqdm import tqdm

    from liger_deploy.data import IGNORED, pack, read_corpus

    corpus = read_corpus(data, tokenizer, train_on_prompt=True)
    blocks = pack(corpus.documents, context)[: math.ceil(max_tokens / context) if max_tokens else None]
    nats, size, special = 0.0, 0, {IGNORED, *tokenizer.all_special_ids}
    for start in tqdm(range(0, len(blocks), BATCH), desc="evaluate", unit="batch", disable=None):
        keys = ("input_ids", "labels", "segment_ids")
        ids, labels, segments = (
            torch.from_numpy(np.stack([block[key] for block in blocks[start : start + BATCH]])).to(model.device)
            for key in keys
        )
        with torch.no_grad():
            logits = model(input_ids=ids, segment_ids=segments).logits[:, :-1].float()
        nats += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
        ).item()
        size += sum(len(tokenizer.decode([i for i in row if i not in special]).encode()) for row in labels.tolist())
    return nats / math.log(2) / size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    parser.add_argument("--model", required=True, type=Path, nargs="+", help="checkpoints, softmax or converted")
    parser.add_argument("--data", required=True, help="file (.txt, .jsonl, .json), folder, or hub data set id")
    parser.add_argument("--context", type=int, default=1024, help="tokens a document is read in")
    parser.add_argument("--max-tokens", type=int, default=0, help="stop after so many (0: all)")
    parser.add_argument("--out", type=Path, help="JSON file to write: checkpoint -> bits per byte")


def run(arguments: argparse.Namespace) -> int:
    """Run the verb."""
    found = {}
    for model in arguments.model:
        found[str(model)] = evaluate(model, arguments.data, arguments.context, arguments.max_tokens)
        print(f"{found[str(model)]:8.4f} bits per byte  {model}", flush=True)
    if arguments.out:
        write_json(arguments.out, found)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the verb."""
    return cli.run("evaluate", "Bits per byte of text under checkpoints.", add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
