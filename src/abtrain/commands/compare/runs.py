"""Plans the runs of a comparison, executes a run in the lab, and reads its outcome.

The folder of a run contains its request (see `abtrain.commands.runs.request`), the folder lab/ with lab.json and the
output of the hosts, and the folder train/, which is the run folder of `abtrain train`.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from abtrain.commands.compare.comparison import Comparison
from abtrain.commands.compare.contestants import Contestant
from abtrain.commands.lab import Job, Lab
from abtrain.commands.lab.result import FILE as LAB_FILE
from abtrain.commands.runs.folder_run import FolderRun, remove
from abtrain.commands.runs.request import REQUEST_FILE, TRAIN_FOLDER, write_request
from abtrain.commands.runs.result_files import read_lines, read_record
from abtrain.commands.tasks.task import TASKS
from abtrain.commands.train.config import TrainConfig
from abtrain.commands.train.folder_content import METRICS_FILE, RESULT_FILE
from abtrain.commands.units import format_rate
from abtrain.errors import HostFailedError

_LAB_FOLDER = "lab"


@dataclass(frozen=True)
class ComparisonRun(FolderRun):
    """One run of a comparison: a recipe with its options, a seed and a link rate."""

    contestant: Contestant
    seed: int
    rate: int
    folder: Path

    def __str__(self) -> str:
        return f"{self.contestant.label}, seed {self.seed}, {format_rate(self.rate)}"

    @property
    def config(self) -> TrainConfig:
        return dataclasses.replace(self.contestant.config, seed=self.seed)

    @property
    def results(self) -> tuple[Path, ...]:
        return self.folder / TRAIN_FOLDER / RESULT_FILE, self.folder / _LAB_FOLDER / LAB_FILE

    def check_results(self) -> None:
        if os.path.lexists(self.results[0]):
            outcome(self)


@dataclass(frozen=True)
class ComparisonOutcome:
    """The outcome of one run.

    Attributes:
        label: the recipe with its options as a string.
        seed: the seed of the run.
        rate: the rate of all links in bits per second.
        top1: the top-1 accuracy in percent; None if the task has none.
        loss: the validation loss in nats; None if it is NaN or infinite.
        seconds: the seconds of the training loop, without the start-up of processes.
        sync_seconds: the part of `seconds` in which worker 0 waited for other workers.
        payload: the bytes that worker 0 passed to collectives.
        payload_by_phase: the payload in bytes of each phase of the recipe.
        wire_bytes: the mean number of bytes that a host sent, start-up included.
        compression: the parameters of the full model divided by those of the factored model.
        curve: the training curve of worker 0, as points (seconds, mean loss since the previous point).
        version: the version of abtrain that executed the run; None if the result file does not contain it.
    """

    label: str
    seed: int
    rate: int
    top1: float | None
    loss: float | None
    seconds: float
    sync_seconds: float
    payload: int
    payload_by_phase: dict[str, int]
    wire_bytes: float
    compression: float
    curve: tuple[tuple[float, float], ...]
    version: str | None = None


def plan_runs(comparison: Comparison) -> list[ComparisonRun]:
    """Returns the runs of all recipes with all seeds and link rates. A rate that was requested twice counts once.

    The first seed of each recipe comes first, so that a table of all recipes is available early.
    """
    pairs = [(seed, comparison.lab.rate(0)) for seed in comparison.seeds]
    pairs += [(comparison.seeds[0], rate) for rate in comparison.more_rates if rate != comparison.lab.rate(0)]
    return [
        ComparisonRun(contestant, seed, rate, comparison.out / "runs" / _folder_name(contestant.label, seed, rate))
        for seed, rate in dict.fromkeys(pairs)
        for contestant in comparison.contestants
    ]


def run_in_lab(run: ComparisonRun, lab: Lab, overwrite: bool = False) -> None:
    """Executes a run unless it is finished. An interrupted run starts again from step 0, because its time is measured.

    Args:
        run: the run to execute.
        lab: the cluster. Its links are set to the rate of the run.
        overwrite: whether a run with other settings in the folder is replaced.

    Raises:
        ConfigurationError: the folder contains a run with other settings.
        DataError: the folder contains a damaged result.
        HostFailedError: the run failed; the message names the run.
    """
    _make_room(run, overwrite)
    if run.done:
        return
    write_request(run.folder, run.config)
    if lab.rates != [run.rate] * lab.config.nodes:
        for host in range(lab.config.nodes):
            lab.change(host, run.rate)
        lab.measure()
    request, train = run.folder / REQUEST_FILE, run.folder / TRAIN_FOLDER
    command = ("-m", "abtrain", "train", "--config", str(request), "--out", str(train))
    try:
        lab.run(Job(command, run.folder / _LAB_FOLDER))
    except HostFailedError as error:
        raise HostFailedError(f"{run}: {error}", error.exit_code) from None


def outcome(run: ComparisonRun) -> ComparisonOutcome:
    """Reads the outcome of a finished run.

    Raises:
        DataError: a result file is damaged.
    """
    result, hosts = map(read_record, run.results)
    sent = [host.number("tx_bytes") for host in hosts.records("hosts")]
    if not sum(sent):
        raise hosts.error(("hosts",), sent, "a list of hosts that sent bytes")
    lines = read_lines(run.folder / TRAIN_FOLDER / METRICS_FILE)
    # JSON has no NaN and no infinity, so such a loss is null in the files. The curve has no point for it.
    curve = [(line.number("seconds"), line.optional_number("loss")) for line in lines]
    return ComparisonOutcome(
        label=run.contestant.label,
        seed=run.seed,
        rate=run.rate,
        top1=result.number("top1") if TASKS[run.contestant.config.task].classifies else None,
        loss=result.optional_number("loss"),
        seconds=result.positive("seconds", "total"),
        sync_seconds=result.number("seconds", "sync"),
        payload=int(result.number("payload_bytes", "total")),
        payload_by_phase=result.counts("payload_bytes", "by_phase"),
        wire_bytes=sum(sent) / len(sent),
        compression=result.positive("compression"),
        curve=tuple((seconds, loss) for seconds, loss in curve if loss is not None),
        version=result.optional_text("versions", "abtrain"),
    )


def _make_room(run: ComparisonRun, overwrite: bool) -> None:
    """Removes the files of an interrupted run with the same settings, or a run with other settings if `overwrite`."""
    if run.make_room(overwrite):
        return
    run.check_results()
    if not run.done:
        for part in (TRAIN_FOLDER, _LAB_FOLDER):
            remove(run.folder / part)


def shared_folders(planned: Sequence[ComparisonRun]) -> list[str]:
    """Returns a message for each pair of runs whose folders are the same, because folder names omit some characters."""
    first: dict[Path, ComparisonRun] = {}
    return [
        f"{first[run.folder]} and {run} have the same folder {run.folder}: compare them in two commands, each with "
        "its own --out"
        for run in planned
        if first.setdefault(run.folder, run) != run
    ]


def _folder_name(label: str, seed: int, rate: int) -> str:
    return f"{re.sub('[^A-Za-z0-9.=_-]+', '-', label)}-seed{seed}-{format_rate(rate)}"
