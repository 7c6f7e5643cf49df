"""Runs a benchmark and prints its table: python benchmarks/run.py fashion-cnn [--steps 2000] [--seeds 0 1 2]

A benchmark is a list of `abtrain train` commands (see `lines.py`). Each is run once for every seed, one after the
other, since runs share the cores. The result of a run is a line of benchmarks/results/BENCHMARK.jsonl, with the commit
and the versions that it was made with. A run with a line there is not repeated, so the same command continues a
benchmark that was stopped. `--table` prints the results that exist and runs nothing. `--frontier` orders the table by
payload, and prints a label in bold if no recipe with a smaller payload has a lower loss.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

from lines import BENCHMARKS
from records import FOLDER, Record, RecordedRun, in_short, keep, say

from abtrain.commands.runs.folder_run import run_once

KEPT = ("top1", "loss", "payload_ratio", "payload_bytes", "compression", "seconds", "weights_digest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=sorted(BENCHMARKS))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--only", nargs="+", help="labels to run; all by default")
    parser.add_argument("--table", action="store_true", help="print the results that exist, run nothing")
    parser.add_argument("--frontier", action="store_true", help="order by payload, with the best at each in bold")
    options = parser.parse_args()
    task, lines = BENCHMARKS[options.benchmark]
    chosen = {label: arguments for label, arguments in lines.items() if not options.only or label in options.only}
    file = FOLDER / f"{options.benchmark}.jsonl"
    common = f"--task {task} --steps {options.steps} --workers {options.workers}"
    runs = {
        label: [RecordedRun(file, f"{arguments} {common} --seed {seed}") for seed in options.seeds]
        for label, arguments in chosen.items()
    }
    if not options.table:
        # Labels may share a run.
        planned = list(dict.fromkeys(run for own in runs.values() for run in own))
        run_once(planned, nullcontext(_run), say, in_short)
    records = {label: [run.record for run in own] for label, own in runs.items()}
    found = {label: there for label, own in records.items() if (there := [record for record in own if record])}
    if options.frontier:
        found = _frontier(found)
    seeds = ", ".join(map(str, options.seeds))
    print(f"\n{task}, {options.steps} steps, {options.workers} workers, seeds {seeds}\n")
    print("| | runs | top-1 (std) | loss (std) | of DDP's payload | compression |\n|---|---|---|---|---|---|")
    print("\n".join(_row(label, results) for label, results in found.items()))


def _run(run: RecordedRun) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "abtrain", "train", *shlex.split(run.arguments), "--out", str(out)]
        ended = subprocess.run(command, capture_output=True, text=True)
        if ended.returncode:
            sys.exit(f"exit code {ended.returncode}: {shlex.join(command)}\n{ended.stderr}")
        result = json.loads((out / "result.json").read_text())
    ranks = [entry["ranks"] for entry in result["ranks"]]
    record = {
        "arguments": run.arguments,
        **{name: result[name] for name in KEPT},
        "last_ranks": ranks[-1] if ranks else {},
        "versions": result["versions"],
        "hardware": result["hardware"],
    }
    keep(run.file, record)


def _frontier(found: dict[str, list[Record]]) -> dict[str, list[Record]]:
    """Orders from the largest payload to the smallest; a label is bold if no smaller payload has a lower loss."""
    lowest, ordered = float("inf"), {}
    for label, results in sorted(found.items(), key=lambda entry: _mean(entry[1], "payload_ratio")):
        loss = _mean(results, "loss")
        ordered[f"**{label}**" if loss < lowest else label] = results
        lowest = min(lowest, loss)
    return dict(reversed(ordered.items()))


def _mean(results: list[Record], name: str) -> float:
    return statistics.fmean(result[name] for result in results)


def _row(label: str, results: list[Record]) -> str:
    tops = [result["top1"] for result in results if result["top1"] is not None]
    ratio = _mean(results, "payload_ratio")
    cells = (
        label,
        str(len(results)),
        _spread(tops, 2) if tops else "-",
        _spread([result["loss"] for result in results], 4),
        f"{ratio:.3%} (1/{1 / max(ratio, 1e-9):.0f})",
        f"{_mean(results, 'compression'):.2f}",
    )
    return f"| {' | '.join(cells)} |"


def _spread(values: list[float], digits: int) -> str:
    """The mean, with the sample's standard deviation if there are several values."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ({statistics.stdev(values):.{digits}f})" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
