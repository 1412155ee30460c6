"""`finetune` on two GPUs of one host (NCCL), copied and sharded, against one: `python -m benchmarks.finetune_gpus`.

The embedded model on this package's own source; all runs see the same tokens in the same steps, so the adapters agree
up to the order of sums.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks import report
from liger_deploy.export import EMBEDDED

LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def train(data: Path, out: Path, words: list[str], launch: list[str]) -> float:
    """Run the verb; seconds."""
    command = [sys.executable, *launch, "-m", "liger_deploy.finetune", "--model", str(EMBEDDED), "--data", str(data)]
    command += ["--out", str(out), "--max-length", "256", "--eval-fraction", "0", *words]
    start = time.perf_counter()
    subprocess.run([*command, "--max-tokens", str(20 * 8 * 256)], check=True)
    return time.perf_counter() - start


def main() -> None:
    """Command line."""
    figures: dict[str, object] = {"gpus": torch.cuda.device_count(), "steps": 20}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = folder / "text.txt"
        source = sorted(Path(report.ROOT / "liger_deploy").rglob("*.py"))
        data.write_text("\n\n".join(path.read_text() for path in source))
        runs = {
            "one": (["--batch", "4", "--accumulation", "2"], []),
            "two, copied": (["--batch", "4", "--accumulation", "1"], LAUNCH),
            "two, sharded": (["--batch", "4", "--accumulation", "1", "--fsdp"], LAUNCH),
        }
        adapters = {}
        for name, (words, launch) in runs.items():
            figures[f"seconds {name}"] = train(data, folder / name, words, launch)
            adapters[name] = load_file(folder / name / "adapter_model.safetensors")
        grown = [tensor for key, tensor in adapters["one"].items() if "lora_B" in key]  # zeros before training
        figures["smallest norm of a trained B"] = min(float(tensor.norm()) for tensor in grown)
        for name in ("two, copied", "two, sharded"):
            pairs = [(adapters[name][key], tensor) for key, tensor in adapters["one"].items()]
            worst = max(float((ours - theirs).norm() / theirs.norm()) for ours, theirs in pairs)
            figures[f"largest relative difference of a weight, {name}"] = worst
    report.write("gpu_finetune_two", "python -m benchmarks.finetune_gpus", figures)


if __name__ == "__main__":
    main()
