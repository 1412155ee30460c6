"""Python's own standard library as a corpus: files to train on, and files that no training here ever sees.

    python examples/stdlib_corpus.py --out corpus/

Writes `train.jsonl` and `held_out.jsonl`, a record {"text": ...} a file. The split goes by the hash of a file name; the
embedded model (`examples/train_tiny.py`) was trained with the same one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sysconfig
from pathlib import Path

STDLIB = Path(sysconfig.get_paths()["stdlib"])


def read_corpus(root: Path) -> tuple[list[str], list[str]]:
    """Python sources below `root`: (training files, held-out files). One file in twenty is held out, by its name."""
    train, held_out = [], []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if "site-packages" in name or name.startswith(("encodings/", "pydoc_data/")):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        bucket = hashlib.sha256(name.encode()).digest()[0] % 20
        (train if bucket else held_out).append(text)
    return train, held_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, default=STDLIB, help="folder of Python sources (the standard library)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, texts in zip(("train", "held_out"), read_corpus(args.corpus), strict=True):
        lines = (json.dumps({"text": text}) + "\n" for text in texts if text.strip())
        (args.out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
