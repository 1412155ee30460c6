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


def _memory(size: str, bundle: str) -> str:
    f, source = _result(f"memory_{size}")
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


def cpu_peers() -> str:
    """A row a runtime, a column a depth: milliseconds a token; then prefill and memory."""
    f, source = _result("cpu_peers")
    runtimes = list(dict.fromkeys(row["runtime"] for row in f["rows"]))
    contexts = sorted({row["context"] for row in f["rows"]})
    at = {(row["runtime"], row["context"]): row for row in f["rows"]}
    head = f"| 4 bits, 2 threads | {' | '.join(f'{c:,}' for c in contexts)} | prefill, tokens/s | resident |"
    lines = []
    for name in runtimes:
        times = " | ".join(f"{at[name, c]['ms_a_token']:.1f} ms" for c in contexts)
        first, last = at[name, contexts[1]], at[name, contexts[-1]]
        rates = f"{first['prefill_tokens_per_second']:.0f} to {last['prefill_tokens_per_second']:.0f}"
        lines.append(f"| {name} | {times} | {rates} | {last['resident_mb']:.0f} MB |")
    against = runtimes[2]
    ratios = " | ".join(f"{at[against, c]['ms_a_token'] / at[runtimes[0], c]['ms_a_token']:.2f}" for c in contexts)
    speed = [
        at[runtimes[0], c]["prefill_tokens_per_second"] / at[against, c]["prefill_tokens_per_second"] for c in contexts
    ]
    memory = at[against, contexts[-1]]["resident_mb"] / at[runtimes[0], contexts[-1]]["resident_mb"]
    lines.append(f"| *liger over {against}* | {ratios} | {speed[1]:.2f} to {speed[-1]:.2f} | {memory:.1f} |")
    note = (
        "Time a token at each depth of context; prefill up to the second depth and up to the last; resident memory at "
        "the last. 291 million parameters, random weights, batch 1, turns of 8 tokens."
    )
    return "\n".join([head, "|---" * (len(contexts) + 3) + "|", *lines, "", f"{note} {source}"])


def cpu_executorch() -> str:
    """ONNX Runtime and ExecuTorch at 4 bits: a row a runtime and number of threads."""
    f, source = _result("cpu_executorch")
    contexts = sorted({row["context"] for row in f["rows"]})
    names = {"liger": "ONNX Runtime", "liger, ExecuTorch": "ExecuTorch"}
    rows = {(row["threads"], row["runtime"], row["context"]): row for row in f["rows"]}
    head = f"| 4 bits | threads | {' | '.join(f'{c:,}' for c in contexts)} | prefill, tokens/s | resident |"
    lines = []
    for threads, name in dict.fromkeys((row["threads"], row["runtime"]) for row in f["rows"]):
        found = [rows[threads, name, c] for c in contexts]
        times = " | ".join(f"{row['ms_a_token']:.1f} ms" for row in found)
        rate, memory = found[-1]["prefill_tokens_per_second"], found[-1]["resident_mb"]
        lines.append(f"| {names[name]} | {threads} | {times} | {rate:.0f} | {memory:.0f} MB |")
    note = "Time a token at each depth; prefill up to the last. 291 million parameters, random weights, batch 1."
    return "\n".join([head, "|---" * (len(contexts) + 4) + "|", *lines, "", f"{note} {source}"])


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
    """liger-run and the Python session."""
    f, source = _result("native")
    lines = [f"| {name} | {row['step_ms']:.3f} ms | {row['start_s']:.2f} s |" for name, row in f["runtimes"].items()]
    sizes = ", ".join(f"`{name}` {size / 1000:.0f} kB" for name, size in f["bytes"].items())
    note = f"Python's step takes {f['python_over_native']:.2f} times as long, side by side. {sizes}."
    head = "| embedded model, ONNX Runtime, one thread | a step | start to second token |"
    return "\n".join([head, "|---|---|---|", *lines, "", f"{note} {source}"])


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
        cpu_peers,
        cpu_executorch,
        gpu_step,
        native,
        drift,
        memory_1b,
        memory_3b,
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
