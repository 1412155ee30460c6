"""generate: text (or token ids) out of a bundle, on whatever runtime it was made for."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from liger_deploy import cli
from liger_deploy.bundle import Bundle
from liger_deploy.runtimes import load_session
from liger_deploy.runtimes.session import Session
from liger_deploy.sampling import Sampler, SamplingOptions
from liger_deploy.state import State
from liger_deploy.text import Stream, Text


def generate(
    session: Session,
    prompt: Sequence[int],
    max_new_tokens: int = 256,
    options: SamplingOptions | None = None,
    stop: Sequence[int] = (),
) -> Iterator[int]:
    """Yield token ids of one row that follow `prompt`, until a stop id (not yielded) or `max_new_tokens`.

    Afterwards the session has seen the prompt and every yielded token but the last.
    """
    sampler = Sampler(options or SamplingOptions())
    logits = session.prefill([list(prompt)])
    for left in range(max_new_tokens, 0, -1):
        token = sampler(logits[0])
        if token in stop:
            return
        yield token
        if left > 1:
            logits = session.step([token])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    parser.add_argument("--bundle", required=True, type=Path)
    parser.add_argument("--prompt", required=True, help="text, or token ids for a bundle without a tokenizer")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: the model's own)")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop-token", type=int, action="append", default=[], help="stop at this id too")
    parser.add_argument("--load-state", type=Path, help="continue from a saved state, of any runtime")
    parser.add_argument("--save-state", type=Path, help="save the state when done, with every token of the text in it")


def run(arguments: argparse.Namespace) -> int:
    """Run the verb: text on stdout as it comes, figures on stderr."""
    bundle = Bundle.open(arguments.bundle)
    text, defaults = Text(bundle), bundle.manifest.generation
    options = SamplingOptions(
        temperature=defaults.temperature if arguments.temperature is None else arguments.temperature,
        top_k=defaults.top_k if arguments.top_k is None else arguments.top_k,
        top_p=defaults.top_p if arguments.top_p is None else arguments.top_p,
        seed=arguments.seed,
    )
    prompt = text.encode(text.chat(arguments.prompt) if arguments.chat else arguments.prompt)
    session = load_session(bundle)
    if arguments.load_state:
        session.load_state(State.load(arguments.load_state))
        prompt = prompt[1:] if len(prompt) > 1 and prompt[0] == defaults.bos_token_id else prompt
    stream, new, start = Stream(text), list[int](), time.perf_counter()
    separator = "" if bundle.manifest.tokenizer else " "
    stop = [*defaults.eos_token_ids, *arguments.stop_token]
    for token in generate(session, prompt, arguments.max_new_tokens, options, stop):
        new.append(token)
        sys.stdout.write(stream.feed(token) + separator)
        sys.stdout.flush()
    seconds = time.perf_counter() - start
    print()
    print(f"[{len(prompt)} tokens in, {len(new)} out, {len(new) / seconds:.1f} tokens/s]", file=sys.stderr)
    if arguments.save_state:
        if new and len(new) == arguments.max_new_tokens:
            session.step([new[-1]])
        session.state().save(arguments.save_state)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the verb."""
    return cli.run("generate", "Generate text with a bundle.", add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
