"""Draws up what each way to synchronize costs in loss: python benchmarks/frontier.py [--write]

`benchmarks/run.py frontier-cnn`, `frontier-gpt` and `frontier-vit` make the records. For every row, the learning rate
is that with the least loss on seed 10 after 2,000 steps. Its loss is the mean over seeds 0, 1 and 2 at this rate, or,
after 2,000 steps, that of seed 10 where these seeds are missing. Long runs have a table of their own. `--write` writes
the table of the recipe `auto`, src/abtrain/recipes/frontier.json: the loss above that of `ddp` after 2,000 steps, in
the mean over those models and optimizers for which all rows are there.
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
OTHERS = {
    "frontier-cnn": ("fashion-cnn-rates",),
    "frontier-gpt": ("pysrc-gpt-settings",),
    "frontier-vit": ("fashion-vit-settings",),
}
"""For each benchmark, others with runs of the same commands, under AdamW."""
SEARCHED, LENGTHS = 2000, (2000, 6000)
RATE_SEED, SEEDS = 10, (0, 1, 2)
WIRE = "ternary"


class Measured(NamedTuple):
    """The results of a row at its best learning rate: means over runs, and the standard deviation of the loss."""

    rate: str
    loss: float
    spread: float | None
    top1: float | None
    share: float
    runs: int


def records_of(benchmark: str, row: str, steps: int, seed: int) -> Iterator[tuple[str, Record]]:
    """Yields the learning rates at which a row was run with a seed, each with its record."""
    task, lines = BENCHMARKS[benchmark]
    for label, arguments in lines.items():
        name, _, rate = label.rpartition(", ")
        command = f"{arguments} --task {task} --steps {steps} --workers 4 --seed {seed}"
        record = _record(benchmark, command) if name == row else None
        if record is not None:
            yield rate, record


def _record(benchmark: str, command: str) -> Record | None:
    # AdamW is the default of `abtrain train`, so other benchmarks do not name it.
    names = {benchmark: command} | dict.fromkeys(OTHERS[benchmark], command.replace(" --optimizer adamw", ""))
    found = (RecordedRun(FOLDER / f"{name}.jsonl", arguments).record for name, arguments in names.items())
    return next((record for record in found if record is not None), None)


def measured(benchmark: str, row: str, steps: int) -> Measured | None:
    """Returns the results of a row after so many steps; None if it was not run."""
    tried = dict(records_of(benchmark, row, SEARCHED, RATE_SEED))
    if not tried:
        return None
    rate = min(tried, key=lambda one: tried[one]["loss"])
    records = [record for seed in SEEDS for at, record in records_of(benchmark, row, steps, seed) if at == rate]
    if steps == SEARCHED and not records:
        records = [tried[rate]]
    if not records:
        return None
    tops = [record["top1"] for record in records if record["top1"] is not None]
    losses = [record["loss"] for record in records]
    share = statistics.fmean(record["payload_ratio"] for record in records)
    top1, spread = statistics.fmean(tops) if tops else None, statistics.stdev(losses) if len(losses) > 1 else None
    return Measured(rate, statistics.fmean(losses), spread, top1, share, len(records))


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
    for benchmark in OTHERS:
        for steps in LENGTHS:
            results = _results(benchmark, steps)
            _print(benchmark, steps, results)
            for optimizer, own in results.items():
                if steps == SEARCHED and own.keys() >= choices().keys():
                    whole[f"{benchmark} {optimizer}"] = own
    if options.write:
        if not whole:
            raise SystemExit("no model and optimizer has all rows: run benchmarks/run.py frontier-cnn --seeds 10 first")
        TABLE.write_text(_table(whole))


def _results(benchmark: str, steps: int) -> dict[str, dict[str, Measured]]:
    """Returns the results of all rows, by optimizer and by the row's label without the optimizer."""
    rows = list(dict.fromkeys(label.rpartition(", ")[0] for label in BENCHMARKS[benchmark][1]))
    results = dict[str, dict[str, Measured]]()
    for optimizer in OPTIMIZERS:
        own = [row.removeprefix(f"{optimizer}, ") for row in rows if row.startswith(f"{optimizer}, ")]
        found = {label: measured(benchmark, f"{optimizer}, {label}", steps) for label in own}
        results[optimizer] = {label: result for label, result in found.items() if result is not None}
    return results


def _print(benchmark: str, steps: int, results: Mapping[str, Mapping[str, Measured]]) -> None:
    """Prints a table of all rows beside `ddp` with the same optimizer, and with AdamW, if this was run."""
    beside = results["adamw"].get("ddp")
    if beside is None:
        return
    print(f"\n{BENCHMARKS[benchmark][0]}, {steps} steps\n")
    print("| | rate | runs | top-1 | loss | above ddp | above ddp, AdamW | of DDP's payload |")
    print("|---|---|---|---|---|---|---|---|")
    for optimizer, rows in results.items():
        for label, row in rows.items():
            top1 = "-" if row.top1 is None else f"{row.top1:.2f}"
            loss = f"{row.loss:.4f}" + (f" ± {row.spread:.4f}" if row.spread is not None else "")
            own = f"{above(rows)[label]:+.2%}" if "ddp" in rows else "-"
            figures = (top1, loss, own, f"{row.loss / beside.loss - 1:+.2%}", f"1/{1 / row.share:.0f}")
            cells = (f"{label}, {optimizer}", row.rate, str(row.runs), *figures)
            print("| " + " | ".join(cells) + " |")


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
