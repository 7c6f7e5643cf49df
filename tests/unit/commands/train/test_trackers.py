"""Trackers: what they record, and that none can end a run."""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from abtrain import failpoints as faults
from abtrain.comm.communicator import SingleProcess
from abtrain.commands.train import trackers
from abtrain.commands.train.config import TrainConfig, resolve
from abtrain.commands.train.config_problems import validate
from abtrain.commands.train.loop import train
from abtrain.commands.train.trackers import Trackers
from abtrain.errors import StoppedError


def trained(out: Path, *track: str) -> dict[str, Any]:
    config = TrainConfig("ddp", workers=1, steps=4, log_every=2, device="cpu", out=out, track=track)
    return train(resolve(config), SingleProcess())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = trained(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4]
    assert events.Scalars("result/top1")[0].value == pytest.approx(result["top1"], rel=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    trained(tmp_path, "wandb")
    kept = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(kept) == 1 and kept[0].stat().st_size > 0


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the module records how it is called."""
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def recording(name: str) -> Any:
        return lambda *given, **named: calls.append((name, given, named))

    stand_in = types.ModuleType("mlflow")
    for name in ("set_tracking_uri", "set_experiment", "start_run", "log_params", "log_metrics", "end_run"):
        setattr(stand_in, name, recording(name))
    monkeypatch.setitem(sys.modules, "mlflow", stand_in)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    trained(tmp_path, "mlflow")
    assert [call[0] for call in calls] == [
        "set_tracking_uri",
        "set_experiment",
        "start_run",
        "log_params",
        *["log_metrics"] * 3,
        "end_run",
    ]
    assert calls[0][1] == ((tmp_path / "mlflow").as_uri(),)
    figures = {"loss", "lr", "grad_norm", "samples_per_second", "payload_bytes", "seconds"}
    assert calls[4][2] == {"step": 2} and calls[4][1][0].keys() == {f"train/{name}" for name in figures}


class Failing:
    """Fails at a call of one name."""

    def __init__(self, at: str) -> None:
        self._at = at
        self.calls: list[str] = []
        self._call("begin")

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self._at:
            raise RuntimeError("no network")

    def log(self, step: int, numbers: Any) -> None:
        self._call("log")

    def finish(self, numbers: Any) -> None:
        self._call("finish")

    def close(self, finished: bool) -> None:
        self._call("close")


@pytest.mark.parametrize(("at", "calls"), [("begin", 1), ("log", 2), ("finish", 4), ("close", 5)])
def test_a_failing_tracker_is_reported_once_and_dropped(
    at: str, calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[Failing] = []

    def make(folder: Path, config: TrainConfig) -> Failing:
        failing = Failing.__new__(Failing)
        made.append(failing)
        failing.__init__(at)  # type: ignore[misc]
        return failing

    monkeypatch.setitem(trackers.TRACKERS, "failing", ("json", make))
    with caplog.at_level(logging.WARNING, logger="abtrain"):
        assert trained(tmp_path, "failing")["steps"] == 4
    assert len(made) == 1 and len(made[0].calls) == calls
    assert [record.message for record in caplog.records] == [
        "failing failed (RuntimeError: no network): the run continues without it"
    ]


def test_a_request_to_stop_is_no_failure_of_the_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal may come while a tracker is at work."""

    class Interrupted:
        def log(self, step: int, numbers: Mapping[str, float]) -> None:
            raise StoppedError("stopped on request")

        def finish(self, numbers: Mapping[str, float]) -> None: ...

        def close(self, finished: bool) -> None: ...

    monkeypatch.setitem(trackers.TRACKERS, "interrupted", ("json", lambda folder, config: Interrupted()))
    live = Trackers(TrainConfig(track=("interrupted",)), tmp_path)
    with pytest.raises(StoppedError, match="on request"):
        live.log("train", 1, {"loss": 1.0})


@pytest.mark.parametrize("finished", [True, False])
def test_trackers_are_closed_however_the_run_ends(
    finished: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    class Closed:
        def log(self, step: int, numbers: Mapping[str, float]) -> None: ...

        def finish(self, numbers: Mapping[str, float]) -> None:
            calls.append("finish")

        def close(self, finished: bool) -> None:
            calls.append(finished)

    monkeypatch.setitem(trackers.TRACKERS, "closed", ("json", lambda folder, config: Closed()))
    if finished:
        trained(tmp_path, "closed")
    else:
        monkeypatch.setattr(faults, "_planned", faults.parse("fail 0 2 step"))
        with pytest.raises(RuntimeError, match="injected fault"):
            trained(tmp_path, "closed")
    assert calls == (["finish", True] if finished else [False])


def test_no_trackers(tmp_path: Path) -> None:
    Trackers(TrainConfig(), tmp_path).finish({"top1": 1.0})
    assert not list(tmp_path.iterdir())


def test_trackers_that_there_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    wrong = validate(TrainConfig(workers=1, track=("wandb", "tensorbord")))
    assert wrong == [
        "--track wandb: wandb is not installed: pip install 'abtrain[wandb]'",
        "unknown tracker 'tensorbord': did you mean 'tensorboard'? Known: mlflow, tensorboard, wandb",
    ]
