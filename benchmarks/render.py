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
    source = f"`{r['command']}`, {r['date']}, {r['machine']['cpu']}, {r['machine']['cores']} cores"
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
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join([f"| {f['steps']:,} steps on ONNX Runtime | |", "|---|---|", *lines, "", source])


def memory_1b() -> str:
    """Llama-3.2-1B's shape."""
    f, source = _result("memory_1b")
    lines = [
        f"| {name} | {f[name]['peak_resident_gb']:.2f} GB | {f[name]['seconds']:.0f} s |"
        for name in ("convert", "export", "run")
    ]
    head = f"| Llama-3.2-1B shape, checkpoint of {f['checkpoint_gb']:.2f} GB | peak memory | time |"
    note = f"The float32 bundle is {f['bundle_gb']:.2f} GB; weights are random. {source}"
    return "\n".join([head, "|---|---|---|", *lines, "", note])


def parity() -> str:
    """The embedded model on ONNX Runtime against PyTorch."""
    rows, source = _result("parity")
    lines = [f"| {r['check']} | {r['value']:.1e} | {r['limit']:g} | {r['detail']} |" for r in rows]
    return "\n".join(
        ["| ONNX Runtime against PyTorch | difference | limit | |", "|---|---|---|---|", *lines, "", source]
    )


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


TABLES: dict[str, Callable[[], str]] = {
    "parity": parity,
    "tiny": tiny,
    "drift": drift,
    "memory_1b": memory_1b,
    "state": state,
}


def render(text: str) -> str:
    """Every `<!-- table: NAME -->` block filled."""
    pattern = re.compile(r"<!-- table: (\w+) -->\n.*?<!-- /table -->", re.DOTALL)
    return pattern.sub(lambda m: f"<!-- table: {m[1]} -->\n{TABLES[m[1]]()}\n<!-- /table -->", text)


def main() -> int:
    """0 when the README is (now) what the JSON says."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    if "--check" in sys.argv:
        if render(text) != text:
            print("README.md does not match benchmarks/results: run python -m benchmarks.render", file=sys.stderr)
            return 1
        return 0
    readme.write_text(render(text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
