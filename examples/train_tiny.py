"""Train the embedded model: a small Llama on Python's own standard library, then its Liger-GLA form.

    python examples/train_tiny.py --out tiny/ --minutes 5

Writes `tiny/base` and, by way of convert, finetune and merge, `tiny/liger` (Hugging Face checkpoints with their
tokenizer), and `tiny/report.json`: what was trained on what. A GPU takes minutes; a CPU, hours.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import math
import os
import platform
import time
from pathlib import Path

import numpy as np
import torch
from stdlib_corpus import STDLIB, read_corpus
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from liger_deploy.config import LigerConfig
from liger_deploy.convert import convert
from liger_deploy.finetune import FinetuneOptions, finetune
from liger_deploy.merge import merge
from liger_deploy.model.linearize import save_model

END = "<|endoftext|>"
CONTEXT = 1024
BATCH = 64
TUNING = FinetuneOptions(
    rank=64, alpha=64, targets=("q_proj", "k_proj", "v_proj", "o_proj"), lr=3e-3, schedule="cosine", warmup_steps=20,
    batch=BATCH, accumulation=1, max_tokens=20_000_000, distill=1.0, dtype="float32", eval_fraction=0.0, eval_steps=50,
)  # fmt: skip


def train_tokenizer(texts: list[str], size: int) -> Tokenizer:
    """Byte-level BPE; token 0 separates files and begins a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenize(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """All files in one stream, each begun by token 0."""
    return torch.tensor([token for text in tokenizer.encode_batch(texts) for token in (0, *text.ids)])


def bits_per_byte(model: PreTrainedModel, stream: torch.Tensor, byte_count: int) -> float:
    """Cross-entropy of the stream in windows of CONTEXT tokens, in bits for each byte of text."""
    device, nats = next(model.parameters()).device, 0.0
    usable = (len(stream) - 1) // CONTEXT * CONTEXT
    inputs, targets = (stream[i : i + usable].view(-1, CONTEXT) for i in (0, 1))
    with torch.no_grad():
        for x, y in zip(inputs.split(BATCH), targets.split(BATCH), strict=True):
            logits = model(x.to(device)).logits.float()
            nats += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), y.to(device).flatten(), reduction="sum"
            ).item()
    return nats / math.log(2) / (byte_count * usable / len(stream))


def train(model: PreTrainedModel, stream: torch.Tensor, minutes: float, rate: float, name: str) -> int:
    """AdamW, one cosine cycle over `minutes` of wall clock. Returns the tokens seen."""
    device = next(model.parameters()).device
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    stream = stream.to(device)
    offsets = torch.arange(CONTEXT + 1, device=device)
    start, step, model = time.monotonic(), 0, model.train()
    with tqdm(total=100, desc=name, unit="%") as bar:
        while (done := (time.monotonic() - start) / (60 * minutes)) < 1:
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1, (step + 1) / 100) * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)
            begin = torch.randint(len(stream) - CONTEXT - 1, (BATCH,), generator=generator).to(device)
            batch = stream[begin[:, None] + offsets]
            with torch.autocast(device.type, torch.bfloat16):
                logits = model(batch[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if step % 50 == 0:
                bar.update(round(100 * done) - bar.n)
                bar.set_postfix(loss=f"{loss.item():.3f}", tokens=f"{step * BATCH * CONTEXT / 1e6:.0f}M")
    model.eval()
    return step * BATCH * CONTEXT


def ngram_bits_per_byte(train_bytes: bytes, test_bytes: bytes, order: int = 5) -> float:
    """Interpolated Witten-Bell: P_n(c|h) = (count(hc) + distinct(h) P_{n-1}(c)) / (count(h) + distinct(h))."""
    data, test = (np.frombuffer(x, np.uint8).astype(np.uint64) for x in (train_bytes, test_bytes))
    probability = np.full(len(test), 1 / 256)
    for n in range(1, order + 1):
        grams, counts = np.unique(_codes(data, n), return_counts=True)
        contexts, first = np.unique(grams >> np.uint64(8), return_index=True)
        totals, distinct = np.add.reduceat(counts, first), np.diff(np.append(first, len(grams)))
        wanted = _codes(test, n)
        seen = _lookup(grams, counts, wanted)
        total, kinds = (_lookup(contexts, x, wanted >> np.uint64(8)) for x in (totals, distinct))
        lower = probability[n - 1 :]
        mixed = np.where(total > 0, (seen + kinds * lower) / np.maximum(total + kinds, 1), lower)
        probability = np.concatenate([probability[: n - 1], mixed])
    return float(-np.log2(probability).mean())


def _codes(data: np.ndarray, n: int) -> np.ndarray:
    """Each run of n bytes as one number."""
    code = np.zeros(len(data) - n + 1, np.uint64)
    for i in range(n):
        code = (code << np.uint64(8)) | data[i : len(data) - n + 1 + i]
    return code


def _lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)


def save(model: PreTrainedModel, tokenizer: Tokenizer, out: Path) -> None:
    """A Hugging Face checkpoint in bfloat16 with its tokenizer."""
    out.mkdir(parents=True)
    save_model(model.to(torch.bfloat16), out)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END).save_pretrained(out)
    model.float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, default=STDLIB, help="folder of Python sources (the standard library)")
    parser.add_argument("--minutes", type=float, default=5, help="training time of the base")
    parser.add_argument("--vocab", type=int, default=2048)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")

    train_texts, test_texts = read_corpus(args.corpus)
    tokenizer = train_tokenizer(train_texts, args.vocab)
    stream, test_stream = tokenize(tokenizer, train_texts), tokenize(tokenizer, test_texts)
    train_bytes, test_bytes = "".join(train_texts).encode(), "".join(test_texts).encode()
    report: dict[str, object] = {
        "python": platform.python_version(),
        "corpus": f"Python {platform.python_version()} standard library" if args.corpus == STDLIB else args.corpus.name,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor(),
        "train_files": len(train_texts),
        "train_bytes": len(train_bytes),
        "train_tokens": len(stream),
        "held_out_files": len(test_texts),
        "held_out_bytes": len(test_bytes),
        "gzip_bpb": 8 * len(gzip.compress(test_bytes, 9)) / len(test_bytes),
        "byte_5gram_bpb": ngram_bits_per_byte(train_bytes, test_bytes),
    }
    print(json.dumps(report, indent=2), flush=True)

    config = LlamaConfig(
        vocab_size=args.vocab, hidden_size=192, intermediate_size=480, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device)
    report["parameters"] = sum(p.numel() for p in model.parameters())
    fast = torch.compile(model) if device == "cuda" else model
    report["base_tokens"] = train(fast, stream, args.minutes, 4e-3, "base")
    report["base_bpb"] = bits_per_byte(model, test_stream, len(test_bytes))
    save(model, tokenizer, args.out / "base")

    records = args.out / "train.jsonl"
    records.write_text("".join(json.dumps({"text": text}) + "\n" for text in train_texts if text.strip()))
    convert(args.out / "base", args.out / "converted", LigerConfig(structure="gla", window=64))
    finetune(args.out / "converted", str(records), args.out / "adapter", TUNING)
    merge(args.out / "converted", args.out / "adapter", args.out / "liger")
    report["tuning"] = {"device": report["device"], **dataclasses.asdict(TUNING)}
    (args.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    main()
