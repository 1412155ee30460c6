"""The parity table of the embedded model's ONNX bundle.

python -m benchmarks.parity
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import liger_deploy as ld
from benchmarks import report
from liger_deploy.verify import verify


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = verify(ld.export_bundle(None, "onnx", Path(folder) / "b").path)
    if not all(row.passed for row in rows):
        raise SystemExit("parity fails: nothing written")
    report.write("parity", "python -m benchmarks.parity", [dataclasses.asdict(row) for row in rows])


if __name__ == "__main__":
    main()
