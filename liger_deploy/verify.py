"""verify: prove that a bundle equals PyTorch, on logits, state and tokens, and that states move both ways."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from liger_deploy import cli
from liger_deploy.bundle import Bundle
from liger_deploy.errors import UserError
from liger_deploy.files import write_json
from liger_deploy.generate import generate
from liger_deploy.runtimes import load_session
from liger_deploy.runtimes.session import BaseSession
from liger_deploy.state import State
from liger_deploy.text import Text

# Relative to the largest absolute value. Two float32 implementations of one model differ by the order of their sums,
# a few 1e-6 a layer; the bound leaves room for depth and is far below what changes a token.
TOLERANCE = 1e-4
PROMPT = 300  # tokens of prompt: more than one prefill call on every target, and not a multiple of any chunk


@dataclass(frozen=True)
class Row:
    """One line of the parity table: `value` must not exceed `limit`."""

    check: str
    value: float
    limit: float
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether the bundle holds to the oracle here. NaN never does."""
        return bool(self.value <= self.limit)


def compare(session: BaseSession, oracle: BaseSession, prompt: Sequence[int], tokens: int = 256) -> list[Row]:
    """The parity table of `session` against `oracle`, two sessions of one model; both are reset.

    `prompt` is fed first, then `tokens` greedy tokens of the oracle.
    """
    session.reset()
    oracle.reset()
    ours, theirs = (x.prefill([list(prompt)]) for x in (session, oracle))
    rows = [Row(f"logits after a prompt of {len(prompt)}", _difference(ours, theirs), TOLERANCE)]
    rows.append(_split_row(session, prompt, theirs))
    rows += _state_rows("prompt", session.state(), oracle.state())
    after_prompt = oracle.fork()
    expected, worst = [], 0.0
    for _ in range(tokens):
        expected.append(int(theirs[0].argmax()))
        ours, theirs = (x.step([expected[-1]]) for x in (session, oracle))
        worst = max(worst, _difference(ours, theirs))
    rows.append(Row(f"logits of {tokens} steps", worst, TOLERANCE, "the worst step"))
    rows += _state_rows(f"{tokens} steps", session.state(), oracle.state())
    fresh = session.fork()
    fresh.reset()
    rows.append(_token_row(f"{tokens} greedy tokens", list(generate(fresh, prompt, tokens)), expected))
    rows.append(_move_row("state from PyTorch", after_prompt, session.fork(), expected))
    session.reset()
    session.prefill([list(prompt)])
    rows.append(_move_row("state to PyTorch", session, after_prompt.fork(), expected))
    return rows


# Mean divergence from the float32 model (nats a token), share of tokens whose most likely next one differs, and how far
# logits move when a prompt is cut elsewhere (activations are rounded to 8 bits in both cuts, but not alike).
QUANT_LIMITS = {
    "float16": (0.001, 0.02, 0.02),
    "bfloat16": (0.01, 0.08, 0.1),
    "int8": (0.01, 0.08, 0.1),
    "int4": (0.2, 0.35, 0.2),
}


def compare_quantized(session: BaseSession, oracle: BaseSession, text: Sequence[int], quant: str) -> list[Row]:
    """The table of a quantized or 16-bit bundle: how far from the float32 `oracle` it is on `text`, fed to both.

    Its states still move: handed to itself, a state continues to the bit; handed over from the oracle, within the
    divergence of the weights.
    """
    divergence, wrong, split = QUANT_LIMITS[quant]
    session.reset()
    oracle.reset()
    found, nats = [], [0.0, 0.0]
    middle = len(text) // 2
    for place, token in enumerate(text):
        if place == middle:
            halfway, handed = session.state(), oracle.state()
        pair = [_log_softmax(x.step([token])[0]) for x in (session, oracle)]
        found.append(pair)
        if place + 1 < len(text):
            nats = [sum_ - values[text[place + 1]] for sum_, values in zip(nats, pair, strict=True)]
    rows = [
        Row("mean divergence (KL, nats a token)", _divergence(found), divergence, f"{len(text)} tokens of text"),
        _top_row(found, wrong),
    ]
    gained = (nats[0] - nats[1]) / (len(text) - 1)
    rows.append(Row("loss gained (nats a token)", gained, divergence))
    whole = session.fork()
    whole.reset()
    rows.append(_split_row(session, text, whole.prefill([list(text)]), split))
    session.load_state(halfway)
    again = _log_softmax(session.step([text[middle]])[0])
    rows.append(Row("own state loaded again, next logits", float(np.abs(again - found[middle][0]).max()), 0.0))
    session.load_state(handed)
    after = [[_log_softmax(session.step([token])[0]), found[middle + i][1]] for i, token in enumerate(text[middle:])]
    rows.append(Row("state from PyTorch, mean divergence", _divergence(after), divergence))
    return rows


def _divergence(pairs: list[list[npt.NDArray[np.float64]]]) -> float:
    """Mean KL(oracle || session) of pairs of log-probabilities."""
    return float(np.mean([(np.exp(theirs) * (theirs - ours)).sum() for ours, theirs in pairs]))


def _top_row(pairs: list[list[npt.NDArray[np.float64]]], limit: float) -> Row:
    """Share of tokens whose most likely next one differs. Of a model that is never sure (random weights), any rounding
    changes it: its divergence alone is held to a limit."""
    sure = float(np.mean([np.exp(theirs.max()) for _, theirs in pairs]))
    value = float(np.mean([ours.argmax() != theirs.argmax() for ours, theirs in pairs]))
    return Row(
        "another most likely token", value, limit if sure > 0.05 else 1.0, f"mean largest probability {sure:.2g}"
    )


def _log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def _split_row(
    session: BaseSession, prompt: Sequence[int], whole: npt.NDArray[np.float32], limit: float = TOLERANCE
) -> Row:
    """One token, an odd number, the rest."""
    twin = session.fork()
    twin.reset()
    cuts = [0, *sorted({min(1, len(prompt) - 1), min(138, len(prompt) - 1)} - {0}), len(prompt)]
    for start, stop in itertools.pairwise(cuts):
        logits = twin.prefill([list(prompt[start:stop])])
    return Row("the prompt in uneven parts", _difference(logits, whole), limit)


def _state_rows(when: str, ours: State, theirs: State) -> list[Row]:
    """Worst difference of each kind of tensor over the layers; `length` exactly."""
    worst: dict[str, float] = {}
    for name, tensor in theirs.tensors.items():
        kind = name.rsplit(".", 1)[-1]
        worst[kind] = max(worst.get(kind, 0.0), _difference(ours.tensors[name], tensor))
    return [Row(f"state after the {when}: {k}", v, 0.0 if k == "length" else TOLERANCE) for k, v in worst.items()]


def _token_row(check: str, ours: list[int], theirs: list[int]) -> Row:
    wrong = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
    return Row(check, float(len(wrong)), 0.0, f"the first differing is number {wrong[0]}" if wrong else "all equal")


def _move_row(check: str, source: BaseSession, target: BaseSession, expected: list[int]) -> Row:
    """Greedy tokens of `target` after it took over the state of `source`."""
    target.load_state(source.state())
    tokens = [expected[0]]
    while len(tokens) < len(expected):
        tokens.append(int(target.step([tokens[-1]])[0].argmax()))
    return _token_row(f"{check}, then greedy tokens", tokens, expected)


def _difference(ours: npt.NDArray[np.float32], theirs: npt.NDArray[np.float32]) -> float:
    scale = np.abs(theirs).max() or 1.0
    return float(np.abs(ours.astype(np.float64) - theirs).max() / scale)


def verify(bundle: str | os.PathLike[str], model: str | os.PathLike[str] | None = None, tokens: int = 256) -> list[Row]:
    """Compare a bundle with the checkpoint it was made from; writes `parity.json` into the bundle.

    `model` may be left out for bundles of the embedded model.

    Raises:
        UserError: a bad bundle or checkpoint, or a checkpoint the bundle was not made from.
    """
    import torch

    from liger_deploy.export import EMBEDDED
    from liger_deploy.model.linearize import load_model
    from liger_deploy.runtimes.eager import EagerSession

    if tokens < 1:
        raise UserError(f"--tokens must be positive, not {tokens}")
    opened = Bundle.open(bundle)
    exact = load_model(model or EMBEDDED, torch.float32)
    expected, found = opened.manifest.model.fingerprint, EagerSession(exact).manifest.model.fingerprint
    if expected != found:
        which = f"{model} is" if model else "the embedded model is"
        raise UserError(f"{which} {found}, the bundle was made from {expected}: give its checkpoint with --model")
    info = opened.manifest.model
    precision = info.dtype if info.quant == "none" else info.quant
    session = load_session(opened)
    oracle = EagerSession(exact.to(opened.manifest.graph.requires.get("device", "cpu")))  # type: ignore[arg-type]
    if precision == "float32":
        rows = compare(session, oracle, _prompt(opened, PROMPT), tokens)
    else:
        rows = compare_quantized(session, oracle, _prompt(opened, PROMPT + tokens), precision)
    write_json(opened.path / "parity.json", [{**dataclasses.asdict(row), "passed": row.passed} for row in rows])
    return rows


def _prompt(bundle: Bundle, count: int) -> list[int]:
    """Real text where the bundle can read it (this file), else a fixed sequence of ids."""
    if bundle.manifest.tokenizer:
        return Text(bundle).encode(Path(__file__).read_text(encoding="utf-8"))[:count]
    random = np.random.default_rng(0)
    return [int(i) for i in random.integers(0, bundle.manifest.model.vocab_size, count)]


def show(rows: list[Row], title: str) -> None:
    """Print the parity table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for heading, justify in (
        ("check", "left"),
        ("difference", "right"),
        ("limit", "right"),
        ("", "left"),
        ("", "left"),
    ):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for row in rows:
        verdict = "[green]pass[/]" if row.passed else "[bold red]FAIL[/]"
        table.add_row(
            row.check, f"{row.value:.1e}" if row.limit else f"{row.value:g}", f"{row.limit:g}", verdict, row.detail
        )
    Console(width=None if sys.stdout.isatty() else 118).print(table)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    parser.add_argument("--bundle", required=True, type=Path)
    parser.add_argument("--model", type=Path, help="the checkpoint it was made from (default: the embedded tiny model)")
    parser.add_argument("--tokens", type=int, default=256, help="greedy tokens to compare")


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; 1 if any row fails."""
    rows = verify(arguments.bundle, arguments.model, arguments.tokens)
    show(rows, f"{arguments.bundle} against PyTorch eager, float32")
    failed = sum(not row.passed for row in rows)
    print(f"{len(rows) - failed} of {len(rows)} checks pass; written to {arguments.bundle / 'parity.json'}")
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the verb."""
    return cli.run("verify", "Prove that a bundle equals PyTorch.", add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
