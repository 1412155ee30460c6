"""One subject in a process of its own, and the parent's handle to it.

The child answers a line of JSON to each line `prefill N`, `steps N` or `reset`: seconds and the resident set.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from liger_deploy.errors import UserError


class Worker:
    """A subject that was loaded; on a CPU pinned to the first `threads` cores."""

    def __init__(
        self, kind: str, path: Path, threads: int, device: str, most: int, vocab: int, python: str, ops: str = ""
    ) -> None:
        words = [kind, str(path), str(threads), device, str(most), str(vocab)]
        variables = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"} | (
            {"LIGER_ORT_OPS": ops} if ops else {}
        )
        root = str(Path(__file__).parents[2])
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))
        self.name = f"{kind} {path}"
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  (closed by `close`)
        self.process = subprocess.Popen(
            [python, "-m", "liger_deploy.bench.worker", *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=os.environ | variables,
        )  # fmt: skip
        self.loaded = self._answer()

    def ask(self, kind: str, count: int = 0) -> dict[str, Any]:
        """Seconds of each piece, and the resident set after it."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the answer says why
            self.process.stdin.write(f"{kind} {count}\n")
            self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        self._log.close()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):  # some runtimes print
                answer: dict[str, Any] = json.loads(line)
                return answer
        code = self.process.wait()
        self._log.seek(0)
        lines = self._log.read().strip().splitlines() or ["it said nothing"]
        raise UserError(f"{self.name} ended with code {code}: {lines[-1]}")


def serve(kind: str, path: Path, threads: int, device: str, most: int, vocab: int) -> None:
    """Load the subject and answer standard input."""
    if device == "cpu" and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:threads]))
    from liger_deploy.bench.subjects import load

    start = time.perf_counter()
    subject = load(kind, path, threads, device, most)
    say = {"load_s": time.perf_counter() - start, "resident": resident(device), "cache": subject.cache_bytes(most)}
    print(json.dumps(say | {"cache_at_0": subject.cache_bytes(0)}), flush=True)
    seen = 0
    for line in sys.stdin:
        what, count = line.split()
        tokens = [(17 * (seen + i)) % (vocab - 8) + 5 for i in range(int(count))]
        seconds, start = [], time.perf_counter()
        if what == "reset":
            subject.reset()
            seen = 0
        elif what == "prefill":
            subject.prefill(tokens)
            seconds.append(time.perf_counter() - start)
        else:
            for token in tokens:
                start = time.perf_counter()
                subject.step(token)
                seconds.append(time.perf_counter() - start)
        seen += len(tokens)
        print(json.dumps({"seconds": seconds, "resident": resident(device), "peak": peak(device)}), flush=True)


def resident(device: str = "cpu") -> int:
    """Bytes that this process holds now: of the machine's memory, or of the GPU's (what PyTorch's allocator holds)."""
    if device == "cuda":
        import torch

        return torch.cuda.memory_reserved()
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak(device: str = "cpu") -> int:
    """The most bytes that this process ever held there."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_reserved()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """The child."""
    parser = argparse.ArgumentParser()
    for name, kind in (("kind", str), ("path", Path), ("threads", int), ("device", str), ("most", int), ("vocab", int)):
        parser.add_argument(name, type=kind)
    serve(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
