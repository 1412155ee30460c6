"""Text and recall blocks of `recovery.py`.

Corpus: the Python sources of installed packages, one file in twenty held out by the hash of its name, and a tenth of
synthetic recall blocks: eight random pairs of tokens, a stretch of code, then the question for each pair.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

PACKAGES = ("torch", "sympy", "pandas", "scipy", "sklearn", "networkx", "numpy", "matplotlib")
LENGTH, VOCAB = 1024, 4096
PAIR, ASK = 1, 2  # special tokens of the recall blocks; 0 begins a file
PAIRS, CHOICES = 8, 512  # pairs in a recall block; keys and values are drawn from so many ordinary tokens
GAPS = (8, 64, 256, 768)  # tokens between the last pair and the first question, when tested


def read_texts(limit: int) -> tuple[list[str], list[str]]:
    """(training files, held-out files) of PACKAGES, at most `limit` bytes, each text once."""
    train, held_out, seen, size = [], [], set(), 0
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            continue
        root = Path(spec.submodule_search_locations[0])
        for path in sorted(root.rglob("*.py")):
            data = path.read_bytes()
            digest = hashlib.sha256(data).digest()
            if digest in seen or not 500 < len(data) < 300_000 or size > limit:
                continue
            seen.add(digest)
            size += len(data)
            name = f"{package}/{path.relative_to(root).as_posix()}"
            bucket = hashlib.sha256(name.encode()).digest()[0] % 20
            (train if bucket else held_out).append(data.decode(errors="ignore"))
    return train, held_out


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<file>", "<pair>", "<ask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts[::8], trainer)
    return tokenizer


def tokenize(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    ids = [np.array([0, *text.ids], np.int16) for text in tokenizer.encode_batch(texts)]
    return torch.from_numpy(np.concatenate(ids))


def write_corpus(out: Path, limit: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Tokens to train on, tokens held out, bytes of the former; kept in `out` too."""
    out.mkdir(parents=True, exist_ok=True)
    texts, held_out = read_texts(limit)
    tokenizer = train_tokenizer(texts)
    stream, test = tokenize(tokenizer, texts), tokenize(tokenizer, held_out)
    np.save(out / "train.npy", stream.numpy())
    np.save(out / "test.npy", test.numpy())
    return stream, test, sum(len(text.encode()) for text in texts)


def recall_block(code: torch.Tensor, gap: int, generator: torch.Generator) -> torch.Tensor:
    """[LENGTH] ids: code, pairs, `gap` tokens of code, questions with answers, code to the end."""
    keys = 300 + torch.randperm(CHOICES, generator=generator)[:PAIRS]
    values = 300 + torch.randint(CHOICES, (PAIRS,), generator=generator)
    order = torch.randperm(PAIRS, generator=generator)
    pairs = torch.stack([torch.full_like(keys, PAIR), keys, values], 1).flatten()
    asked = torch.stack([torch.full_like(keys, ASK), keys[order], values[order]], 1).flatten()
    before = int(torch.randint(LENGTH - 2 * len(pairs) - gap, (1,), generator=generator))
    parts = [code[:before], pairs, code[before : before + gap], asked, code[before + gap :]]
    return torch.cat([part.long() for part in parts])[:LENGTH]


def sample(stream: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """[count, LENGTH] training blocks: random places of the stream, a tenth of them with pairs to recall."""
    begin = torch.randint(len(stream) - LENGTH, (count,), generator=generator)
    blocks = stream[begin[:, None] + torch.arange(LENGTH)].long()
    for row in range(0, count, 10):
        gap = int(torch.randint(LENGTH - 6 * PAIRS - 1, (1,), generator=generator))
        blocks[row] = recall_block(blocks[row], gap, generator)
    return blocks


class Data:
    """What every arm shares: tuning blocks by seed, validation and test blocks, recall blocks by gap."""

    def __init__(self, base: Path, test_blocks: int) -> None:
        self.train = torch.from_numpy(np.load(base / "train.npy"))
        held_out = torch.from_numpy(np.load(base / "test.npy")).long()
        blocks = held_out[: len(held_out) // LENGTH * LENGTH].view(-1, LENGTH)
        self.validation, self.test = blocks[:96], blocks[96 : 96 + test_blocks]
        generator = torch.Generator().manual_seed(7)
        rows = [row for row in blocks[-64:] for _ in range(2)]
        self.recall = {gap: torch.stack([recall_block(row, gap, generator) for row in rows]) for gap in GAPS}
