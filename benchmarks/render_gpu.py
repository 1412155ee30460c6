"""The tables of `render.py` that were measured on GPUs."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.report import result

SHAPES = {"1b": "Llama-3.2-1B", "8b": "Llama-3-8B"}
FINETUNED = {
    "softmax": "softmax, scaled_dot_product_attention",
    "liger kernels": "Liger-GLA",
    "liger": "Liger-GLA, `--compile`",
}


def gpu_finetune() -> str:
    """LoRA on a GPU beside the softmax model's."""
    f, source = result("gpu_finetune")
    base = {row["length"]: row for row in f["rows"] if row["kind"] == "softmax"}
    lines = []
    for row in f["rows"]:
        first = base[row["length"]]
        name = FINETUNED[row["kind"]]
        rate, memory = row["tokens_s"] / first["tokens_s"], row["peak_bytes"] / first["peak_bytes"]
        lines.append(
            f"| {name} | {row['length']:,} | {row['tokens_s']:,.0f} | {rate:.2f} | {row['peak_bytes'] / 1e9:.1f} GB "
            f"| {memory:.2f} | {row['first_step_s']:.0f} s |"
        )
    head = "| LoRA, bfloat16 | tokens a row | tokens/s | over softmax | peak | over softmax | first step |"
    note = "Llama-3.2-1B's shape, random weights, 8,192 tokens a step, rank 8 on q, k, v and o."
    return "\n".join([head, "|---" * 7 + "|", *lines, "", f"{note} {source}"])


def gpu_finetune_two() -> str:
    """Two GPUs against one."""
    f, source = result("gpu_finetune_two")
    lines = [
        f"| two GPUs, {name} | {f[f'largest relative difference of a weight, two, {name}']:.1e} |"
        for name in ("copied", "sharded")
    ]
    head = f"| `finetune`, {f['steps']} steps, against one GPU | largest relative difference of an adapter's matrix |"
    return "\n".join([head, "|---|---|", *lines, "", source])


def gpu_sequence() -> str:
    """One layer's mixing forward and backward, beside softmax attention's."""
    f, source = result("gpu_sequence")
    lines = []
    for row in f["sequence"]:
        ratio = row["sdpa_ms"] / row["ms"]
        times = f"{row['ms']:.2f} ms | {row['sdpa_ms']:.2f} ms | {ratio:.2f}"
        lines.append(f"| {SHAPES[row['shape']]} | {row['length']:,} | {times} |")
    head = "| one layer, forward and backward | tokens a row | Liger-GLA, window included | softmax attention | ratio |"
    whole, _ = result("gpu_finetune")
    step_s = next(r["step_s"] for r in whole["rows"] if (r["kind"], r["length"]) == ("softmax", 8192))
    layers_s = 16 * next(r["sdpa_ms"] for r in f["sequence"] if (r["shape"], r["length"]) == ("1b", 8192)) / 1e3
    note = (
        f"8,192 tokens, bfloat16. Attention is {layers_s / step_s:.0%} of the 1B softmax model's step at 8,192 tokens "
        f"a row: a mixing that took no time at all would make it {step_s / (step_s - layers_s):.2f} times as fast."
    )
    return "\n".join([head, "|---" * 5 + "|", *lines, "", f"{note} {source}"])


def gpu_onnx() -> str:
    """ONNX bundles on the CUDA provider."""
    f, source = result("gpu_onnx")
    lines = []
    for name, rows in f["check"].items():
        passed = sum(row[2] for row in rows.values())
        first, (value, *_) = next(iter(rows.items()))
        time = f["times"][name]
        lines.append(
            f"| {name} | {passed} of {len(rows)} | {first}: {value:.1e} | {time['step_ms']:.1f} ms "
            f"| {time['prefill_tokens_s']:,.0f} |"
        )
    head = "| precision | checks that pass, embedded model | the first of them | a step | prompt, tokens/s |"
    note = "Times: 291 million parameters, random weights, one row, the logits in the program's memory."
    return "\n".join([head, "|---" * 5 + "|", *lines, "", f"{note} {source}"])


def gpu_step() -> str:
    """A step on a GPU by position, ours and Hugging Face's."""
    f, source = result("gpu_step_1b")
    step, read = f["step"], f["bandwidth"]["read_gb_s"]
    ours, theirs = step["step_ms overlapped"], step["peer_ms"]
    head = f"| one token, batch 1, bfloat16 | {' | '.join(f'{int(d):,}' for d in ours)} |"
    peers = (f"{theirs[depth]:.2f} ms" if depth in theirs else "" for depth in ours)
    lines = [
        f"| Liger-GLA, exported package | {' | '.join(f'{ms:.2f} ms' for ms in ours.values())} |",
        f"| Hugging Face, static cache, compiled, CUDA graph | {' | '.join(peers)} |",
    ]
    rate = step["weight_bytes"] / max(ours.values()) / 1e6
    note = (
        f"Llama-3.2-1B's shape, random weights; the step reads its weights at {rate / 1000:.2f} TB/s, "
        f"{rate / read:.0%} of the {read / 1000:.2f} TB/s that a plain read reaches in the same run."
    )
    return "\n".join([head, "|---" * (len(ours) + 1) + "|", *lines, "", f"{note} {source}"])


def gpu_quant() -> str:
    """Steps with packed matrices, of two shapes."""
    checked, _ = result("gpu_check")
    lines, sources = [], []
    # The second's embedding is a matrix of its own, of which a step reads a row.
    for shape, embedding in (("1b", 0), ("8b", 128256 * 4096)):
        f, source = result(f"gpu_quant_{shape}")
        sources.append(source)
        for name, row in f["quant"].items():
            ms = _turns(row)
            size, middle = row["files"]["model.safetensors"], statistics.median(ms)
            rate = (size - embedding * (2 if name == "bfloat16" else 1)) / middle / 1e6
            nats = checked["check"][name]["mean divergence (KL, nats a token)"][0]
            lines.append(
                f"| {SHAPES[shape]}, {name} | {min(ms):.2f} to {max(ms):.2f} ms "
                f"| {statistics.median(_turns(f['quant']['bfloat16'])) / middle:.2f} "
                f"| {rate / f['bandwidth']['read_gb_s']:.0%} | {row['prefill_tokens_s']:,.0f} "
                f"| {size / 1e9:.2f} GB | {nats:.1e} |"
            )
    head = (
        "| one token, batch 1 | any position | over bfloat16 | of a plain read | prefill, tokens/s | weights "
        "| KL, embedded model |"
    )
    note = "Random weights, positions 1,024 to 1,048,576; three packages of a shape timed in turn."
    return "\n".join([head, "|---" * 7 + "|", *lines, "", f"{note} {' '.join(sources)}"])


def _turns(row: dict[str, Any]) -> list[float]:
    return [ms for key, turn in row.items() if key.startswith("step_ms") for ms in turn.values()]


def gpu_throughput() -> str:
    """Tokens a second of all the sequences that fit a GPU, ours and Hugging Face's."""
    f, source = result("gpu_throughput_8b")
    f, read = f["throughput"], f["bandwidth"]["read_gb_s"]
    names = {"ours": "Liger-GLA, exported package", "peer": "Hugging Face, static cache, compiled, CUDA graph"}
    lines = [
        f"| {name} | {row['bytes_of_one'] / 1e6:,.0f} MB | {row['sequences']:,} | {row['ms']:.0f} ms "
        f"| {row['tokens_s']:,.0f} | {row['tokens_s'] / f['peer']['tokens_s']:,.0f} |"
        for name, row in ((name, f[key]) for key, name in names.items())
    ]
    weights, memory, cache = 16.06e9, 85.0e9, f["peer"]["bytes_of_one"]  # 8.03 billion parameters; an H100's memory
    most = int((memory - weights) / cache)
    bound = most / (weights + most * cache) * read * 1e9
    head = f"| sequences at {f['depth']:,} tokens, bfloat16 | state of one | that fit | a step | tokens/s | ratio |"
    note = (
        "Llama-3-8B's shape, random weights. Hugging Face's attention repeats keys and values for their query heads, "
        f"so that half as many fit as caches would, and is slow. An engine that filled the memory with {most} caches "
        f"and read all of it once a step, as fast as a plain read, would give {bound:,.0f} tokens/s (computed): "
        f"{f['ours']['tokens_s'] / bound:.0f} times fewer than ours."
    )
    return "\n".join([head, "|---" * 6 + "|", *lines, "", f"{note} {source}"])


def gpu_prefill() -> str:
    """One layer's prefill kernel beside flash-linear-attention and softmax attention."""
    f, source = result("gpu_prefill")
    rows = f["prefill"]
    lengths = " | ".join(f"{row['tokens']:,}" for row in rows)
    head = f"| one layer, 32 heads of 128, bfloat16 | {lengths} |"
    names = {
        "ms": "`liger::attention_prefill`, window included",
        "fla_ms": "flash-linear-attention `chunk_gla`, the recurrence alone",
        "sdpa_ms": "causal scaled_dot_product_attention",
    }
    lines = [f"| {name} | {' | '.join(f'{r[key]:.2f} ms' for r in rows)} |" for key, name in names.items()]
    return "\n".join([head, "|---" * (len(rows) + 1) + "|", *lines, "", source])


def gpu_layer() -> str:
    """One layer's step kernel by batch."""
    f, source = result("gpu_layer")
    copy = f["bandwidth"]["copy_gb_s"]
    head = (
        "| rows | state | `liger::attention_step` | of copy bandwidth | `fused_recurrent_gla`, the recurrence alone |"
    )
    lines = []
    for r in f["layer"]:
        ours = f"{r['us']:.1f} us | {r['gb_s'] / copy:.0%}"
        lines.append(f"| {r['batch']} | {r['state'].removeprefix('torch.')} | {ours} | {r['fla_us']:.1f} us |")
    note = "One Llama-3-8B layer: 8 key and value heads, 32 query heads, window 64 and mix included."
    return "\n".join([head, "|---|---|---|---|---|", *lines, "", f"{note} {source}"])


def gpu_check() -> str:
    """The CUDA package's worst row in each table."""
    f, source = result("gpu_check")
    lines = []
    for dtype in (name for name in ("float32", "bfloat16", "float16", "int8", "int4") if name in f["check"]):
        rows = f["check"][dtype]
        passed = sum(row[2] for row in rows.values())
        key = "logits of 64 steps" if dtype == "float32" else "mean divergence (KL, nats a token)"
        lines.append(f"| {dtype} | {passed} of {len(rows)} | {key}: {rows[key][0]:.1e} |")
    moved = "equal" if f["check"]["tokens_of_a_moved_state_equal"] else "different"
    note = f"Greedy tokens of a state that went from the GPU to the CPU and back: {moved}."
    return "\n".join(
        ["| CUDA package, embedded model | checks that pass | |", "|---|---|---|", *lines, "", f"{note} {source}"]
    )
