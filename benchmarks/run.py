"""Runs a benchmark and prints its table: python benchmarks/run.py fashion-cnn [--steps 2000] [--seeds 0 1 2] [--out
DIR]

Each line of a benchmark is one `abtrain train` command, run once for every seed. A run whose result is there already is
not run again, so a benchmark that was stopped goes on where it was. Runs go one after the other: they share the cores.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

# name: (task, {label: arguments of `abtrain train`})
BENCHMARKS: dict[str, tuple[str, dict[str, str]]] = {
    "fashion-cnn": (
        "fashion-cnn",
        {
            "ddp": "ddp --lr 2e-3",
            "ab": "ab --lr 4e-3",
            "local_sgd": "local_sgd --lr 2e-3",
            "diloco": "diloco --lr 2e-3",
            "ab_outer": "ab_outer --lr 2e-3",
        },
    ),
    "learning-rates": (
        "fashion-cnn",
        {
            f"{recipe} {lr}": f"{recipe} --lr {lr}"
            for recipe in ("ddp", "ab", "diloco", "ab_outer")
            for lr in ("1e-3", "2e-3", "4e-3")
        },
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=sorted(BENCHMARKS))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--only", nargs="+", help="labels to run; all by default")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    options = parser.parse_args()
    task, lines = BENCHMARKS[options.benchmark]
    print(f"{task}, {options.steps} steps, {options.workers} workers, seeds {options.seeds}\n")
    print("| | top-1 (std) | loss | of DDP's payload | compression | seconds |\n|---|---|---|---|---|---|")
    for label, arguments in lines.items():
        if options.only and label not in options.only:
            continue
        common = f"--task {task} --steps {options.steps} --workers {options.workers}"
        results = [_result(f"{arguments} {common} --seed {seed}", label, seed, options.out) for seed in options.seeds]
        print(_row(label, results), flush=True)


def _result(arguments: str, label: str, seed: int, out: Path) -> dict:
    folder = out / f"{'_'.join(arguments.replace('/', '_').split())}"
    done = folder / "result.json"
    if not done.exists():
        command = [
            sys.executable,
            "-m",
            "abtrain",
            "train",
            *shlex.split(arguments),
            "--out",
            str(folder),
            "--overwrite",
        ]
        ended = subprocess.run(command, capture_output=True, text=True)
        if ended.returncode:
            sys.exit(f"{label}, seed {seed}: {shlex.join(command)}\n{ended.stderr}")
    return json.loads(done.read_text())


def _row(label: str, results: list[dict]) -> str:
    def mean(values: list[float]) -> float:
        return statistics.fmean(values)

    tops = [result["top1"] for result in results if result["top1"] is not None]
    ratio = mean([result["payload_ratio"] for result in results])
    cells = (
        label,
        f"{mean(tops):.2f} ({statistics.pstdev(tops):.2f})" if tops else "-",
        f"{mean([result['loss'] for result in results]):.4f}",
        f"{ratio:.3%} (1/{1 / max(ratio, 1e-9):.0f})",
        f"{mean([result['compression'] for result in results]):.2f}",
        f"{mean([result['seconds']['total'] for result in results]):.0f}",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
