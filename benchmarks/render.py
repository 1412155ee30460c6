"""Write the README's tables from the JSON that the benchmarks wrote; `--check` fails if a table was edited by hand.

python -m benchmarks.render [--check]
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable

from benchmarks.render_gpu import (
    gpu_check,
    gpu_finetune,
    gpu_finetune_two,
    gpu_layer,
    gpu_onnx,
    gpu_prefill,
    gpu_quant,
    gpu_sequence,
    gpu_step,
    gpu_throughput,
)
from benchmarks.report import ROOT, result
from liger_deploy.bench import report
from liger_deploy.config import LigerConfig
from liger_deploy.gates import STRUCTURES
from liger_deploy.state import ModelShape, StateSpec


def tiny() -> str:
    """Bits per byte of the embedded model."""
    f, source = result("tiny")
    names = {
        "gzip": "gzip -9",
        "byte_5gram": "byte 5-gram, interpolated",
        "base": "softmax base model",
        "converted": "converted to Liger-GLA",
        "tuned": "tuned with LoRA, merged",
    }
    lines = [f"| {label} | {f['bits_per_byte'][name]:.3f} |" for name, label in names.items()]
    return "\n".join(["| embedded model, held-out files | bits per byte |", "|---|---|", *lines, "", source])


def drift() -> str:
    """Rung 7."""
    f, source = result("drift")
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
    f, source = result(f"memory_{name}")
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
    rows, source = result("parity")
    lines = [f"| {r['check']} | {r['value']:.1e} | {r['limit']:g} | {r['detail']} |" for r in rows]
    return "\n".join(
        ["| ONNX Runtime against PyTorch | difference | limit | |", "|---|---|---|---|", *lines, "", source]
    )


def quant() -> str:
    """Speed and size at the 291M shape on one thread, divergence of the embedded model."""
    f, source = result("quant")
    lines = []
    for row in f["rows"]:
        if row["threads"] != 1:
            continue
        table = f["embedded"].get(row["quant"], {})
        divergence, wrong = (table.get(x) for x in ("mean divergence (KL, nats a token)", "another most likely token"))
        close = f"{divergence:.3f} | {wrong:.1%}" if table else "0 | 0 %"
        chosen = f["calibrated"].get(row["quant"], {}).get("mean divergence (KL, nats a token)")
        close += f" | {chosen:.3f}" if chosen else " |"
        speed = f"{row['ms_a_token']:.1f} ms | {row['speed_to_float32']:.1f}"
        prefill = f"{row['prefill_tokens_per_second']:.0f}"
        lines.append(f"| {row['quant']} | {row['bundle_mb']:.0f} MB | {speed} | {prefill} | {close} |")
    head = (
        "| `--quant` | bundle | a token | speed | prefill, tokens/s | KL, embedded model | another top token "
        "| KL with `--calibrate` |"
    )
    note = "291 million parameters, random weights, one thread, steps interleaved; KL in nats a token on text."
    return "\n".join([head, "|---" * 8 + "|", *lines, "", f"{note} {source}"])


def attention_op() -> str:
    """One node on ONNX Runtime in three forms."""
    f, source = result("attention_op")
    names = {
        "fused": "`liger::Attention`, this project's kernel",
        "contrib": "its body around com.microsoft.LinearAttention",
        "plain": "standard operators",
    }
    times = {(row["form"], row["tokens"]): row["us"] for row in f}
    counts = sorted({row["tokens"] for row in f})
    lines = []
    for form, name in names.items():
        cells = (f"{times[form, n]:,.0f} us | {times[form, n] / times['fused', n]:.1f}" for n in counts)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    heads = " | ".join(f"{n} token{'s' * (n > 1)} | over the first" for n in counts)
    note = "One layer of the 291M shape, Liger-GLA, one thread; the three give the same to"
    worst = max(row["difference"] for row in f)
    head = f"| one node | {heads} |"
    return "\n".join([head, "|---" * (1 + 2 * len(counts)) + "|", *lines, "", f"{note} {worst:.0e}. {source}"])


def executorch_profile() -> str:
    """Where an ExecuTorch step spends its time."""
    f, source = result("executorch_profile")
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


def executorch_operator() -> str:
    """This project's operator in an ExecuTorch program."""
    f, source = result("executorch_operator")
    lines = []
    for threads, by_name in f.items():
        whole, ours = by_name["xnnpack"], by_name["liger"]
        steps, prompts = ([whole[key], ours[key], ours[key] / whole[key]] for key in ("step_ms", "prefill_tokens_s"))
        lines.append(f"| {threads} | {steps[0]:.2f} ms | {steps[1]:.2f} ms | {steps[2]:.2f} | {prompts[2]:.2f} |")
    head = "| threads | step, `--backend xnnpack` | step, `--backend liger` | time, ratio | prompt's tokens/s, ratio |"
    note = "291 million parameters, random weights, int4."
    return "\n".join([head, "|---" * 5 + "|", *lines, "", f"{note} {source}"])


def _depth(name: str, what: str) -> str:
    """A row a subject, a column a depth: milliseconds a token; then time to the first token, prefill and memory."""
    f, source = result(f"depth_{name}")
    command = re.sub("_1_thread$", " --threads 1", name)
    source = re.sub("`.*?`", f"`python -m benchmarks.depth {command}`", source, count=1)
    depths = " | ".join(f"{c:,}" for c in f["contexts"])
    memory = report.memory(f)
    head = f"| ms a token at depth | {depths} | first token | prefill, tokens/s | {memory} | files |"
    lines = [f"| {' | '.join([*row[:-3], row[-2]])} |" for row in report.rows(f)]
    loop, plural = f["reference_loop_s"], "s" * (f["threads"] > 1)
    note = (
        f"{what} {f['threads']} thread{plural}, batch 1. First token: of a prompt of {f['contexts'][0]} tokens. "
        f"Prefill: up to the first and the last depth. {memory[0].upper()}{memory[1:]}: at the "
        "last. A fixed loop beside the steps took "
        f"{loop['p10'] * 1e3:.1f} to {loop['p90'] * 1e3:.1f} ms (10th to 90th percentile): the machine's noise."
    )
    return "\n".join([head, "|---" * (len(f["contexts"]) + 5) + "|", *lines, "", f"{note} {source}"])


def _ratios(name: str) -> str:
    """Ours at 4 bits against each peer, by depth."""
    f, source = result(f"depth_{name}")
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
    f, source = result("depth_291m")
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


def native() -> str:
    """liger-run and the Python session on each runtime."""
    f, source = result("native")
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
    f, source = result("demo")
    names = {"base": "softmax base model", "converted": "converted to Liger-GLA", "tuned": "tuned by the demo"}
    lines = [f"| {label} | {f['bits_per_byte'][name]:.3f} |" for name, label in names.items()]
    note = f"Tuned on {f['training']['tokens']:,} tokens in {f['training']['seconds']:.0f} s. {source}"
    return "\n".join(["| demo, 60,000 held-out tokens | bits per byte |", "|---|---|", *lines, "", note])


def recovery_setup() -> str:
    """Base model and data of the recovery experiment."""
    f, _ = result("recovery")
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
    f, source = result("recovery")
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
    f, source = result("recovery")
    lines = []
    for p in f["paired"]:
        errors = [f"{p[key]:.4f}" if p[key] is not None else "" for key in ("error_over_seeds", "error_over_blocks")]
        lines.append(f"| {p['arm']} minus {p['minus']} | {p['difference']:+.4f} | {errors[0]} | {errors[1]} |")
    head = "| paired difference of test loss | nats | standard error over seeds | over blocks |"
    return "\n".join([head, "|---|---|---|---|", *lines, "", source])


DEPTHS = {  # runs of `benchmarks.depth`, and what ran
    "tiny": "The embedded model, float32.",
    "291m": "291 million parameters, random weights.",
    "int4_1_thread": "The same model in 4 bits.",
    "int4": "The same model in 4 bits, its head in groups of 128.",
    "executorch": "291 million parameters, random weights.",
    "executorch_1_thread": "The same on one thread.",
    "tiny_cuda": "The embedded model, bfloat16.",
    "291m_cuda": "291 million parameters, random weights, bfloat16.",
}
RATIOS = {"depth_ratios": "291m", "depth_ratios_1_thread": "int4_1_thread", "depth_ratios_int4": "int4"}
TABLES: dict[str, Callable[[], str]] = {
    table.__name__: table
    for table in (
        parity,
        tiny,
        demo,
        quant,
        depth_bandwidth,
        attention_op,
        executorch_profile,
        executorch_operator,
        gpu_finetune,
        gpu_finetune_two,
        gpu_sequence,
        gpu_step,
        gpu_quant,
        gpu_throughput,
        gpu_prefill,
        gpu_layer,
        gpu_check,
        gpu_onnx,
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
TABLES |= {f"depth_{name}": functools.partial(_depth, name, what) for name, what in DEPTHS.items()}
TABLES |= {table: functools.partial(_ratios, name) for table, name in RATIOS.items()}
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
