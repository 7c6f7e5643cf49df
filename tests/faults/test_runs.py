"""Runs that end before their time, and what becomes of them when they are started again. Workers are threads here."""

from __future__ import annotations

import dataclasses
import json
import logging
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from abtrain import checkpoint, faults
from abtrain.comm.communicator import Communicator, SingleProcess
from abtrain.comm.in_process import run_in_process
from abtrain.errors import CheckpointError, ConfigurationError, RanksDisagreeError, StoppedError
from abtrain.train import loop
from abtrain.train.config import TrainConfig, resolve, validate
from abtrain.train.loop import agree_on_start, train
from abtrain.train.run_folder import RunFolder

STEPS = 24
RECIPES: dict[str, dict[str, Any]] = {
    "ab": {"warmup_steps": 4, "ab_steps": 6, "rebound_steps": 3, "lr_rebound_steps": 3, "sigma_cutoff": 0.5},
    "ab_outer": {"every": 5, "delay": 2, "fragments": 2, "wire": "int8", "warmup_steps": 10, "rank_rule": "fixed:4"},
}


def settings(folder: Path, recipe: str = "ab", **changed: Any) -> TrainConfig:
    config = TrainConfig(recipe, workers=2, steps=STEPS, device="cpu", log_every=1, checkpoint_every=4, out=folder)
    return resolve(dataclasses.replace(config, **RECIPES[recipe], **changed))


def run(config: TrainConfig, plan: str = "", monkeypatch: pytest.MonkeyPatch | None = None) -> dict[str, Any]:
    """The result of a run of threads in which faults happen, after which RuntimeError is the error."""
    if monkeypatch is not None:
        monkeypatch.setattr(faults, "_planned", faults.parse(plan))
    return run_in_process(config.workers, lambda comm: train(config, comm))[0]


@pytest.fixture(scope="module", autouse=True)
def one_model_after_the_other() -> Iterator[None]:
    """Threads share torch's generator, so only one at a time may draw initial weights."""
    lock, build_model = threading.Lock(), loop.build_model

    def locked(*args: Any) -> Any:
        with lock:
            return build_model(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build_model", locked)
        yield


@pytest.fixture(scope="module")
def whole(one_model_after_the_other: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """By recipe, the digest of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    return {recipe: run(settings(folder / recipe, recipe, checkpoint_every=0))["weights_digest"] for recipe in RECIPES}


def recorded(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("plan", ["1 2 step", "0 7 step", "1 10 merge.begin", "0 10 merge.agreed", "1 12 step"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_worker_that_fails(
    recipe: str, plan: str, tmp_path: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError, match="a fault was asked for"):
        run(settings(tmp_path, recipe), f"fail {plan}", monkeypatch)
    assert not (tmp_path / "result.json").exists()
    assert run(settings(tmp_path, recipe))["weights_digest"] == whole[recipe]
    assert recorded(tmp_path) == list(range(1, STEPS + 1))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("recipe", RECIPES)
def test_twenty_failures_at_random_places(
    recipe: str, tmp_path: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dice = random.Random(7)
    points = ["step", "merge.begin", "merge.agreed", "merge.end", "checkpoint.write", "checkpoint.rename"]
    config = settings(tmp_path, recipe, checkpoint_every=2)
    for _ in range(20):
        plan = f"fail {dice.randrange(2)} {dice.randrange(1, STEPS)} {dice.choice(points)}"
        monkeypatch.setattr(faults, "_planned", faults.parse(plan))
        try:
            run(config)
        except RuntimeError:
            continue
        # A place that the run had passed already, or never came to: it is done, and begins anew.
        config = dataclasses.replace(config, overwrite=True)
        with pytest.raises(RuntimeError):
            run(config, "fail 0 3 step", monkeypatch)
        config = dataclasses.replace(config, overwrite=False)
    assert run(config, "", monkeypatch)["weights_digest"] == whole[recipe]


@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_a_disk_that_fails_does_not_end_the_run(
    error: str,
    tmp_path: Path,
    whole: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    result = run(settings(tmp_path), f"{error} 1 12 checkpoint.fsync", monkeypatch)
    assert result["weights_digest"] == whole["ab"]
    assert "the run goes on with the older checkpoints" in caplog.text
    assert sorted(path.name[-2:] for path in (tmp_path / "checkpoints").iterdir()) == ["20", "24"]


def test_a_disk_that_fails_ends_the_run_where_that_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(tmp_path, on_checkpoint_error="stop")
    with pytest.raises(CheckpointError, match="rank 1: No space left on device") as told:
        run(config, "ENOSPC 1 12 checkpoint.write", monkeypatch)
    assert told.value.exit_code == 4
    assert sorted(path.name[-2:] for path in (tmp_path / "checkpoints").iterdir()) == ["04", "08"]


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(
    tmp_path: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with pytest.raises(RuntimeError):
        run(settings(tmp_path), "fail 0 18 step", monkeypatch)
    damaged = tmp_path / "checkpoints" / "step-000000000016" / "part-1.json"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert run(settings(tmp_path))["weights_digest"] == whole["ab"]
    assert str(damaged) in caplog.text and "going on from the checkpoint of step 12" in caplog.text


def test_nothing_is_begun_anew_where_all_checkpoints_are_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError):
        run(settings(tmp_path), "fail 0 18 step", monkeypatch)
    for part in (tmp_path / "checkpoints").glob("*/part-0.safetensors"):
        part.unlink()
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints .*part-0.safetensors is missing"):
        run(settings(tmp_path))


@pytest.mark.parametrize("workers", [1, 3])
def test_another_number_of_workers(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The checkpoint of step 10 is one of a merge, those of the steps after it are not."""
    caplog.set_level(logging.INFO)
    with pytest.raises(RuntimeError):
        run(settings(tmp_path, checkpoint_every=5, keep=3), "fail 0 17 step", monkeypatch)
    result = run(settings(tmp_path, workers=workers, checkpoint_every=5))
    assert "step-000000000015 was saved by 2 workers amid a round" in caplog.text
    assert "going on from the checkpoint of step 10" in caplog.text and "samples are dealt out anew" in caplog.text
    assert result["steps"] == STEPS and result["world_size"] == workers


def test_a_finished_run_is_not_touched(tmp_path: Path) -> None:
    first = run(settings(tmp_path))
    assert any("is not empty" in problem for problem in validate(settings(tmp_path)))
    assert json.loads((tmp_path / "result.json").read_text())["weights_digest"] == first["weights_digest"]


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    with RunFolder(settings(tmp_path)), pytest.raises(ConfigurationError, match="in use by another run"):
        run(settings(tmp_path))


def test_an_unfinished_run_of_other_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError):
        run(settings(tmp_path), "fail 0 9 step", monkeypatch)
    with pytest.raises(ConfigurationError, match="seed is 0 there and 1 here"):
        run(settings(tmp_path, seed=1))


def test_workers_with_unlike_settings_or_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(comm: Communicator) -> str:
        with pytest.raises(RanksDisagreeError) as told:
            agree_on_start(settings(tmp_path, seed=comm.rank, out=None), comm)
        return str(told.value)

    assert set(run_in_process(3, start)) == {
        "workers were started with different software or settings: seed is 1 on rank 1 and 0 on rank 0; seed is 2 on "
        "rank 2 and 0 on rank 0. Start all of them with the same command and the same versions"
    }


def alone(folder: Path) -> TrainConfig:
    return settings(folder, workers=1, checkpoint_every=3)


@pytest.mark.parametrize("name", ["term", "int"])
def test_stopped_by_a_signal(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = train(alone(tmp_path / "whole"), SingleProcess())["weights_digest"]
    monkeypatch.setattr(faults, "_planned", faults.parse(f"{name} 0 7 step"))
    with pytest.raises(StoppedError, match=f"SIG{name.upper()}.*step 8 is saved") as told:
        train(alone(tmp_path / "run"), SingleProcess())
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert outcome == {"outcome": "stopped", "exit_code": 75, "step": 8, "message": str(told.value)}
    assert train(alone(tmp_path / "run"), SingleProcess())["weights_digest"] == expected
    assert not (tmp_path / "run" / "outcome.json").exists()


def test_a_second_signal_does_not_wait_and_tears_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "_planned", faults.parse("term 0 7 step; int 0 8 checkpoint.fsync"))
    with pytest.raises(StoppedError, match=r"at once on a second request \(SIGINT\)"):
        train(alone(tmp_path), SingleProcess())
    saved = checkpoint.latest(tmp_path / "checkpoints", SingleProcess())
    assert saved is not None and saved.step == 6
    assert json.loads((tmp_path / "outcome.json").read_text())["exit_code"] == 75
