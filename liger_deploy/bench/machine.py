"""The machine a figure belongs to: what it is, how fast it reads memory, how much it trembles, what energy it used."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "liger-deploy", "torch", "transformers", "onnx", "onnxruntime", "onnxscript", "executorch",
    "onnxruntime-genai", "numpy",
)  # fmt: skip
_RAPL = Path("/sys/class/powercap/intel-rapl:0/energy_uj")  # the package's energy, where the system lets us read it


def document(command: str, figures: object) -> dict[str, object]:
    """A result with its date, commit, machine and versions; `figures` is what was measured."""
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "commit": os.environ.get("COMMIT") or _commit(),  # the variable serves a machine that has no git history
        "machine": {"cpu": cpu(), "cores": os.cpu_count(), "python": platform.python_version()} | _gpu(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "figures": figures,
    }


def cpu() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def flags() -> list[str]:
    """The vector instructions among the processor's flags."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    words = next((line.split(":")[1].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return sorted(w for w in words if w.startswith(("avx", "amx", "fma", "asimd", "sve", "f16c")))


def read_bandwidth(threads: int, megabytes: int = 512) -> float:
    """Bytes a second that `threads` threads read from memory: the best of several dot products far beyond the cache.

    A runtime may read faster than this: numpy asks for less ahead.
    """
    parts = np.array_split(np.ones(megabytes << 18, np.float32), threads)
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(8):
            start = time.perf_counter()
            list(pool.map(lambda x: float(np.dot(x, x)), parts))
            best = max(best, sum(part.nbytes for part in parts) / (time.perf_counter() - start))
    return best


def read_for(seconds: float, threads: int, megabytes: int = 128) -> None:
    """Keep the memory as busy as a long answer would: after some rest it is slower, for tenths of a second."""
    parts, end = np.array_split(np.ones(megabytes << 18, np.float32), threads), time.perf_counter() + seconds

    def read(part: npt.NDArray[np.float32]) -> None:
        while time.perf_counter() < end:
            np.dot(part, part)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, parts))


def gpu_read_bandwidth() -> float:
    """Bytes a second that a sum over 4 GB reads on the GPU: the best of several."""
    import torch

    x, best = torch.ones(1 << 30, device="cuda"), 0.0
    for _ in range(8):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()  # type: ignore[no-untyped-call]
        x.sum()
        stop.record()  # type: ignore[no-untyped-call]
        stop.synchronize()  # type: ignore[no-untyped-call]
        best = max(best, x.nbytes / start.elapsed_time(stop) * 1e3)  # type: ignore[no-untyped-call]
    del x
    torch.cuda.empty_cache()
    return best


def reference_loop() -> float:
    """Seconds of a fixed piece of arithmetic: its spread over a run is the machine's noise."""
    x = np.arange(1 << 16, dtype=np.float64)
    start = time.perf_counter()
    for _ in range(40):
        x = np.sqrt(x * x + 1.0)
    return time.perf_counter() - start


def spread(samples: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    ordered = sorted(samples)
    at = [ordered[round(share * (len(ordered) - 1))] for share in (0.1, 0.9)]
    return {"median": statistics.median(ordered), "p10": at[0], "p90": at[1]}


def energy() -> float | None:
    """Joules on the processor's counter; None where there is none that can be read. It wraps around."""
    with contextlib.suppress(OSError, ValueError):
        return int(_RAPL.read_text()) / 1e6
    return None


def _commit() -> str:
    if not (ROOT / ".git").exists():
        return ""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    dirty = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return commit.stdout.strip() + ("+changes" if dirty else "")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _gpu() -> dict[str, str]:
    """The GPU's name, from the driver: asking torch would cost its import."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    with contextlib.suppress(OSError):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.strip():
            return {"gpu": done.stdout.splitlines()[0]}
    return {}
