"""The embedded model's quality: bits per byte of held-out files under its base, converted and tuned forms.

python -m benchmarks.tiny [--max-tokens N]
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
from pathlib import Path

from benchmarks.report import ROOT, write
from liger_deploy.config import LigerConfig
from liger_deploy.convert import convert
from liger_deploy.evaluate import evaluate
from liger_deploy.export import EMBEDDED

sys.path.insert(0, str(ROOT / "examples"))
from stdlib_corpus import STDLIB, read_corpus
from train_tiny import ngram_bits_per_byte


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-tokens", type=int, default=0)
    args = parser.parse_args()
    train, held_out = read_corpus(STDLIB)
    train_bytes, test_bytes = ("".join(texts).encode() for texts in (train, held_out))
    with tempfile.TemporaryDirectory() as folder:
        data, converted = Path(folder) / "held_out.jsonl", Path(folder) / "converted"
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in held_out if text.strip()))
        convert(EMBEDDED.parent / "base", converted, LigerConfig())
        models = {"base": EMBEDDED.parent / "base", "converted": converted, "tuned": EMBEDDED}
        figures = {name: evaluate(path, str(data), max_tokens=args.max_tokens) for name, path in models.items()}
    figures["gzip"] = 8 * len(gzip.compress(test_bytes, 9)) / len(test_bytes)
    figures["byte_5gram"] = ngram_bits_per_byte(train_bytes, test_bytes)
    write("tiny", "python -m benchmarks.tiny", {"held_out_files": len(held_out), "bits_per_byte": figures})
    return 0


if __name__ == "__main__":
    sys.exit(main())
