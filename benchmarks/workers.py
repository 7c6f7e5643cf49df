"""Trains a small GPT with 1 to 64 simulated workers: python benchmarks/workers.py [--only ROW...] [--seeds 0 1 2]

The model is the byte-level GPT of task `pysrc-gpt` with 0.14 M parameters: 2 layers of width 64. Workers are threads of
this process, which compute the numbers that separate processes would (`abtrain.commands.train.simulate`). A row is run
at each of its learning rates. The result of a run is a line of results/workers.jsonl, and a run with a line there is
not repeated. `--table` prints the results that exist and runs nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
from contextlib import nullcontext
from typing import NamedTuple

import torch
from records import FOLDER, Record, RecordedRun, in_short, keep, say

from abtrain.commands.runs.folder_run import run_once
from abtrain.commands.tasks import models
from abtrain.commands.tasks.choices import OptimizerName
from abtrain.commands.tasks.task import TASKS
from abtrain.commands.train.config import TrainConfig, resolve
from abtrain.commands.train.simulate import simulate

TASK, FILE = "pysrc-gpt-small", FOLDER / "workers.jsonl"
GLOBAL_BATCH, OWN_BATCH = 64, 16
KEPT = ("loss", "payload_ratio", "weights_digest")


class Row(NamedTuple):
    """A recipe, and the workers that train with it.

    Attributes:
        batch_size: the samples of a worker in a step.
        rates: the learning rates to try.
    """

    recipe: str
    workers: int = 1
    batch_size: int = GLOBAL_BATCH
    optimizer: OptimizerName = "muon"
    rates: tuple[str, ...] = ("8e-3", "16e-3", "32e-3")


def rounds(every: int) -> str:
    return f"local_sgd:every={every},wire=ternary"


def outer(momentum: float, lr: float = 1.0) -> str:
    return f"diloco:every=20,outer_lr={lr},outer_momentum={momentum}"


ROWS = {
    "1 worker": Row("ddp"),
    "1 worker, AdamW": Row("ddp", optimizer="adamw", rates=("4e-3", "8e-3", "16e-3")),
    **{f"1 worker, outer 1, {momentum}": Row(outer(momentum)) for momentum in (0.5, 0.8)},
    "1 worker, outer 0.7, 0.9": Row(outer(0.9, 0.7), rates=("4e-3", "8e-3", "16e-3")),
    **{
        f"{workers} workers, every {every}": Row(rounds(every), workers, GLOBAL_BATCH // workers)
        for workers, every in ((4, 20), (4, 240), (16, 20), (64, 20))
    },
    **{
        f"{workers} workers, {OWN_BATCH} samples each, every 20": Row(rounds(20), workers, OWN_BATCH)
        for workers in (16, 64)
    },
    **{f"1 worker, {workers * OWN_BATCH} samples": Row("ddp", batch_size=workers * OWN_BATCH) for workers in (16, 64)},
}
"""Rows at the same global batch, and at the same batch a worker, each beside one worker with all samples."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--rates", nargs="+", help="of the rates of each row, those to run; all by default")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="print the results that exist, run nothing")
    options = parser.parse_args()
    TASKS[TASK] = dataclasses.replace(
        TASKS["pysrc-gpt"], name=TASK, model=functools.partial(models.GPT, width=64, depth=2, heads=2)
    )
    torch.set_num_threads(1)
    runs = {
        (label, rate): [_SimulatedRun.of(ROWS[label], rate, options.steps, seed) for seed in options.seeds]
        for label in options.only
        for rate in ROWS[label].rates
        if not options.rates or rate in options.rates
    }
    if not options.table:
        run_once([run for own in runs.values() for run in own], nullcontext(_run), say, in_short)
    seeds = ", ".join(map(str, options.seeds))
    print(f"\n{TASK}, {options.steps} steps, seeds {seeds}\n")
    print("| | rate | runs | loss (std) | of DDP's payload |\n|---|---|---|---|---|")
    for (label, rate), own in runs.items():
        if records := [run.record for run in own if run.record is not None]:
            print(_line(label, rate, records))


@dataclasses.dataclass(frozen=True)
class _SimulatedRun(RecordedRun):
    """A run of a row, and its settings."""

    config: TrainConfig

    @classmethod
    def of(cls, row: Row, rate: str, steps: int, seed: int) -> _SimulatedRun:
        config = TrainConfig(
            recipe=row.recipe,
            task=TASK,
            workers=row.workers,
            group_size=1,
            batch_size=row.batch_size,
            optimizer=row.optimizer,
            lr=float(rate),
            steps=steps,
            seed=seed,
            device="cpu",
        )
        text = f"{row.recipe} --optimizer {row.optimizer} --lr {rate} --workers {row.workers}"
        return cls(FILE, f"{text} --batch-size {row.batch_size} --steps {steps} --seed {seed}", config)


@functools.cache
def _data() -> object:
    return TASKS[TASK].load(None)


def _run(run: _SimulatedRun) -> None:
    result = simulate(resolve(run.config), _data())  # type: ignore[arg-type]  # the data of this task
    versions = {"torch": torch.__version__}
    keep(run.file, {"arguments": run.arguments, **{name: result[name] for name in KEPT}, "versions": versions})


def _line(label: str, rate: str, records: list[Record]) -> str:
    losses = [record["loss"] for record in records]
    loss = f"{statistics.fmean(losses):.4f}" + (f" ({statistics.stdev(losses):.4f})" if len(losses) > 1 else "")
    share = statistics.fmean(record["payload_ratio"] for record in records)
    sent = f"1/{1 / share:.0f}" if share else "nothing"
    return f"| {label} | {rate} | {len(records)} | {loss} | {sent} |"


if __name__ == "__main__":
    main()
