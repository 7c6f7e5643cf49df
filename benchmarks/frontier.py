"""Draws up what each way to synchronize costs in loss: python benchmarks/frontier.py [--write]

`benchmarks/run.py frontier-cnn` and `frontier-gpt` make the records. For every row, the learning rate is that with the
least loss on seed 10. Its loss is the mean over seeds 0, 1 and 2 at this rate, or that of seed 10 where these seeds
are missing. `--write` writes the table of the recipe `auto`, src/abtrain/recipes/frontier.json: the loss above that
of `ddp`, in the mean over those models and optimizers for which all rows are there.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from lines import BENCHMARKS, OPTIMIZERS, ROUNDS
from records import FOLDER, Record, RecordedRun

TABLE = Path(__file__).resolve().parent.parent / "src" / "abtrain" / "recipes" / "frontier.json"
STEPS = {"frontier-cnn": 2000, "frontier-gpt": 2000}
RATE_SEED, SEEDS = 10, (0, 1, 2)
WIRE = "ternary"


class Measured(NamedTuple):
    """The results of a row at its best learning rate."""

    rate: str
    loss: float
    top1: float | None
    share: float
    runs: int


def records_of(benchmark: str, row: str, seed: int) -> Iterator[tuple[str, Record]]:
    """Yields the learning rates at which a row was run with a seed, each with its record."""
    task, lines = BENCHMARKS[benchmark]
    for label, arguments in lines.items():
        name, _, rate = label.rpartition(", ")
        command = f"{arguments} --task {task} --steps {STEPS[benchmark]} --workers 4 --seed {seed}"
        record = RecordedRun(FOLDER / f"{benchmark}.jsonl", command).record if name == row else None
        if record is not None:
            yield rate, record


def measured(benchmark: str, row: str) -> Measured | None:
    """Returns the results of a row; None if no run of it is recorded with seed 10."""
    tried = dict(records_of(benchmark, row, RATE_SEED))
    if not tried:
        return None
    rate = min(tried, key=lambda one: tried[one]["loss"])
    repeated = [record for seed in SEEDS for at, record in records_of(benchmark, row, seed) if at == rate]
    records = repeated or [tried[rate]]
    tops = [record["top1"] for record in records if record["top1"] is not None]
    loss, share = (statistics.fmean(record[name] for record in records) for name in ("loss", "payload_ratio"))
    return Measured(rate, loss, statistics.fmean(tops) if tops else None, share, len(records))


def choices() -> dict[str, dict[str, int | str]]:
    """Returns the options of `auto` for each row that it chooses from, by the row's label without the optimizer."""
    rows: dict[str, dict[str, int | str]] = {
        "ddp": {"every": 1, "wire": "fp32", "delay": 0},
        "ddp, bf16": {"every": 1, "wire": "bf16", "delay": 0},
    }
    for every, delay in ROUNDS:
        label = f"every {every}" + f", delay {delay}" * (delay > 0)
        rows[label] = {"every": every, "wire": WIRE, "delay": delay}
    return rows


def above(results: Mapping[str, Measured]) -> dict[str, float]:
    """Returns the loss of each row above that of `ddp`, as a share of it."""
    return {label: result.loss / results["ddp"].loss - 1 for label, result in results.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table of the recipe auto")
    options = parser.parse_args()
    whole: dict[str, dict[str, Measured]] = {}
    for benchmark in STEPS:
        for optimizer in OPTIMIZERS:
            rows = list(dict.fromkeys(label.rpartition(", ")[0] for label in BENCHMARKS[benchmark][1]))
            own = [row.removeprefix(f"{optimizer}, ") for row in rows if row.startswith(f"{optimizer}, ")]
            found = {label: measured(benchmark, f"{optimizer}, {label}") for label in own}
            results = {label: result for label, result in found.items() if result is not None}
            _print(benchmark, optimizer, results)
            if results.keys() >= choices().keys():
                whole[f"{benchmark} {optimizer}"] = results
    if options.write:
        if not whole:
            raise SystemExit("no model and optimizer has all rows: run benchmarks/run.py frontier-cnn --seeds 10 first")
        TABLE.write_text(_table(whole))


def _print(benchmark: str, optimizer: str, results: Mapping[str, Measured]) -> None:
    if "ddp" not in results:
        return
    print(f"\n{BENCHMARKS[benchmark][0]}, {STEPS[benchmark]} steps, {optimizer}\n")
    print("| | rate | runs | top-1 | loss | above ddp | of DDP's payload |\n|---|---|---|---|---|---|---|")
    for label, share in above(results).items():
        row = results[label]
        top1 = "-" if row.top1 is None else f"{row.top1:.2f}"
        print(f"| {label} | {row.rate} | {row.runs} | {top1} | {row.loss:.4f} | {share:+.2%} | 1/{1 / row.share:.0f} |")


def _table(whole: Mapping[str, Mapping[str, Measured]]) -> str:
    """Returns the content of the table of `auto`, one row a line."""
    losses = {case: above(results) for case, results in whole.items()}
    rows = []
    for label, chosen in choices().items():
        payload = statistics.fmean(results[label].share for results in whole.values())
        cost = statistics.fmean(case[label] for case in losses.values())
        # Payload is rounded, since the small messages of a run depend on its length.
        bits = round(32 * payload * int(chosen["every"]), 1)
        rows.append(json.dumps({**chosen, "bits": bits, "above": round(max(cost, 0.0), 4)}))
    return json.dumps({"measured": sorted(whole)})[:-1] + ', "rows": [\n' + ",\n".join(rows) + "\n]}\n"


if __name__ == "__main__":
    main()
