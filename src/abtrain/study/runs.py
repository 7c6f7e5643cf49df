"""The runs of a comparison: what there is to do, what is done, and what came out.

Each has a folder of its own: request.toml (settings), lab/ (bytes, and the hosts' output) and train/ (the run folder).
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from abtrain.errors import HostFailedError
from abtrain.lab import Job, Lab, format_rate
from abtrain.lab.result import FILE as LAB_FILE
from abtrain.study.arguments import Comparison
from abtrain.study.contestant import Contestant, with_seed
from abtrain.train.config_file import to_toml

_REQUEST_FILE = "request.toml"


@dataclass(frozen=True)
class Task:
    """One run that belongs to a comparison."""

    contestant: Contestant
    seed: int
    rate: int
    folder: Path

    def __str__(self) -> str:
        return f"{self.contestant.label}, seed {self.seed}, {format_rate(self.rate)}"

    @property
    def request(self) -> str:
        """Its settings, as TOML."""
        return to_toml(with_seed(self.contestant.config, self.seed))

    @property
    def done(self) -> bool:
        """Whether it has been run with these settings, to its end."""
        request = self.folder / _REQUEST_FILE
        results = (self.folder / "train/result.json", self.folder / "lab" / LAB_FILE)
        return request.exists() and request.read_text() == self.request and all(file.exists() for file in results)


@dataclass(frozen=True)
class Outcome:
    """What came out of one run.

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


def tasks(comparison: Comparison) -> list[Task]:
    """All runs: first one seed of every contestant, so that a picture is there early."""
    pairs = [(seed, comparison.lab.rate(0)) for seed in comparison.seeds]
    pairs += [(comparison.seeds[0], rate) for rate in comparison.more_rates if rate != comparison.lab.rate(0)]
    return [
        Task(contestant, seed, rate, comparison.out / "runs" / _folder_name(contestant.label, seed, rate))
        for seed, rate in pairs
        for contestant in comparison.contestants
    ]


def run(task: Task, lab: Lab) -> None:
    """Runs what is not done, from its start.

    Raises:
        HostFailedError: it failed; the message begins with which run it was.
    """
    shutil.rmtree(task.folder, ignore_errors=True)
    task.folder.mkdir(parents=True)
    request = task.folder / _REQUEST_FILE
    request.write_text(task.request, encoding="utf-8")
    if lab.rates != [task.rate] * lab.config.nodes:
        for host in range(lab.config.nodes):
            lab.change(host, task.rate)
        lab.measure()
    command = ("-m", "abtrain", "train", "--config", str(request), "--out", str(task.folder / "train"))
    try:
        lab.run(Job(command, task.folder / "lab"))
    except HostFailedError as error:
        raise HostFailedError(f"{task}: {error}", error.exit_code) from None


def outcome(task: Task) -> Outcome:
    """What came out of a run that is done."""
    result = json.loads((task.folder / "train/result.json").read_text(encoding="utf-8"))
    hosts = json.loads((task.folder / "lab" / LAB_FILE).read_text(encoding="utf-8"))["hosts"]
    lines = (task.folder / "train/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    curve = [(record["seconds"], record["loss"]) for record in map(json.loads, lines)]
    return Outcome(
        label=task.contestant.label,
        seed=task.seed,
        rate=task.rate,
        top1=result["top1"],
        loss=result["loss"],
        seconds=result["seconds"]["total"],
        sync_seconds=result["seconds"]["sync"],
        payload=result["payload_bytes"]["total"],
        payload_by_phase=result["payload_bytes"]["by_phase"],
        wire_bytes=sum(host["tx_bytes"] for host in hosts) / len(hosts),
        compression=result["compression"],
        curve=tuple(curve),
    )


def _folder_name(label: str, seed: int, rate: int) -> str:
    # A label may hold anything; what tells two apart is in the settings, which `done` compares.
    return f"{re.sub('[^A-Za-z0-9.=_-]+', '-', label)}-seed{seed}-{format_rate(rate)}"
