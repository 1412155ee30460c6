"""A conversation moves: begun on one runtime, saved, continued on another.

    python examples/move_chat.py BUNDLE_A BUNDLE_B "def add(a, b):"

Both bundles are of one checkpoint, for any two targets. Printed: what A would have gone on to say, and what B says.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import liger_deploy as ld
from liger_deploy.bundle import Bundle
from liger_deploy.generate import generate
from liger_deploy.text import Text


def main(first: str, second: str, prompt: str) -> None:
    text = Text(Bundle.open(first))
    here, there = ld.load_session(first), ld.load_session(second)
    begun = list(generate(here, text.encode(prompt), 20))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "chat.safetensors"
        here.state().save(file)  # the prompt and all tokens but the last
        there.load_state(ld.State.load(file))
        print(
            f"the state is {file.stat().st_size:,} bytes, after {len(begun)} tokens as after a million", file=sys.stderr
        )
    print(text.decode(begun + list(generate(here, begun[-1:], 20))))
    print("--")
    print(text.decode(begun + list(generate(there, begun[-1:], 20))))


if __name__ == "__main__":
    main(*sys.argv[1:])
