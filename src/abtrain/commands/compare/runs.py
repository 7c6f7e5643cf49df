"""The runs of a comparison: what there is to do, what is done, and what came out.

Each has a folder of its own: the request (see `kept.py`), lab/ (bytes, and the hosts' output) and train/ (the run
folder).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from abtrain.commands.compare import kept
from abtrain.commands.compare.comparison import Comparison
from abtrain.commands.compare.contestants import Contestant, with_seed
from abtrain.commands.compare.kept import RESULT_FILE, TRAIN_FOLDER
from abtrain.commands.compare.result_files import read_lines, read_record
from abtrain.commands.lab import Job, Lab
from abtrain.commands.lab.result import FILE as LAB_FILE
from abtrain.commands.tasks.task import TASKS
from abtrain.commands.train.config import TrainConfig
from abtrain.commands.units import format_rate
from abtrain.errors import HostFailedError

_LAB_FOLDER = "lab"


@dataclass(frozen=True)
class ComparisonRun:
    """One run that belongs to a comparison."""

    contestant: Contestant
    seed: int
    rate: int
    folder: Path

    def __str__(self) -> str:
        return f"{self.contestant.label}, seed {self.seed}, {format_rate(self.rate)}"

    @property
    def config(self) -> TrainConfig:
        """Its settings."""
        return with_seed(self.contestant.config, self.seed)

    @property
    def request(self) -> str:
        """Its settings, as TOML."""
        return kept.request_text(self.config)

    @property
    def result_file(self) -> Path:
        """Where its result is, or will be."""
        return self.folder / TRAIN_FOLDER / RESULT_FILE

    @property
    def done(self) -> bool:
        """Whether it has been run with these settings, to its end."""
        return kept.is_done(self.folder, self.config, self.result_file, self.folder / _LAB_FOLDER / LAB_FILE)

    def check_results(self) -> None:
        """
        Raises:
            DataError: the folder holds a result that cannot be used.
        """
        if os.path.lexists(self.result_file):
            outcome(self)


@dataclass(frozen=True)
class ComparisonOutcome:
    """The outcome of one run.

    Attributes:
        label: of the contestant.
        seed: of the run.
        rate: bits per second of all links.
        top1: per cent; None where the task has none.
        loss: on the validation data, in nats.
        seconds: of the training loop, start-up of processes not included.
        sync_seconds: of these, waiting for others.
        payload: bytes that worker 0 handed to collectives.
        payload_by_phase: the same, by the recipe's phases.
        wire_bytes: bytes that a host transmitted, the mean over hosts, start-up included.
        compression: full parameters over factored ones.
        curve: (seconds, mean loss since the last point) of worker 0's training.
        version: of abtrain that trained it; None where its result does not say.
    """

    label: str
    seed: int
    rate: int
    top1: float | None
    loss: float
    seconds: float
    sync_seconds: float
    payload: int
    payload_by_phase: dict[str, int]
    wire_bytes: float
    compression: float
    curve: tuple[tuple[float, float], ...]
    version: str | None = None


def tasks(comparison: Comparison) -> list[ComparisonRun]:
    """All runs, each once: first one seed of every contestant, so that a picture is there early."""
    pairs = [(seed, comparison.lab.rate(0)) for seed in comparison.seeds]
    pairs += [(comparison.seeds[0], rate) for rate in comparison.more_rates if rate != comparison.lab.rate(0)]
    return [
        ComparisonRun(contestant, seed, rate, comparison.out / "runs" / _folder_name(contestant.label, seed, rate))
        for seed, rate in dict.fromkeys(pairs)
        for contestant in comparison.contestants
    ]


def check(planned: Sequence[ComparisonRun], overwrite: bool) -> None:
    """Looks into the folders of all runs before the first of them is run; arguments and errors as of `kept.check`."""
    kept.check(planned, overwrite, _shared_folders(planned))


def run(task: ComparisonRun, lab: Lab, overwrite: bool = False) -> None:
    """Runs what is not done, from its start, since its seconds are measured.

    Args:
        task: what to run.
        lab: where.
        overwrite: whether a run with other settings is given up.

    Raises:
        ConfigurationError: the folder holds a run with other settings.
        DataError: the folder holds a result.
        HostFailedError: it failed; the message begins with which run it was.
    """
    _make_room(task, overwrite)
    if task.done:  # by another process, since this one has looked
        return
    kept.write_request(task.folder, task.config)
    if lab.rates != [task.rate] * lab.config.nodes:
        for host in range(lab.config.nodes):
            lab.change(host, task.rate)
        lab.measure()
    request, train = task.folder / kept.REQUEST_FILE, task.folder / TRAIN_FOLDER
    command = ("-m", "abtrain", "train", "--config", str(request), "--out", str(train))
    try:
        lab.run(Job(command, task.folder / _LAB_FOLDER))
    except HostFailedError as error:
        raise HostFailedError(f"{task}: {error}", error.exit_code) from None


def outcome(task: ComparisonRun) -> ComparisonOutcome:
    """Reads the outcome of a finished run.

    Raises:
        DataError: a file of its results is damaged.
    """
    result = read_record(task.result_file)
    hosts = read_record(task.folder / _LAB_FOLDER / LAB_FILE)
    sent = [host.number("tx_bytes") for host in hosts.records("hosts")]
    if not sum(sent):
        raise hosts.error(("hosts",), sent, "a list of hosts of which at least one has sent something")
    lines = read_lines(task.folder / TRAIN_FOLDER / "metrics.jsonl")
    # A loss that was not finite is null, and has no place in a curve.
    curve = [(line.number("seconds"), line.optional_number("loss")) for line in lines]
    return ComparisonOutcome(
        label=task.contestant.label,
        seed=task.seed,
        rate=task.rate,
        top1=result.number("top1") if TASKS[task.contestant.config.task].classifies else None,
        loss=result.number("loss"),
        seconds=result.positive("seconds", "total"),
        sync_seconds=result.number("seconds", "sync"),
        payload=int(result.number("payload_bytes", "total")),
        payload_by_phase=result.counts("payload_bytes", "by_phase"),
        wire_bytes=sum(sent) / len(sent),
        compression=result.positive("compression"),
        curve=tuple((seconds, loss) for seconds, loss in curve if loss is not None),
        version=result.optional_text("versions", "abtrain"),
    )


def _make_room(task: ComparisonRun, overwrite: bool) -> None:
    """Removes what an unfinished run of the same settings has left, or a run that its user has given up."""
    if kept.make_room(task, overwrite):
        return
    task.check_results()
    if not task.done:
        for part in (TRAIN_FOLDER, _LAB_FOLDER):
            kept.remove(task.folder / part)


def _shared_folders(planned: Sequence[ComparisonRun]) -> list[str]:
    """Runs whose labels differ in letters that folders' names do not have."""
    first: dict[Path, ComparisonRun] = {}
    return [
        f"{first[task.folder]} and {task} would share the folder {task.folder}: compare them under two --out"
        for task in planned
        if first.setdefault(task.folder, task) != task
    ]


def _folder_name(label: str, seed: int, rate: int) -> str:
    return f"{re.sub('[^A-Za-z0-9.=_-]+', '-', label)}-seed{seed}-{format_rate(rate)}"
