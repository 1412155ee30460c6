"""benchmark: which runtime is how fast at which depth on this machine, beside what a user would have used instead.

Each bundle and peer runs in a process of its own, pinned to the same cores. At each depth all of them take turns, a
block of steps each, so that the machine's noise falls on all alike. Depth is real: the state or cache has seen that
many tokens. What fails parity is not timed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from liger_deploy import cli
from liger_deploy.bench import machine
from liger_deploy.bench.peers import PEERS, prepare
from liger_deploy.bench.worker import Worker
from liger_deploy.bundle import Bundle, Manifest
from liger_deploy.errors import UserError
from liger_deploy.files import write_json

SLACK = 64  # tokens beyond the deepest context: the steps that are timed there


@dataclass(frozen=True)
class Plan:
    """What is measured, and how often.

    Attributes:
        contexts: depths in tokens, ascending; the first is also the prompt whose first token is timed.
        rounds, block: at each depth every subject takes `rounds` turns of `block` steps.
    """

    contexts: tuple[int, ...] = (128, 1024, 4096, 16384)
    threads: int = 1
    device: str = "cpu"
    rounds: int = 6
    block: int = 8

    @property
    def most(self) -> int:
        """Tokens that a conversation sees at most."""
        return self.contexts[-1] + self.rounds * (self.block + 1) + SLACK


@dataclass(frozen=True)
class Entry:
    """One subject before it runs: its name in tables, what loads it, and its files' bytes."""

    label: str
    kind: str
    path: Path
    python: str
    bytes: int
    ops: str = ""


@dataclass
class Measured:
    """One subject's figures: seconds, bytes; `depths` holds one record a context."""

    label: str
    file_bytes: int
    load_s: float
    first_token_s: float
    resident_at_load: int
    depths: list[dict[str, Any]] = field(default_factory=list)


def entries(
    bundles: Sequence[Path], peers: Sequence[str], base: Path | None, folder: Path, python: str, stock: bool
) -> list[Entry]:
    """Our bundles, each proved equal to PyTorch, and the peers, made from `base`.

    Raises:
        UserError: a bundle that has no passing `parity.json`, a bad bundle, a peer that cannot be made.
    """
    found = []
    for path in bundles:
        manifest = Bundle.open(path, checksums=False).manifest
        _check_parity(path)
        info = manifest.model
        bits = info.quant if info.quant != "none" else info.dtype
        bits += f" in groups of {info.group_size}" if info.group_size > 32 else ""
        bits += ", fused" if "operators" in manifest.graph.requires else ""
        label = f"liger, {manifest.target} {bits}"
        size = sum(file.size for file in manifest.files.values()) - _second_copies(manifest.files)
        found.append(Entry(label, "bundle", path, sys.executable, size))
        if stock and manifest.target == "onnx":
            found.append(Entry(f"{label}, stock operators", "bundle", path, sys.executable, size, ops="none"))
    if peers and base is None:
        raise UserError("--peers needs --base, the softmax checkpoint that their models are made from")
    for name in peers:
        assert base is not None
        path = prepare(name, base, folder, python)
        own = PEERS[name].other_python
        found.append(Entry(PEERS[name].label, name, path, python if own else sys.executable, _size(path)))
    names = [entry.label for entry in found]
    if len(set(names)) < len(names):
        found = [Entry(f"{e.label} ({e.path.name})", e.kind, e.path, e.python, e.bytes, e.ops) for e in found]
    return found


def _check_devices(manifests: dict[Path, Manifest], device: str) -> None:
    for path, manifest in manifests.items():
        made_for = manifest.graph.requires.get("device", "cpu")
        if made_for != device:
            raise UserError(f"{path} was made for {made_for}: one report has one device, and --device is {device}")


def _check_parity(path: Path) -> None:
    report = path / "parity.json"
    again = f"run liger-deploy verify --bundle {path} --model CHECKPOINT first: nothing is timed that is not proved"
    if not report.is_file():
        raise UserError(f"{path} has no parity.json: {again}")
    try:
        rows = json.loads(report.read_text(encoding="utf-8"))
        if not isinstance(rows, list):
            raise TypeError
        failed = [row["check"] for row in rows if not row["passed"]]
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{report} is not a parity table: {again}") from None
    if failed or not rows:
        raise UserError(f"{path} fails parity ({failed[0] if failed else 'no checks'}): {again}")


def _second_copies(files: dict[str, Any]) -> int:
    """genai.onnx is model.onnx in other words: one of them runs."""
    return files["genai.onnx"].size if "genai.onnx" in files else 0


def _size(path: Path) -> int:
    """Bytes of a model file, or of the weights and graphs in its folder."""
    if path.is_file():
        return path.stat().st_size
    kept = (".safetensors", ".onnx", ".data", ".bin")
    return sum(p.stat().st_size for p in path.iterdir() if p.suffix in kept)


def measure(found: Sequence[Entry], plan: Plan, vocab: int, base_bytes: float) -> dict[str, Any]:
    """Run all subjects; `base_bytes` is the read bandwidth, measured before, that steps are set against.

    Raises:
        UserError: a subject's process failed.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    workers: dict[str, Worker] = {}
    noise: list[float] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, transient=True, disable=not sys.stderr.isatty()) as progress:
            work = progress.add_task("loading", total=len(found) * (1 + len(plan.contexts) * (1 + plan.rounds)))
            measured = []
            for entry in found:
                progress.update(work, description=f"loading {entry.label}")
                worker = Worker(
                    entry.kind, entry.path, plan.threads, plan.device, plan.most, vocab, entry.python, entry.ops
                )
                workers[entry.label] = worker
                first = _first_token(worker, plan)
                loaded = worker.loaded
                measured.append(Measured(entry.label, entry.bytes, loaded["load_s"], first, loaded["resident"]))
                progress.advance(work)
            depth = 0
            for context in plan.contexts:
                depth = _at(context, depth, plan, measured, workers, noise, lambda: progress.advance(work))
    finally:
        for worker in workers.values():
            worker.close()
    return {
        "threads": plan.threads, "device": plan.device, "contexts": list(plan.contexts),
        "read_bandwidth_bytes_s": base_bytes, "reference_loop_s": machine.spread(noise), "cpu_flags": machine.flags(),
        "energy_counter": machine.energy() is not None, "subjects": [vars(one) for one in measured],
    }  # fmt: skip


def _first_token(worker: Worker, plan: Plan) -> float:
    """Seconds from a prompt of the first context to its logits, warm: the median of five after one."""
    seconds: list[float] = []
    for _ in range(6):
        seconds.append(worker.ask("prefill", plan.contexts[0])["seconds"][0])
        worker.ask("steps", 2)
        worker.ask("reset")
    return statistics.median(seconds[1:])


def _at(
    context: int, depth: int, plan: Plan, measured: list[Measured], workers: dict[str, Worker], noise: list[float],
    tick: Any,
) -> int:  # fmt: skip
    """Bring every subject from `depth` to `context`, and time its steps there; returns the depth afterwards."""
    fed = {}
    for name, worker in workers.items():
        fed[name] = worker.ask("prefill", context - depth)["seconds"][0]
        worker.ask("steps", 2)
        tick()
    records: dict[str, dict[str, Any]] = {name: {"seconds": [], "joules": 0.0} for name in workers}
    for _ in range(plan.rounds):
        noise.append(machine.reference_loop())
        for name, worker in workers.items():
            if len(workers) > 1:
                _let_others_end(plan)
            worker.ask("steps", 1)
            before = machine.energy()
            answer = worker.ask("steps", plan.block)
            after = machine.energy()
            records[name]["seconds"] += answer["seconds"]
            records[name] |= {"resident": answer["resident"], "peak": answer["peak"]}
            if before is not None and after is not None and after > before:
                records[name]["joules"] += after - before
            tick()
    for one in measured:
        record, worker = records[one.label], workers[one.label]
        times = machine.spread([s * 1e3 for s in record["seconds"]])
        at_0, at_most = worker.loaded["cache_at_0"], worker.loaded["cache"]
        one.depths.append({
            "context": context, "step_ms": times, "tokens_s": 1e3 / times["median"],
            "prefill_tokens": context - depth, "prefill_tokens_s": (context - depth) / fed[one.label],
            "resident": record["resident"], "peak": record["peak"],
            "cache_bytes": round(at_0 + (at_most - at_0) * context / plan.most),
            "read_bytes_s": one.file_bytes / times["median"] * 1e3,
            "joules_a_token": record["joules"] / len(record["seconds"]) or None,
            "seconds": record["seconds"],
        })  # fmt: skip
    return context + 2 + plan.rounds * (plan.block + 1)


def _let_others_end(plan: Plan) -> None:
    """Until the threads of the runtime before have stopped spinning; the memory does not rest meanwhile."""
    if plan.device == "cpu":
        machine.read_for(0.3, plan.threads)
    else:
        time.sleep(0.3)


def benchmark(
    bundles: Sequence[Path], peers: Sequence[str] = (), base: Path | None = None, plan: Plan | None = None,
    folder: Path | None = None, python: str = sys.executable, stock: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Time bundles and peers at each depth of `plan`; the figures as JSON values (seconds, bytes, milliseconds).

    Raises:
        UserError: a bundle that is not proved, a peer that is not there, a process that failed.
    """
    plan = plan or Plan()
    if not bundles:
        raise UserError("give at least one bundle with --bundle")
    manifests = {path: Bundle.open(path, checksums=False).manifest for path in bundles}
    _check_devices(manifests, plan.device)
    vocab = min(manifest.model.vocab_size for manifest in manifests.values())
    with tempfile.TemporaryDirectory() as temporary:
        found = entries(bundles, peers, base, folder or Path(temporary), python, stock)
        reads = machine.gpu_read_bandwidth() if plan.device == "cuda" else machine.read_bandwidth(plan.threads)
        return measure(found, plan, vocab, reads)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    parser.add_argument("--bundle", required=True, nargs="+", type=Path)
    parser.add_argument("--contexts", default="128,1024,4096,16384", help="depths in tokens, separated by commas")
    parser.add_argument("--peers", default="", help=f"any of {', '.join(PEERS)}, separated by commas")
    parser.add_argument("--base", type=Path, help="the softmax checkpoint that the peers' models are made from")
    parser.add_argument("--peer-folder", type=Path, help="where they are kept (default: made anew, thrown away)")
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter that has llama-cpp-python")
    parser.add_argument("--stock", action="store_true", help="ONNX bundles without this project's kernels too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of bundles and PyTorch's peers")
    parser.add_argument("--rounds", type=int, default=6, help="turns of each subject at each depth")
    parser.add_argument("--block", type=int, default=8, help="steps of a turn")
    parser.add_argument("--out", type=Path, help="FILE.json; FILE.html and FILE.png are written beside it")


def _plan(arguments: argparse.Namespace) -> Plan:
    try:
        contexts = tuple(int(word) for word in arguments.contexts.split(","))
    except ValueError:
        raise UserError(f"--contexts takes numbers separated by commas, not {arguments.contexts!r}") from None
    plan = Plan(contexts, arguments.threads, arguments.device, arguments.rounds, arguments.block)
    gap = 2 + plan.rounds * (plan.block + 1)
    if contexts[0] < 1 or any(b - a <= gap for a, b in itertools.pairwise(contexts)):
        raise UserError(f"--contexts must begin at 1 or more and grow by more than {gap}, the steps timed at each")
    if plan.threads < 1 or plan.rounds < 1 or plan.block < 1:
        raise UserError("--threads, --rounds and --block must be positive")
    return plan


def run(arguments: argparse.Namespace) -> int:
    """Run the verb: a table, and the files of --out."""
    from liger_deploy.bench import report

    plan, out = _plan(arguments), arguments.out
    if out:
        report.check_plots()
        if out.suffix != ".json":
            raise UserError(f"--out takes a file that ends in .json, not {out}")
    peers = [word.strip() for word in arguments.peers.split(",") if word.strip()]
    figures = benchmark(
        arguments.bundle, peers, arguments.base, plan, arguments.peer_folder, arguments.peer_python, arguments.stock
    )
    report.show(figures)
    if out:
        document = machine.document("liger-deploy benchmark " + _words(arguments), figures)
        write_json(out, document)
        report.write(document, out)
        print(f"written to {out}, {out.with_suffix('.html')} and {out.with_suffix('.png')}")
    return 0


def _words(arguments: argparse.Namespace) -> str:
    """The flags that say what was measured, without this machine's paths."""
    names = " ".join(path.name for path in arguments.bundle)
    words = [f"--bundle {names}", f"--contexts {arguments.contexts}", f"--threads {arguments.threads}"]
    if arguments.device != "cpu":
        words.append(f"--device {arguments.device}")
    if arguments.peers:
        words.append(f"--peers {arguments.peers} --base {arguments.base.name}")
    return " ".join([*words, *(["--stock"] if arguments.stock else [])])


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the verb."""
    return cli.run("benchmark", "Time bundles, and what else there is, by depth.", add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
