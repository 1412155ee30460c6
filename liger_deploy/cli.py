"""What every verb shares: one parser, one way to fail."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence

from liger_deploy.errors import UserError

Add = Callable[[argparse.ArgumentParser], None]
Do = Callable[[argparse.Namespace], int]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        """One line instead of the usage text; exit code 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def run(verb: str, summary: str, add_arguments: Add, do: Do, argv: Sequence[str] | None) -> int:
    """Parse `argv` (None: the process's own) and run a verb. Bad input prints one line on stderr and returns 2."""
    parser = _Parser(prog=f"liger-deploy {verb}", description=summary)
    add_arguments(parser)
    return carry_out(verb, do, parser.parse_args(argv))


def carry_out(verb: str, do: Do, arguments: argparse.Namespace) -> int:
    """Run a verb whose arguments are parsed; fails as `run` does."""
    _silence_dependencies()
    try:
        return do(arguments)
    except UserError as error:
        print(f"liger-deploy {verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"liger-deploy {verb}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _silence_dependencies() -> None:
    """Load-time warnings of torch, torchao and transformers say nothing that a user of this tool can act on."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("torchao", "torch.onnx", "torch.utils._pytree", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
