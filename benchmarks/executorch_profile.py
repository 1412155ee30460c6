"""Where an ExecuTorch program's step spends its time (ETDump), and what it keeps after 20,000 of them.

    python -m benchmarks.executorch_profile BUNDLE [--threads 1,2]

Each number of threads in a process of its own. Growth is measured on the embedded model, without the profile.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import liger_deploy as ld
from benchmarks import report
from liger_deploy.bench.worker import resident
from liger_deploy.bundle import Bundle

STEPS, MANY = 40, 20_000


def profile(bundle: Path, threads: int) -> dict[str, Any]:
    """Milliseconds of a step by kind of operator, the mean of `STEPS` steps; delegated or not."""
    import executorch.kernels.quantized  # noqa: F401  (registers its operators)
    import torch
    from executorch.devtools import Inspector
    from executorch.extension.pybindings import portable_lib

    portable_lib._unsafe_reset_threadpool(threads)
    module = portable_lib._load_for_executorch(str(bundle / "model.pte"), None, True, 0)
    tensors = Bundle.open(bundle, checksums=False).manifest.graph.state
    state = [torch.zeros(1, *tensor.shape, dtype=getattr(torch, tensor.dtype)) for tensor in tensors]
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        _, *state = module.run_method("decode", (torch.tensor([5]), *state))
        seconds.append(time.perf_counter() - start)
    with tempfile.NamedTemporaryFile(suffix=".etdp") as file:
        module.write_etdump_result_to_file(file.name, "")
        (block,) = (b for b in Inspector(etdump_path=file.name).event_blocks if b.name == "Execute")
    kinds: dict[str, list[float]] = defaultdict(list)
    for event in block.events:
        if event.perf_data is not None:
            kinds[re.sub(r" #\d+$", "", event.name)].append(float(event.perf_data.avg))
    whole, inside = sum(kinds.pop("Method::execute")), sum(kinds["DELEGATE_CALL"])
    rows = sorted(((name, len(times), sum(times)) for name, times in kinds.items()), key=lambda row: -row[2])
    return {
        "threads": threads, "step_ms": whole, "delegates": len(kinds["DELEGATE_CALL"]), "in_delegates": inside / whole,
        "wall_ms": statistics.median(seconds) * 1e3,
        "kinds": [{"name": name, "count": count, "ms": ms} for name, count, ms in rows[:16]],
    }  # fmt: skip


def growth() -> dict[str, Any]:
    """Resident bytes of the embedded model's session after 2,000 steps and after `MANY` more."""
    with tempfile.TemporaryDirectory() as folder:
        session = ld.load_session(ld.export_bundle(None, "executorch", Path(folder) / "b"), threads=1)
        after = []
        for steps in (2_000, MANY):
            for step in range(steps):
                session.step([step % 500])
            after.append(resident())
    return {"steps": MANY, "before": after[0], "after": after[1], "grown": after[1] - after[0]}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--one", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(profile(arguments.bundle, arguments.one)))
        return
    profiles = []
    for threads in arguments.threads.split(","):
        call = [sys.executable, "-m", "benchmarks.executorch_profile", str(arguments.bundle), "--one", threads]
        profiles.append(json.loads(subprocess.run(call, check=True, capture_output=True, text=True).stdout))
    info = Bundle.open(arguments.bundle, checksums=False).manifest.model
    figures = {"quant": info.quant, "layers": info.layers, "profiles": profiles, "growth": growth()}
    report.write("executorch_profile", f"python -m benchmarks.executorch_profile {arguments.bundle.name}", figures)


if __name__ == "__main__":
    main()
