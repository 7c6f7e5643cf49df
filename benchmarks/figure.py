"""Draws docs/accuracy-over-bytes.png, the figure of the README: python benchmarks/figure.py

Each point is the mean over seeds 0, 1 and 2 of the records of one row of `lines.py`: the small CNN on Fashion-MNIST, 4
workers, 2,000 steps. The records are lines of results/fashion-cnn.jsonl, results/fashion-cnn-rates.jsonl and
results/fashion-cnn-merges.jsonl.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from lines import BENCHMARKS
from records import FOLDER, RecordedRun

PAGE = Path(__file__).resolve().parent.parent / "docs" / "accuracy-over-bytes.png"
POINTS = (
    ("fashion-cnn", "ddp, 4e-3", "ddp"),
    ("fashion-cnn", "ab", "ab (the paper)"),
    ("fashion-cnn-rates", "local_sgd, 4e-3", "local_sgd"),
    ("fashion-cnn-rates", "powersgd, 4e-3", "powersgd"),
    ("fashion-cnn", "diloco, int4", "diloco, int4"),
    ("fashion-cnn-merges", "ab_outer", "ab_outer"),
    ("fashion-cnn-merges", "wire ternary:int4", "ab_outer, ternary:int4"),
)
"""Benchmark, row, and the name in the figure."""
OURS, OTHERS = "#c2410c", "#334155"


def mean(benchmark: str, row: str) -> tuple[float, float]:
    """Returns payload over that of DDP, and top-1 in percent, as means over the seeds."""
    task, lines = BENCHMARKS[benchmark]
    command = f"{lines[row]} --task {task} --steps 2000 --workers 4 --seed"
    runs = [RecordedRun(FOLDER / f"{benchmark}.jsonl", f"{command} {seed}").record for seed in (0, 1, 2)]
    records = [run for run in runs if run]
    if len(records) < len(runs):
        raise SystemExit(f"{benchmark}, {row}: records of seeds 0, 1 and 2 are needed; benchmarks/run.py makes them")
    payload, top1 = ([record[name] for record in records] for name in ("payload_ratio", "top1"))
    return statistics.fmean(payload), statistics.fmean(top1)


def main() -> None:
    figure, axes = plt.subplots(figsize=(7, 3.6), dpi=150)
    for benchmark, row, name in POINTS:
        payload, top1 = mean(benchmark, row)
        color = OURS if name.startswith("ab_outer") else OTHERS
        axes.scatter(payload, top1, color=color, zorder=3)
        left, below = name == "ddp", "ternary" in name
        offset = (-8, 4) if left else (0, -14) if below else (7, 4)
        axes.annotate(
            name, (payload, top1), offset, textcoords="offset points", ha="right" if left else "left", color=color
        )
    axes.set_xscale("log")
    axes.set_xlim(8e-4, 2)
    axes.set_ylim(91, 93)
    axes.set_xticks([0.001, 0.01, 0.1, 1], ["1/1000", "1/100", "1/10", "1"])
    axes.set_xlabel("bytes sent, over those of DDP")
    axes.set_ylabel("test accuracy in %")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(PAGE, metadata={"Software": None})


if __name__ == "__main__":
    main()
