"""What `make demo` came to: run it, then

python -m benchmarks.demo
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.report import ROOT, write

NAMES = {"base": "base", "demo/converted": "converted", "demo/tuned": "tuned", "liger": "embedded"}


def main() -> int:
    quality = json.loads((ROOT / "demo" / "quality.json").read_text())
    lines = map(json.loads, (ROOT / "demo" / "adapter" / "metrics.jsonl").read_text().splitlines())
    last = list(lines)[-1]
    bits = {NAMES.get(path, NAMES.get(Path(path).name, path)): value for path, value in quality.items()}
    training = {
        "tokens": last["tokens"],
        "seconds": last["train_runtime"],
        "tokens_per_second": last["tokens_per_second"],
    }
    write("demo", "make demo; python -m benchmarks.demo", {"bits_per_byte": bits, "training": training})
    return 0


if __name__ == "__main__":
    sys.exit(main())
