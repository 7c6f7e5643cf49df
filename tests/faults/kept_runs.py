"""Folders of made-up runs, and a lab that runs nothing, for tests of the files that comparisons keep."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from abtrain import __version__
from abtrain.commands import cli
from abtrain.commands.compare.runs import ComparisonRun
from abtrain.commands.paper.experiments import SCALES, cells
from abtrain.commands.paper.published import AB
from abtrain.commands.paper.runs import PaperRun, plan_runs
from abtrain.commands.runs.request import write_request
from abtrain.commands.train.config import TrainConfig, resolve
from abtrain.commands.train.config_file import from_toml

CONFIG = TrainConfig(recipe="ab_outer", task="digits-mlp", workers=2, steps=200, batch_size=16)
RESULT: dict[str, Any] = {
    "top1": 91.5,
    "loss": 0.3,
    "seconds": {"total": 10.0, "sync": 2.0},
    "payload_bytes": {"total": 1000, "between_groups": 1000, "by_phase": {"full": 1000}},
    "compression": 1.5,
    "parameters": 10**6,
    "steps": 200,
    "versions": {"abtrain": "0.0.9"},
}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def finish(task: ComparisonRun, **values: object) -> ComparisonRun:
    """Writes the files of a finished run into its folder."""
    task.folder.mkdir(parents=True, exist_ok=True)
    if not (task.folder / "request.toml").exists():
        write_request(task.folder, task.config)
    (task.folder / "train/checkpoints").mkdir(parents=True, exist_ok=True)
    (task.folder / "train/checkpoints/model.safetensors").write_text("weights of two days")
    (task.folder / "train/result.json").write_text(json.dumps(RESULT | values))
    (task.folder / "train/metrics.jsonl").write_text('{"seconds": 1.0, "loss": 2.0}\n{"seconds": 2.0, "loss": null}\n')
    (task.folder / "lab").mkdir(exist_ok=True)
    (task.folder / "lab/lab.json").write_text('{"hosts": [{"tx_bytes": 3000}, {"tx_bytes": 1000}]}')
    return task


class StandInLab:
    """Replaces a lab: the files of a job are written at once."""

    ran: list[str] = []  # noqa: RUF012  # emptied by the fixture

    def __init__(self, config: Any) -> None:
        self.config = config
        self.rates = [config.rate(0)] * config.nodes

    def __enter__(self) -> StandInLab:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing is left."""

    def change(self, host: int, rate: int) -> None:
        self.rates[host] = rate

    def measure(self) -> None:
        """Every link has its stated rate."""

    def run(self, job: Any) -> None:
        folder = job.out.parent
        config = from_toml(Path(job.command[job.command.index("--config") + 1]))
        for name in ("train", "lab"):
            (folder / name).mkdir()
        result = RESULT | {"config": dataclasses.asdict(resolve(config)), "versions": {"abtrain": __version__}}
        (folder / "train/result.json").write_text(json.dumps(result, default=str))
        (folder / "train/metrics.jsonl").write_text("")
        (folder / "lab/lab.json").write_text('{"hosts": [{"tx_bytes": 3000}]}')
        StandInLab.ran.append(folder.name)


def compared(out: Path, *more: str, recipes: tuple[str, ...] = ("ab_outer",)) -> int:
    """Runs `abtrain compare`; returns its exit code."""
    line = ("compare", *recipes, "--nodes", "2", "--rate", "100mbit", "--steps", "200", "--out", str(out), *more)
    with pytest.raises(SystemExit) as ended:
        cli.main(line)
    return int(ended.value.code or 0)


def full_run(out: Path) -> PaperRun:
    return plan_runs(cells("table1", SCALES["full"], methods=(AB,)), 1, out)[0]


def put_result(run: PaperRun) -> Path:
    (run.folder / "train/checkpoints").mkdir(parents=True)
    (run.folder / "train/checkpoints/model.safetensors").write_text("weights of two days")
    (run.folder / "train/result.json").write_text(json.dumps(RESULT))
    return run.folder / "train"
