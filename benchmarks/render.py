"""Write the README's tables from the JSON that the benchmarks wrote; `--check` fails if a table was edited by hand.

python -m benchmarks.render [--check]
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.report import RESULTS, ROOT
from liger_deploy.bench import report
from liger_deploy.config import LigerConfig
from liger_deploy.gates import STRUCTURES
from liger_deploy.state import ModelShape, StateSpec


def tiny() -> str:
    """Bits per byte of the embedded model."""
    f, source = _result("tiny")
    names = {
        "gzip": "gzip -9",
        "byte_5gram": "byte 5-gram, interpolated",
        "base": "softmax base model",
        "converted": "converted to Liger-GLA",
        "tuned": "tuned with LoRA, merged",
    }
    lines = [f"| {label} | {f['bits_per_byte'][name]:.3f} |" for name, label in names.items()]
    return "\n".join(["| embedded model, held-out files | bits per byte |", "|---|---|", *lines, "", source])


def _result(name: str) -> tuple[Any, str]:
    r = json.loads((RESULTS / f"{name}.json").read_text())
    machine = r["machine"].get("gpu") or f"{r['machine']['cpu']}, {r['machine']['cores']} cores"
    source = f"`{r['command']}`, {r['date']}, {machine}"
    return r["figures"], f"{source}: `benchmarks/results/{name}.json`"


def drift() -> str:
    """Rung 7."""
    f, source = _result("drift")
    rows = {
        "step at depth 100,000 over step at depth 0, interleaved": f"{f['interleaved_at_100k_over_at_0']:.2f}",
        "median step, last 10,000 over first 10,000": f"{f['last_over_first']:.2f}",
        "the same ratio of a fixed loop beside it (the machine's drift)": f"{f['fixed_loop_last_over_first']:.2f}",
        "growth of resident memory": f"{f['resident_growth_bytes'] / 1e6:.2f} MB",
        "worst logits error against float64, first 1,000": f"{f['worst_relative_error_first_1000']:.1e}",
        "worst logits error against float64, last 1,000": f"{f['worst_relative_error_last_1000']:.1e}",
        "the same 1,000 tokens from an empty state": f"{f['worst_relative_error_same_1000_from_empty']:.1e}",
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join([f"| {f['steps']:,} steps on ONNX Runtime | |", "|---|---|", *lines, "", source])


def memory_1b() -> str:
    """Llama-3.2-1B's shape, float32."""
    return _memory("1b", "float32")


def memory_3b() -> str:
    """Llama-3.2-3B's shape, 4 bits."""
    return _memory("3b", "int4")


def memory_1b_executorch() -> str:
    """Llama-3.2-1B's shape on ExecuTorch, 4 bits."""
    return _memory("1b_executorch", "int4")


def _memory(name: str, bundle: str) -> str:
    f, source = _result(f"memory_{name}")
    size = name.partition("_")[0]
    lines = [
        f"| {name} | {f[name]['peak_resident_gb']:.2f} GB | {f[name]['seconds']:.0f} s |"
        for name in ("convert", "export", "run")
    ]
    head = f"| Llama-3.2-{size.upper()} shape, checkpoint of {f['checkpoint_gb']:.2f} GB | peak memory | time |"
    note = f"The {bundle} bundle is {f['bundle_gb']:.2f} GB; weights are random. {source}"
    return "\n".join([head, "|---|---|---|", *lines, "", note])


def parity() -> str:
    """The embedded model on ONNX Runtime against PyTorch."""
    rows, source = _result("parity")
    lines = [f"| {r['check']} | {r['value']:.1e} | {r['limit']:g} | {r['detail']} |" for r in rows]
    return "\n".join(
        ["| ONNX Runtime against PyTorch | difference | limit | |", "|---|---|---|---|", *lines, "", source]
    )


def quant() -> str:
    """Speed and size at the 291M shape on one thread, divergence of the embedded model."""
    f, source = _result("quant")
    lines = []
    for row in f["rows"]:
        if row["threads"] != 1:
            continue
        table = f["embedded"].get(row["quant"], {})
        divergence, wrong = (table.get(x) for x in ("mean divergence (KL, nats a token)", "another most likely token"))
        close = f"{divergence:.3f} | {wrong:.1%}" if table else "0 | 0 %"
        speed = f"{row['ms_a_token']:.1f} ms | {row['speed_to_float32']:.1f}"
        prefill = f"{row['prefill_tokens_per_second']:.0f}"
        lines.append(f"| {row['quant']} | {row['bundle_mb']:.0f} MB | {speed} | {prefill} | {close} |")
    head = "| `--quant` | bundle | a token | speed | prefill, tokens/s | KL, embedded model | another top token |"
    note = "291 million parameters, random weights, one thread, steps interleaved; KL in nats a token on text."
    return "\n".join([head, "|---|---|---|---|---|---|---|", *lines, "", f"{note} {source}"])


def depth_tiny() -> str:
    """The embedded model on every runtime."""
    return _depth("tiny", "The embedded model, float32.")


def depth_291m() -> str:
    """A small model on every runtime and beside its peers."""
    return _depth("291m", "291 million parameters, random weights.")


def depth_tiny_cuda() -> str:
    """The embedded model on a GPU."""
    return _depth("tiny_cuda", "The embedded model, bfloat16.")


FINETUNED = {
    "softmax": "softmax, scaled_dot_product_attention",
    "liger kernels": "Liger-GLA",
    "liger": "Liger-GLA, `--compile`",
}


def gpu_finetune() -> str:
    """LoRA on a GPU beside the softmax model's."""
    f, source = _result("gpu_finetune")
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


def gpu_sequence() -> str:
    """One layer's mixing forward and backward, beside softmax attention's."""
    f, source = _result("gpu_sequence")
    names = {"1b": "Llama-3.2-1B", "8b": "Llama-3-8B"}
    lines = []
    for row in f["sequence"]:
        ratio = row["sdpa_ms"] / row["ms"]
        times = f"{row['ms']:.2f} ms | {row['sdpa_ms']:.2f} ms | {ratio:.2f}"
        lines.append(f"| {names[row['shape']]} | {row['length']:,} | {times} |")
    head = "| one layer, forward and backward | tokens a row | Liger-GLA, window included | softmax attention | ratio |"
    whole, _ = _result("gpu_finetune")
    step_s = next(r["step_s"] for r in whole["rows"] if (r["kind"], r["length"]) == ("softmax", 8192))
    layers_s = 16 * next(r["sdpa_ms"] for r in f["sequence"] if (r["shape"], r["length"]) == ("1b", 8192)) / 1e3
    note = (
        f"8,192 tokens, bfloat16. Attention is {layers_s / step_s:.0%} of the 1B softmax model's step at 8,192 tokens "
        f"a row: a mixing that took no time at all would make it {step_s / (step_s - layers_s):.2f} times as fast."
    )
    return "\n".join([head, "|---" * 5 + "|", *lines, "", f"{note} {source}"])


def gpu_finetune_two() -> str:
    """Two GPUs against one."""
    f, source = _result("gpu_finetune_two")
    lines = [
        f"| two GPUs, {name} | {f[f'largest relative difference of a weight, two, {name}']:.1e} |"
        for name in ("copied", "sharded")
    ]
    head = f"| `finetune`, {f['steps']} steps, against one GPU | largest relative difference of an adapter's matrix |"
    return "\n".join([head, "|---|---|", *lines, "", source])


def executorch_profile() -> str:
    """Where an ExecuTorch step spends its time."""
    f, source = _result("executorch_profile")
    profiles = f["profiles"]
    names = [kind["name"] for kind in profiles[0]["kinds"] if kind["name"] != "DELEGATE_CALL"][:7]
    at = [{kind["name"]: kind for kind in p["kinds"]} for p in profiles]
    steps = " | ".join(f"{p['step_ms']:.2f} ms" for p in profiles)
    inside = " | ".join(f"{p['in_delegates']:.1%}" for p in profiles)
    lines = [f"| the step | 1 | {steps} |"]
    lines.append(f"| inside its delegates | {profiles[0]['delegates']} | {inside} |")
    for name in names:
        times = " | ".join(f"{kinds[name]['ms']:.2f} ms" if name in kinds else "" for kinds in at)
        lines.append(f"| {name} | {at[0][name]['count']} | {times} |")
    head = "| | count | " + " | ".join(f"threads: {p['threads']}" for p in profiles) + " |"
    grown = f["growth"]
    note = (
        f"291 million parameters, random weights, {f['quant']}. The embedded model's process grew by {grown['grown']} "
        f"bytes over {grown['steps']:,} steps."
    )
    return "\n".join([head, "|---" * (len(profiles) + 2) + "|", *lines, "", f"{note} {source}"])


def _depth(name: str, what: str) -> str:
    """A row a subject, a column a depth: milliseconds a token; then time to the first token, prefill and memory."""
    f, source = _result(f"depth_{name}")
    source = re.sub("`.*?`", f"`python -m benchmarks.depth {name}`", source, count=1)
    depths = " | ".join(f"{c:,}" for c in f["contexts"])
    memory = report.memory(f)
    head = f"| ms a token at depth | {depths} | first token | prefill, tokens/s | {memory} | files |"
    lines = [f"| {' | '.join([*row[:-3], row[-2]])} |" for row in report.rows(f)]
    loop = f["reference_loop_s"]
    note = (
        f"{what} {f['threads']} threads, batch 1. First token: of a prompt of {f['contexts'][0]} tokens. "
        f"Prefill: up to the first and the last depth. {memory[0].upper()}{memory[1:]}: at the "
        "last. A fixed loop beside the steps took "
        f"{loop['p10'] * 1e3:.1f} to {loop['p90'] * 1e3:.1f} ms (10th to 90th percentile): the machine's noise."
    )
    return "\n".join([head, "|---" * (len(f["contexts"]) + 5) + "|", *lines, "", f"{note} {source}"])


def depth_ratios() -> str:
    """Ours at 4 bits against each peer, by depth."""
    f, source = _result("depth_291m")
    at = {one["label"]: [d["step_ms"]["median"] for d in one["depths"]] for one in f["subjects"]}
    ours = at["liger, onnx int4"]
    head = f"| time of a token over `liger, onnx int4` | {' | '.join(f'{c:,}' for c in f['contexts'])} |"
    lines = [
        f"| {name} | {' | '.join(f'{a / b:.2f}' for a, b in zip(times, ours, strict=True))} |"
        for name, times in at.items()
        if not name.startswith("liger") or name == "liger, executorch int4"
    ]
    return "\n".join([head, "|---" * (len(ours) + 1) + "|", *lines, "", re.sub("`.*?`, ", "", source, count=1)])


def depth_bandwidth() -> str:
    """How much of the memory's speed our steps reach on a CPU."""
    f, source = _result("depth_291m")
    head = f"| bytes of the files in a step's time, over a plain read | {' | '.join(f'{c:,}' for c in f['contexts'])} |"
    lines = []
    for one in f["subjects"]:
        if one["label"].startswith("liger"):
            shares = [f"{d['read_bytes_s'] / f['read_bandwidth_bytes_s']:.2f}" for d in one["depths"]]
            lines.append(f"| {one['label']} | {' | '.join(shares)} |")
    note = (
        f"A plain read reached {f['read_bandwidth_bytes_s'] / 1e9:.1f} GB/s once, before the steps, and the machine's "
        "speed drifts. 10 % to 17 % of a file is the input embedding, of which a step reads one row: it reads that "
        "much less than the table says."
    )
    where = re.sub("`.*?`, ", "", source, count=1)
    return "\n".join([head, "|---" * (len(f["contexts"]) + 1) + "|", *lines, "", f"{note} {where}"])


def gpu_prefill() -> str:
    """One layer's prefill kernel beside flash-linear-attention and softmax attention."""
    f, source = _result("gpu_prefill")
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
    f, source = _result("gpu_layer")
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
    f, source = _result("gpu_check")
    lines = []
    for dtype in (name for name in ("float32", "bfloat16", "float16") if name in f["check"]):
        rows = f["check"][dtype]
        passed = sum(row[2] for row in rows.values())
        key = "logits of 64 steps" if dtype == "float32" else "mean divergence (KL, nats a token)"
        lines.append(f"| {dtype} | {passed} of {len(rows)} | {key}: {rows[key][0]:.1e} |")
    moved = "equal" if f["check"]["tokens_of_a_moved_state_equal"] else "different"
    note = f"Greedy tokens of a state that went from the GPU to the CPU and back: {moved}."
    return "\n".join(
        ["| CUDA package, embedded model | checks that pass | |", "|---|---|---|", *lines, "", f"{note} {source}"]
    )


def gpu_step() -> str:
    """A step on a GPU by position, ours and Hugging Face's."""
    f, source = _result("gpu_step_1b")
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


def native() -> str:
    """liger-run and the Python session on each runtime."""
    f, source = _result("native")
    lines = []
    for target, row in f["targets"].items():
        cells = [f"{row[name]['step_ms']:.3f} ms | {row[name]['start_s']:.2f} s" for name in ("liger-run", "Python")]
        lines.append(f"| {target} | {' | '.join(cells)} | {row['python_over_native']:.2f} |")
    sizes = ", ".join(f"`{name}` {size / 1000:.0f} kB" for name, size in f["bytes"].items())
    head = "| embedded model, one thread | a step | start to second token | Python: a step | start | step, ratio |"
    return "\n".join([head, "|---|---|---|---|---|---|", *lines, "", f"{sizes}. {source}"])


def state() -> str:
    """State sizes of Llama-3-8B's shape, computed from StateSpec."""
    shape = ModelShape(layers=32, query_heads=32, kv_heads=8, head_dim=128)
    configs = {name: LigerConfig(structure=name) for name in STRUCTURES}
    configs["gla with softmax layers 7, 15, 23, 31"] = LigerConfig(softmax_layers=(7, 15, 23, 31))
    sizes: dict[int, list[str]] = {}
    for name, config in configs.items():
        sizes.setdefault(StateSpec.of(config, shape).nbytes(), []).append(name)
    lines = [f"| {', '.join(names)} | {size / 2**20:.0f} MiB |" for size, names in sizes.items()]
    cache = 2 * shape.layers * shape.kv_heads * shape.head_dim * 2
    for tokens in (1024, 8192, 131072):
        lines.append(f"| bfloat16 KV cache at {tokens:,} tokens | {cache * tokens / 2**20:,.0f} MiB |")
    note = (
        "Computed from `StateSpec`: float32 throughout, window of 64 keys; gsa with 64 slots, "
        "lolcats with 64 features, softmax layers with 4,096 keys."
    )
    return "\n".join(["| Llama-3-8B shape, one sequence | memory |", "|---|---|", *lines, "", note])


def demo() -> str:
    """What `make demo` ends with."""
    f, source = _result("demo")
    names = {"base": "softmax base model", "converted": "converted to Liger-GLA", "tuned": "tuned by the demo"}
    lines = [f"| {label} | {f['bits_per_byte'][name]:.3f} |" for name, label in names.items()]
    note = f"Tuned on {f['training']['tokens']:,} tokens in {f['training']['seconds']:.0f} s. {source}"
    return "\n".join(["| demo, 60,000 held-out tokens | bits per byte |", "|---|---|", *lines, "", note])


def recovery_setup() -> str:
    """Base model and data of the recovery experiment."""
    f, _ = _result("recovery")
    base, settings = f["base"], f["settings"]
    rows = {
        "base model": f"Llama, {base['parameters'] / 1e6:.1f} million parameters, 8 layers, blocks of 1,024 tokens",
        "its training": f"{base['tokens'] / 1e6:.0f} million tokens, {base['minutes']} minutes on one {base['device']}",
        "corpus": f"Python sources of {', '.join(base['packages'])}: {base['train_bytes'] / 1e6:.0f} MB",
        "tuning": f"{settings['tokens'] / 1e6:g} million tokens an arm",
        "test": f"{settings['test_tokens']:,} tokens of held-out files",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items())])


def recovery() -> str:
    """One row an arm, best first."""
    f, source = _result("recovery")
    lines = []
    for name, row in sorted(f["arms"].items(), key=lambda item: item[1]["test"]):
        spread = f" ± {row['spread']:.4f}" if row["spread"] is not None else ""
        shares = [row["gap_recovered"], row["recall"]["8"], row["recall"]["256"]]
        gap, near, far = (f"{share:.0%}" for share in shares)
        late = f"{row['buckets']['512-1023']:.3f}"
        lines.append(
            f"| {name} | {row['untuned']:.3f} | {row['test']:.4f}{spread} | {gap} | {late} | {near} | {far} "
            f"| {row['rate']:g} | {row['seeds']} |"
        )
    head = "| arm | untuned | tuned | gap recovered | at 512+ | recall, gap 8 | gap 256 | rate | seeds |"
    note = (
        "Loss in nats a token; ± is the standard deviation over seeds; gap recovered: the untuned window of weight 1 "
        f"is 0 %, softmax 100 %. Arms ran on one {f['base']['device']}; summarized by"
    )
    return "\n".join([head, "|---|---|---|---|---|---|---|---|---|", *lines, "", f"{note} {source}"])


def recovery_paired() -> str:
    """Differences between arms on the same seeds and blocks."""
    f, source = _result("recovery")
    lines = []
    for p in f["paired"]:
        errors = [f"{p[key]:.4f}" if p[key] is not None else "" for key in ("error_over_seeds", "error_over_blocks")]
        lines.append(f"| {p['arm']} minus {p['minus']} | {p['difference']:+.4f} | {errors[0]} | {errors[1]} |")
    head = "| paired difference of test loss | nats | standard error over seeds | over blocks |"
    return "\n".join([head, "|---|---|---|---|", *lines, "", source])


TABLES: dict[str, Callable[[], str]] = {
    table.__name__: table
    for table in (
        parity,
        tiny,
        demo,
        quant,
        depth_tiny,
        depth_291m,
        depth_ratios,
        depth_bandwidth,
        depth_tiny_cuda,
        executorch_profile,
        gpu_finetune,
        gpu_finetune_two,
        gpu_sequence,
        gpu_step,
        gpu_prefill,
        gpu_layer,
        gpu_check,
        native,
        drift,
        memory_1b,
        memory_3b,
        memory_1b_executorch,
        state,
        recovery,
        recovery_setup,
        recovery_paired,
    )
}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def render(text: str) -> str:
    """Every `<!-- table: NAME -->` block filled."""
    pattern = re.compile(r"<!-- table: (\w+) -->\n.*?<!-- /table -->", re.DOTALL)
    return pattern.sub(lambda m: f"<!-- table: {m[1]} -->\n{TABLES[m[1]]()}\n<!-- /table -->", text)


def main() -> int:
    """0 when every page is (now) what the JSON says."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if "--check" not in sys.argv:
            page.write_text(render(text), encoding="utf-8")
        elif render(text) != text:
            print(f"{page.name} does not match benchmarks/results: run python -m benchmarks.render", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
