"""100,000 steps of the embedded model on ONNX Runtime: is the last as fast, as small and as exact as the first?

    python -m benchmarks.drift

Feeds one token stream to an ONNX session and, at the end, to a float64 PyTorch session from 1,000 tokens before it on
(the state of 99,000 float32 steps moved over), and to a float64 session from the first token for the first 1,000. A
fixed numpy loop is timed beside every step: what changes there is the machine, not the model.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from tqdm import tqdm

import liger_deploy as ld
from benchmarks import report
from liger_deploy.export import EMBEDDED
from liger_deploy.runtimes.session import BaseSession


def worst(ours: list[np.ndarray], session: BaseSession, tokens: np.ndarray) -> float:
    """Largest relative difference of the logits over these steps."""
    theirs = [session.step([token]) for token in tokens]
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(ours, theirs, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    steps = parser.parse_args().steps
    edge = 1000
    with tempfile.TemporaryDirectory() as folder:
        ld.export_bundle(None, "onnx", Path(folder) / "b")
        session = ld.load_session(Path(folder) / "b")
    oracle = ld.EagerSession(ld.load_model(EMBEDDED, torch.float32).double())
    tokens = np.random.default_rng(0).integers(0, session.manifest.model.vocab_size, steps + edge)
    for token in tokens[:edge]:  # warm up
        session.step([token])
    session.reset()

    process, seconds, memory = psutil.Process(), np.empty(steps), []
    first, last, late_state = [], [], None
    machine, vector, matrix = np.empty(steps), np.ones(480, np.float32), np.ones((480, 192), np.float32)
    for i in tqdm(range(steps)):
        if i == steps - edge:
            late_state = session.state()
        start = time.perf_counter()
        logits = session.step([tokens[i]])
        seconds[i] = time.perf_counter() - start
        if not np.isfinite(logits).all():
            raise SystemExit(f"step {i} gave logits that are not finite")
        if i < edge:
            first.append(logits)
        elif i >= steps - edge:
            last.append(logits)
        start = time.perf_counter()
        for _ in range(20):
            vector @ matrix
        machine[i] = time.perf_counter() - start
        if i == edge or (i > edge and i % 5000 == 0):
            memory.append(process.memory_info().rss)
    first_error = worst(first, oracle, tokens[:edge])
    assert late_state is not None
    oracle.load_state(late_state)
    last_error = worst(last, oracle, tokens[steps - edge : steps])
    alone, same = session.fork(), tokens[steps - edge : steps]
    alone.reset()
    oracle.reset()
    fresh_error = worst([alone.step([token]) for token in same], oracle, same)
    block = min(10_000, steps // 2)
    parts = slice(edge, edge + block), slice(-block, None)
    medians = [float(np.median(seconds[part])) for part in parts]
    noise = float(np.median(machine[parts[1]]) / np.median(machine[parts[0]]))
    fresh = session.fork()
    fresh.reset()
    near, far = (np.empty(block) for _ in range(2))
    for i in tqdm(range(block), desc="interleaved"):
        for timed, times in ((fresh, near), (session, far)):
            start = time.perf_counter()
            timed.step([tokens[i]])
            times[i] = time.perf_counter() - start
    report.write(
        "drift",
        "python -m benchmarks.drift",
        {
            "steps": steps,
            "median_step_us_first_10k": round(medians[0] * 1e6, 1),
            "median_step_us_last_10k": round(medians[1] * 1e6, 1),
            "last_over_first": round(medians[1] / medians[0], 3),
            "fixed_loop_last_over_first": round(noise, 3),
            "interleaved_at_100k_over_at_0": round(float(np.median(far) / np.median(near)), 3),
            "resident_growth_bytes": max(memory) - memory[0],
            "worst_relative_error_first_1000": first_error,
            "worst_relative_error_last_1000": last_error,
            "worst_relative_error_same_1000_from_empty": fresh_error,
        },
    )


if __name__ == "__main__":
    main()
