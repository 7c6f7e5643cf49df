"""What a run records of its steps, merges and validations."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from abtrain.comm.communicator import SingleProcess
from abtrain.commands.tasks.task import TASKS, batches, build_model
from abtrain.commands.train import recorder as module
from abtrain.commands.train import trackers
from abtrain.commands.train.config import TrainConfig, resolve
from abtrain.commands.train.recorder import Recorder, merge_figures
from abtrain.commands.train.run_folder import RunFolder
from abtrain.commands.train.trainer import StepFigures, Trainer

MERGE = {"step": 2, "dropped": [1], "losses": [1.0, 9.0, 2.0], "seconds": 0.5, "wait_seconds": 0.25}


class Seen:
    """A tracker that keeps what it receives."""

    def __init__(self) -> None:
        self.received: list[tuple[int, dict[str, float]]] = []

    def log(self, step: int, numbers: Any) -> None:
        self.received.append((step, numbers))

    def finish(self, numbers: Any) -> None: ...

    def close(self, finished: bool) -> None: ...


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of the recorder in seconds, which tests advance."""
    now = [100.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    tracker = Seen()
    monkeypatch.setitem(trackers.TRACKERS, "seen", ("json", lambda folder, config: tracker))
    return tracker


@pytest.fixture
def recorder(tmp_path: Path, clock: list[float], seen: Seen) -> Iterator[Recorder]:
    """A recorder of 3 workers with 8 samples each, which logs every 2 of 6 steps."""
    settings = {"workers": 3, "steps": 6, "batch_size": 8, "log_every": 2, "device": "cpu", "track": ("seen",)}
    config = resolve(TrainConfig("ddp", out=tmp_path, **settings))  # type: ignore[arg-type]
    with RunFolder(config) as folder, Recorder(config, folder, 10) as recorder:
        recorder.begin(0)
        yield recorder


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_merge_is_summed_up_over_those_that_took_part() -> None:
    figures = {"began": 2, "ranks": [0, 2], "loss_mean": 1.5, "loss_max": 2.0, "seconds": 0.5, "wait_seconds": 0.25}
    assert merge_figures(MERGE) == figures
    unknown = merge_figures(MERGE | {"losses": [math.nan] * 3})
    assert unknown == figures | {"loss_mean": None, "loss_max": None}
    assert merge_figures(MERGE | {"losses": [math.nan, 9.0, 2.0]})["loss_mean"] == 2.0


def test_the_speed_is_that_of_all_workers_since_the_last_log_without_validation(
    recorder: Recorder, clock: list[float], tmp_path: Path
) -> None:
    for step in range(1, 7):
        clock[0] += 1 if step < 5 else 2
        recorder.step(step, "train", StepFigures(1.0, 0.1, 0.5), 0)
        if step == 3:
            clock[0] += 10
            recorder.validated(step, "train", {"top1": 1.0, "loss": 1.0})
            recorder.spent("validate", 10)
    logged = [line for line in lines(tmp_path) if "loss" in line]
    assert [(line["step"], line["samples_per_second"]) for line in logged] == [(2, 24), (4, 24), (6, 12)]


def test_steps_merges_and_validations_have_lines_and_names_of_their_kind(
    recorder: Recorder, clock: list[float], seen: Seen, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step, merges in enumerate([[], [], [MERGE, MERGE | {"dropped": []}], []], 1):
        clock[0] += 1
        recorder.merged(step, "rounds", merges)
        recorder.step(step, "rounds", StepFigures(float(step), 0.1, 0.5), 1000 * step)
    recorder.validated(4, "rounds", {"top1": 50.0, "loss": 0.25})
    kinds = [(line["step"], ({"merge", "validation", "loss"} & line.keys()).pop()) for line in lines(tmp_path)]
    assert kinds == [(2, "loss"), (3, "merge"), (3, "merge"), (4, "loss"), (4, "validation")]
    assert lines(tmp_path)[1] == {"step": 3, "phase": "rounds", "merge": merge_figures(MERGE), "seconds": 3.0}
    merge = {"loss_mean": 1.5, "loss_max": 2.0, "seconds": 0.5, "wait_seconds": 0.25, "workers": 2.0}
    assert seen.received[1] == (3, {f"merge/{name}": value for name, value in merge.items()})
    step = {"loss": 3.5, "lr": 0.1, "grad_norm": 0.5, "samples_per_second": 24.0, "payload_bytes": 4000, "seconds": 4}
    assert seen.received[3] == (4, {f"train/{name}": value for name, value in step.items()})
    assert seen.received[4] == (4, {"eval/top1": 50.0, "eval/loss": 0.25})
    shown = [line for line in capsys.readouterr().out.splitlines() if "lr" in line]
    assert "loss 1.5000  lr" in shown[0] and "loss 2.7500 (max 9.0000)  lr" in shown[1]


def test_a_loss_that_is_not_finite_is_never_the_best(recorder: Recorder) -> None:
    losses = [math.nan, 2.0, math.nan, 1.0, math.inf]
    best = [recorder.validated(i, "train", {"top1": None, "loss": loss}) for i, loss in enumerate(losses)]
    assert best == [False, True, False, True, False]
    assert recorder.validation["best"]["loss"] == 1.0 and recorder.validation["last"]["loss"] == math.inf


@pytest.mark.parametrize(("step", "before"), [(0, 0.0), (3, 7.0)])
def test_the_time_of_a_run_does_not_include_its_setup(
    step: int, before: float, tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(folder: Path, config: TrainConfig) -> Seen:
        clock[0] += 50
        return Seen()

    monkeypatch.setitem(trackers.TRACKERS, "slow", ("json", slow))
    config = resolve(TrainConfig("ddp", workers=1, device="cpu", out=tmp_path, track=("slow",)))
    with RunFolder(config) as folder, Recorder(config, folder, 10) as recorder:
        clock[0] += 20
        if step:
            saved = {"losses": torch.zeros(0), "seconds": torch.tensor(before), "validation": {}, "aside": {}}
            recorder.load_state_dict(saved)
        recorder.begin(step)
        clock[0] += 2
        assert recorder.seconds == before + 2


@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_the_norm_is_that_of_the_gradients_before_clipping_and_changes_nothing(clip: float) -> None:
    task = TASKS["digits-mlp"]
    config = resolve(TrainConfig("ddp", workers=1, steps=2, batch_size=16, clip=clip, device="cpu"))
    x, y = next(batches(task, task.load(None), seed=0, rank=0, world_size=1, batch_size=16))
    model = build_model(task, 0)
    task.loss(model(x), y).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item()
    ended = []
    for measures in (True, False):
        trainer = Trainer(config, build_model(task, 0), SingleProcess())
        position = trainer.ab.position
        assert position is not None
        figures = trainer.optimizer_step(position, x, y, measures_norm=measures)
        assert figures.grad_norm == (pytest.approx(expected, rel=1e-5) if measures else None)
        ended.append(trainer.ab.dense_state_dict())
    assert all(torch.equal(ended[0][name], ended[1][name]) for name in ended[0])
