"""What is recovered: one base model, every structure tuned with the same data, order and budget.

    python -m benchmarks.recovery base --out DIR                            trains the base model: minutes on a GPU
    python -m benchmarks.recovery corpus --out DIR                          its corpus alone, where it was trained
    python -m benchmarks.recovery arms --base DIR --seeds 0 --out 0.json    tunes the arms
    python -m benchmarks.recovery summarize 0.json 1.json --out .           writes benchmarks/results/recovery.json

The corpus and the recall blocks: `recovery_data.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.recovery_data import ASK, LENGTH, PACKAGES, VOCAB, Data, sample, write_corpus
from benchmarks.report import write
from liger_deploy.config import LigerConfig
from liger_deploy.model.attention import LigerAttention
from liger_deploy.model.linearize import linearize, softmax_attention

WINDOW = 32
BUCKETS = ((0, 32), (32, 128), (128, 256), (256, 512), (512, 1023))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH = 16  # blocks a step of tuning

# name -> (LigerConfig fields, or None for the untouched base model; what else is special)
ARMS: dict[str, tuple[dict[str, Any] | None, str]] = {
    "softmax + LoRA": (None, ""),
    "window, weight 1": ({"structure": "window", "window_weight": 1.0}, ""),
    "window, weight 0.5": ({"structure": "window"}, ""),
    "no gate": ({"structure": "linear"}, ""),
    "fixed decay": ({"structure": "fixed_decay"}, ""),
    "Liger-GLA": ({"structure": "gla"}, ""),
    "Liger-HGRN2": ({"structure": "hgrn2"}, ""),
    "Liger-GSA": ({"structure": "gsa", "slots": 32}, ""),
    "Liger-mLSTM": ({"structure": "mlstm", "gate_normalizer": 16.0}, ""),
    "Liger-GLA, no window": ({"structure": "gla", "recurrent_weight": 1.0, "window_weight": 0.0, "window": 1}, ""),
    "no gate, no window": ({"structure": "linear", "recurrent_weight": 1.0, "window_weight": 0.0, "window": 1}, ""),
    "Liger-GLA + distillation": ({"structure": "gla"}, "distill"),
    "LoLCATs": ({"structure": "lolcats", "features": 32}, "transfer"),
    "Liger-GLA, every fourth layer softmax": ({"structure": "gla", "softmax_layers": (3, 7)}, ""),
}
RATES = (1e-3, 3e-3)  # tried with the first seed; the better on the validation blocks is kept
SEEDS = (0, 1, 2)
PAIRED = [
    ("Liger-GLA", "no gate"),
    ("Liger-GLA", "fixed decay"),
    ("Liger-GLA", "window, weight 1"),
    ("Liger-GLA", "window, weight 0.5"),
    ("Liger-GLA", "LoLCATs"),
    ("Liger-GLA + distillation", "Liger-GLA"),
    ("Liger-GLA, no window", "no gate, no window"),
]


# --- the base model ---------------------------------------------------------------------------------------------------


def new_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=LENGTH, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def train_base(out: Path, minutes: float, limit: int) -> None:
    """Write the model (bfloat16), the tokenized split and the report of its training into `out`."""
    torch.manual_seed(0)
    stream, test, size = write_corpus(out, limit)
    model = new_model().cuda()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    fast, generator = torch.compile(model), torch.Generator().manual_seed(0)
    step, rows, start = 0, 64, 0.0
    while not start or time.monotonic() - start < 60 * minutes:
        done = (time.monotonic() - start) / (60 * minutes) if start else 0.0
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 200) * (0.02 + 0.98 * (1 + math.cos(math.pi * min(done, 1))) / 2)
        blocks = sample(stream, rows, generator).cuda(non_blocking=True)
        with torch.autocast("cuda", torch.bfloat16):
            logits = fast(blocks[:, :-1]).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), blocks[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        start = start or time.monotonic()  # the first step compiles
        step += 1
        if step % 100 == 0:
            print(f"step {step} loss {loss.item():.3f} {step * rows * LENGTH / 1e6:.0f}M tokens", flush=True)
    model.to(torch.bfloat16).save_pretrained(out, max_shard_size="14MB")
    report = {
        "parameters": sum(p.numel() for p in parameters),
        "tokens": step * rows * LENGTH,
        "minutes": minutes,
        "packages": PACKAGES,
        "train_bytes": size,
        "train_tokens": len(stream),
        "held_out_tokens": len(test),
        "device": torch.cuda.get_device_name(),
    }
    (out / "report.json").write_text(json.dumps(report, indent=2))
    print(json.dumps(report))


# --- arms -------------------------------------------------------------------------------------------------------------


def build(base: Path, name: str) -> torch.nn.Module:
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).to(DEVICE)
    config = ARMS[name][0]
    # Softmax arms run through the same module in softmax mode (equal to the base model: rung 3 of the tests).
    return linearize(model, LigerConfig(**({"window": WINDOW} | (config or {}))))


def mode(model: torch.nn.Module, name: str) -> Any:
    return softmax_attention(model, "softmax" if ARMS[name][0] is None else "liger")


def losses(model: torch.nn.Module, blocks: torch.Tensor, name: str) -> torch.Tensor:
    """Cross-entropy of every predicted token, [blocks, LENGTH - 1], nats."""
    found = []
    with torch.no_grad(), mode(model, name):
        for part in blocks.split(32):
            ids = part.to(DEVICE)
            logits = model(input_ids=ids).logits[:, :-1].float()
            found.append(F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").cpu())
    return torch.cat(found)


def recall(model: torch.nn.Module, data: Data, name: str) -> dict[str, float]:
    """Share of answers that are the most likely token, by gap."""
    found = {}
    with torch.no_grad(), mode(model, name):
        for gap, blocks in data.recall.items():
            right = total = 0
            for part in blocks.split(32):
                ids = part.to(DEVICE)
                guess = model(input_ids=ids).logits.argmax(-1)[:, 1:-1]
                answers = ids[:, :-2] == ASK  # the key follows, then the value
                right += int(((guess == ids[:, 2:]) & answers).sum())
                total += int(answers.sum())
            found[str(gap)] = right / total
    return found


def adapt(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj"]))


def tune(model: torch.nn.Module, data: Data, name: str, rate: float, seed: int, tokens: int, transfer: bool) -> None:
    """AdamW at a constant rate, clipped at 1, the same blocks in the same order for every arm of a seed."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0 if transfer else 0.01, fused=True)
    generator = torch.Generator().manual_seed(1000 + seed + 500 * transfer)
    for _ in range(tokens // (BATCH * LENGTH)):
        ids = sample(data.train, BATCH, generator).to(DEVICE)
        loss = transfer_loss(model, ids) if transfer else tuning_loss(model, ids, name)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def tuning_loss(model: torch.nn.Module, ids: torch.Tensor, name: str) -> torch.Tensor:
    with mode(model, name):
        logits = model(input_ids=ids).logits[:, :-1].float()
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    if ARMS[name][1] == "distill":
        with torch.no_grad(), model.disable_adapter(), softmax_attention(model):
            teacher = model(input_ids=ids).logits[:, :-1].float().log_softmax(-1)
        pairs = logits.log_softmax(-1).flatten(0, 1), teacher.flatten(0, 1)
        loss = loss + F.kl_div(*pairs, log_target=True, reduction="batchmean")
    return loss


def transfer_loss(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), softmax_attention(model, "transfer"):
        model(input_ids=ids, logits_to_keep=1)
    layers = [m.transfer_loss for m in model.modules() if isinstance(m, LigerAttention) and m.transfer_loss is not None]
    return 1000 * torch.stack(layers).mean()


Job = tuple[str, float, int, int]  # arm, rate, seed, tokens of tuning
_shared: dict[str, Any] = {}


def start_worker(base: Path, test_blocks: int) -> None:
    torch.set_float32_matmul_precision("high")
    torch.set_num_threads(1)
    _shared.update(base=base, data=Data(base, test_blocks))


def run(job: Job) -> dict[str, Any]:
    """One arm, rate, seed: tuned and tested. LoLCATs spends half its tokens on the transfer of attention."""
    name, rate, seed, tokens = job
    data: Data = _shared["data"]
    started, model = time.monotonic(), build(_shared["base"], name)
    if ARMS[name][1] == "transfer" and tokens:
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(".lolcats." in key)
        tune(model, data, name, 1e-2, seed, tokens // 2, True)
        tokens //= 2
    if tokens:
        model = adapt(model, seed)
        tune(model, data, name, rate, seed, tokens, False)
    test = losses(model, data.test, name)
    return {
        "arm": name,
        "rate": rate,
        "seed": seed,
        "tokens": job[3],
        "validation": losses(model, data.validation, name).mean().item(),
        "test": test.mean().item(),
        "buckets": {f"{a}-{b}": test[:, a:b].mean().item() for a, b in BUCKETS},
        "recall": recall(model, data, name),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad) if tokens else 0,
        "seconds": time.monotonic() - started,
        "blocks": test.mean(1).tolist(),
    }


def arms(base: Path, jobs: list[Job], workers: int, minutes: float, test_blocks: int) -> list[dict[str, Any]]:
    """Run the jobs, `workers` at a time on one GPU; what is not begun after `minutes` is left out."""
    deadline, runs = time.monotonic() + 60 * minutes, list[dict[str, Any]]()
    context = multiprocessing.get_context("spawn")
    start = (base, test_blocks)
    with context.Pool(workers, start_worker, start) as pool, tqdm(total=len(jobs), unit="run") as bar:
        for result in pool.imap_unordered(run, jobs):
            runs.append(result)
            bar.update()
            bar.set_postfix(arm=result["arm"], test=f"{result['test']:.3f}", seconds=f"{result['seconds']:.0f}")
            if time.monotonic() > deadline:
                print(f"out of time: {len(jobs) - len(runs)} runs are left out", flush=True)
                pool.terminate()
                break
    return runs


def summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """A row an arm (means over seeds at its best rate), and paired differences with standard errors.

    The rate is the better one on the validation blocks of the first seed, among those tried with it.
    """
    table, chosen = {}, {}
    for name in ARMS:
        tuned = [r for r in runs if r["arm"] == name and r["tokens"]]
        tried = [r for r in tuned if r["seed"] == SEEDS[0] and r["rate"] in RATES]
        if not tried:
            continue
        rate = min(tried, key=lambda r: r["validation"])["rate"]
        kept = sorted((r for r in tuned if r["rate"] == rate), key=lambda r: r["seed"])
        chosen[name] = {r["seed"]: r for r in kept}
        tests = np.array([r["test"] for r in kept])
        untuned = next(r for r in runs if r["arm"] == name and not r["tokens"])
        others = {str(r["rate"]): r["test"] for r in tuned if r["seed"] == SEEDS[0] and r["rate"] != rate}
        table[name] = {
            "rate": rate,
            "seeds": len(kept),
            "untuned": untuned["test"],
            "test": tests.mean(),
            "spread": tests.std(ddof=1) if len(kept) > 1 else None,
            "other_rates": others,
            "buckets": {key: float(np.mean([r["buckets"][key] for r in kept])) for key in kept[0]["buckets"]},
            "recall": {key: float(np.mean([r["recall"][key] for r in kept])) for key in kept[0]["recall"]},
            "untuned_recall": untuned["recall"],
            "untuned_buckets": untuned["buckets"],
            "trainable": kept[0]["trainable"],
        }
    start, end = table["window, weight 1"]["untuned"], table["softmax + LoRA"]["test"]
    for row in table.values():
        row["gap_recovered"] = (start - row["test"]) / (start - end)
    pairs = [paired(chosen[a], chosen[b], a, b) for a, b in PAIRED if a in chosen and b in chosen]
    plain = [{key: value for key, value in r.items() if key != "blocks"} for r in runs]
    return {"arms": table, "paired": pairs, "runs": plain}


def paired(ours: dict[int, dict[str, Any]], theirs: dict[int, dict[str, Any]], name: str, other: str) -> dict[str, Any]:
    """Mean of loss(name) - loss(other) over the seeds of both, and its standard error over seeds and test blocks."""
    seeds = sorted(ours.keys() & theirs.keys())
    by_seed = np.array([ours[s]["test"] - theirs[s]["test"] for s in seeds])
    rows = [
        np.subtract(ours[s]["blocks"], theirs[s]["blocks"]) for s in seeds if ours[s]["blocks"] and theirs[s]["blocks"]
    ]
    by_block = np.mean(rows, 0) if rows else np.zeros(0)
    return {
        "arm": name,
        "minus": other,
        "seeds": seeds,
        "difference": float(by_seed.mean()),
        "error_over_seeds": float(by_seed.std(ddof=1) / math.sqrt(len(seeds))) if len(seeds) > 1 else None,
        "error_over_blocks": float(by_block.std(ddof=1) / math.sqrt(len(by_block))) if rows else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["corpus", "base", "arms", "summarize"])
    parser.add_argument("runs", type=Path, nargs="*", help="files that `arms` wrote, for `summarize`")
    parser.add_argument("--out", type=Path, required=True, help="folder of the base, or file of runs to write")
    parser.add_argument("--base", type=Path, help="folder that `base` wrote")
    parser.add_argument("--minutes", type=float, default=2.5, help="of base training, or the most that arms may take")
    parser.add_argument("--arms", default=";".join(ARMS), help="names, separated by semicolons")
    parser.add_argument("--rates", default=",".join(map(str, RATES)))
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--untuned", action="store_true", help="each arm without tuning, too")
    parser.add_argument("--tokens", type=int, default=3_000_000, help="of tuning, for each arm")
    parser.add_argument("--workers", type=int, default=12, help="arms that share the GPU")
    parser.add_argument("--test-blocks", type=int, default=768)
    parser.add_argument("--limit", type=int, default=150_000_000, help="bytes of corpus")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    if args.what == "corpus":
        write_corpus(args.out, args.limit)
    elif args.what == "base":
        train_base(args.out, args.minutes, args.limit)
    elif args.what == "arms":
        names, seeds = args.arms.split(";"), [int(s) for s in args.seeds.split(",")]
        jobs: list[Job] = [(name, 0.0, 0, 0) for name in names] if args.untuned else []
        rates = [float(rate) for rate in args.rates.split(",")]
        jobs += [(name, rate, seed, args.tokens) for seed in seeds for name in names for rate in rates]
        runs = arms(args.base, jobs, args.workers, args.minutes, args.test_blocks)
        settings = {
            "tokens": args.tokens, "window": WINDOW, "length": LENGTH, "batch": BATCH,
            "test_tokens": args.test_blocks * (LENGTH - 1), "torch": torch.__version__,
        }  # fmt: skip
        base = json.loads((args.base / "report.json").read_text())
        args.out.write_text(json.dumps({"base": base, "settings": settings, "runs": runs}))
    else:
        parts = [json.loads(path.read_text()) for path in args.runs]
        found = summarize([run for part in parts for run in part["runs"]])
        write("recovery", "python -m benchmarks.recovery", {key: parts[0][key] for key in ("base", "settings")} | found)


if __name__ == "__main__":
    main()
