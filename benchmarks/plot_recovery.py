"""docs/recovery.svg from benchmarks/results/recovery.json.

pip install matplotlib && python -m benchmarks.plot_recovery
"""

from __future__ import annotations

import json

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from benchmarks.report import RESULTS, ROOT

SHOWN = {
    "softmax + LoRA": "black",
    "Liger-GLA, every fourth layer softmax": "tab:green",
    "LoLCATs": "tab:purple",
    "Liger-mLSTM": "tab:orange",
    "Liger-GLA": "tab:red",
    "window, weight 1": "tab:blue",
}


def main() -> None:
    arms = json.loads((RESULTS / "recovery.json").read_text())["figures"]["arms"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), gridspec_kw={"width_ratios": [3, 2]})
    for name, color in SHOWN.items():
        buckets = arms[name]["buckets"]
        left.plot(list(buckets), list(buckets.values()), "o-", color=color, label=name, markersize=4)
    left.set(xlabel="position in the block (tokens)", ylabel="test loss (nats a token)")
    left.legend(fontsize=8)
    names = [name for name in arms if "no window" not in name]
    names.sort(key=lambda name: -arms[name]["test"])
    colors = [SHOWN.get(name, "lightgray") for name in names]
    right.barh(names, [arms[name]["gap_recovered"] for name in names], color=colors)
    right.set(xlabel="gap recovered")
    right.tick_params(axis="y", labelsize=7)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "recovery.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
