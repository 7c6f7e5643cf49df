"""Validation while a run trains: figures, the best model, and a run that is not changed by it."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from abtrain.comm.communicator import Communicator, SingleProcess
from abtrain.comm.in_process import run_in_process
from abtrain.commands.tasks.datasets import Data, Split
from abtrain.commands.tasks.evaluation import evaluate, score
from abtrain.commands.tasks.task import TASKS, build_model
from abtrain.commands.train.config import TrainConfig, resolve
from abtrain.commands.train.loop import train
from abtrain.commands.train.stopping import Stopping
from abtrain.commands.train.trainer import Trainer
from abtrain.commands.train.validation import Validation, drop_replaced_best
from abtrain.errors import CheckpointError, StoppedError
from abtrain.lowrank.model_file import save_model

RECIPES = ["ddp", "ab_outer:every=5,delay=2,warmup_steps=10,rank_rule=fixed:4", "local_sgd:every=7", "solo"]


def config(**settings: Any) -> TrainConfig:
    return resolve(TrainConfig(**{"workers": 1, "steps": 30, "device": "cpu", "log_every": 5} | settings))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_parts_of_the_test_set_add_up() -> None:
    task = TASKS["digits-mlp"]
    model, data = build_model(task, 0), task.load(None)
    parts = [score(model, task, data, part, 3) for part in range(3)]
    total = score(model, task, data)
    assert sum(part.correct for part in parts) == total.correct and sum(part.seen for part in parts) == total.seen
    assert sum(part.loss for part in parts) == pytest.approx(total.loss)


def test_the_best_and_the_last_are_recorded(tmp_path: Path) -> None:
    result = train(config(recipe=RECIPES[1], validate_every=10, out=tmp_path), SingleProcess())
    found = [line for line in lines(tmp_path) if "validation" in line]
    assert [line["step"] for line in found] == [10, 20, 30]
    assert result["validation"]["last"] == {"step": 30, **found[-1]["validation"]}
    best = max(found, key=lambda line: (line["validation"]["top1"], -line["step"]))
    assert result["validation"]["best"] == {"step": best["step"], **best["validation"]}
    assert found[-1]["validation"]["top1"] == result["top1"]
    assert found[-1]["validation"]["loss"] == pytest.approx(result["loss"])
    seconds = result["seconds"]
    assert seconds["validate"] > 0
    assert seconds["compute"] + seconds["sync"] + seconds["svd"] + seconds["validate"] == pytest.approx(
        seconds["total"]
    )
    about = json.loads((tmp_path / "model.json").read_text())
    assert about["model"]["step"] == 30 and about["model-best"]["step"] == best["step"]
    for files in (about["model"]["files"], about["model-best"]["files"]):
        assert all((tmp_path / file).exists() for file in files.values()) and files.keys() == {"factored", "dense"}


def test_without_validations_only_the_last_model_is_written(tmp_path: Path) -> None:
    result = train(config(recipe="ddp", out=tmp_path), SingleProcess())
    assert result["validation"] == {} and result["seconds"]["validate"] == 0
    assert sorted(path.name for path in tmp_path.glob("model*")) == [
        "model-dense.safetensors",
        "model.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize("recipe", RECIPES)
def test_workers_validate_one_model_and_train_as_without(recipe: str, tmp_path: Path) -> None:
    task = TASKS["digits-mlp"]
    # Threads share torch's generator, so the initial weights are drawn once for all.
    initial, data = build_model(task, 0), task.load(None)
    few = Data(data.train, Split(data.test.x[:250], data.test.y[:250]))  # type: ignore[attr-defined]
    seen: list[dict[str, Any]] = []

    class Record:
        def validated(self, step: int, phase: str, quality: dict[str, Any]) -> bool:
            seen.append({"step": step, **quality})
            return False

        def spent(self, name: str, seconds: float) -> None:
            assert name == "validate" and seconds > 0

    def work(comm: Communicator, validates: bool) -> tuple[dict[str, torch.Tensor], list[float], int]:
        settings = config(recipe=recipe, workers=2, steps=23, validate_every=3 if validates else 0)
        trainer = Trainer(settings, copy.deepcopy(initial), comm)
        recorder: Any = Record() if comm.rank == 0 else None
        validation = Validation(trainer, recorder, few, tmp_path)
        losses: list[float] = []
        looks = 0
        for step in range(23):
            generator = torch.Generator().manual_seed(10 * step + comm.rank)
            chosen = torch.randint(len(data.train), (8,), generator=generator)
            x, y = data.train.x[chosen], data.train.y[chosen]  # type: ignore[attr-defined]
            position = trainer.ab.position
            assert position is not None
            trainer.ab.step(trainer.optimizer_step(position, task.prepare(x), y.long()).loss)
            validation.after(step + 1, lambda place: None)
            if validates and (step + 1) % 6 == 0:
                sent = comm.meter.payload()["total"]
                with trainer.ab.merged():
                    looks += comm.meter.payload()["total"] - sent
                    losses.append(float(evaluate(trainer.model, task, few)["loss"] or 0))
        by_phase = comm.meter.payload()["by_phase"]
        validated = by_phase.pop("validate", 0)
        assert (validated > 0) is (validates and recipe != "solo")
        # A hidden merge counts as training, even if validation sends its messages.
        return trainer.ab.dense_state_dict(), losses, sum(by_phase.values()) - looks

    plain = run_in_process(2, lambda comm: work(comm, False))
    validated = run_in_process(2, lambda comm: work(comm, True))
    for one, other in zip(plain, validated, strict=True):
        assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])
        assert one[2] == other[2]
    assert [entry["step"] for entry in seen] == [3, 6, 9, 12, 15, 18, 21]
    # In all recipes with a common model it is the one that `merged` shows on every worker.
    assert [entry["loss"] for entry in seen[1::2]] == pytest.approx(validated[0][1])


@pytest.mark.parametrize("file", ["model-best.safetensors", "model-best-dense.safetensors"])
def test_a_disk_that_is_full_costs_the_best_model_and_not_the_run(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The former best model is not presented as the new one."""
    saved: list[str] = []

    def refuse_the_second(path: Path, *arguments: Any) -> None:
        if path.name == file and saved.count(file):
            raise CheckpointError("no space left")
        saved.append(path.name)
        save_model(path, *arguments)

    monkeypatch.setattr("abtrain.commands.train.validation.save_model", refuse_the_second)
    result = train(config(recipe="ddp", validate_every=10, steps=20, out=tmp_path), SingleProcess())
    assert result["validation"]["last"]["step"] == result["validation"]["best"]["step"] == 20
    assert "no space left: the run continues, but its best model so far was not saved" in caplog.text
    about = json.loads((tmp_path / "model.json").read_text())
    assert about["model-best"]["step"] == 20 and about["model-best"]["files"] == {}
    assert about["model"]["files"] and not list(tmp_path.glob("model-best*"))


@pytest.mark.parametrize(
    ("factored", "dense", "best", "stays"),
    [(20, 20, 20, True), (20, 20, 10, False), (20, 10, 10, False), (20, 20, None, False), (None, None, 20, True)],
)
def test_a_resumed_run_drops_a_best_model_that_a_later_validation_replaced(
    factored: int | None, dense: int | None, best: int | None, stays: bool, tmp_path: Path
) -> None:
    files = {"model-best.safetensors": factored, "model-best-dense.safetensors": dense}
    for name, step in files.items():
        if step is not None:
            save_model(tmp_path / name, {"weight": torch.ones(2)}, {"step": step})
    recorder: Any = SimpleNamespace(validation={"last": {"step": 20}, "best": best and {"step": best}})
    before = sorted(tmp_path.iterdir())
    drop_replaced_best(recorder, tmp_path)
    assert sorted(tmp_path.iterdir()) == (before if stays else [])
    assert recorder.validation.get("best") == ({"step": best} if stays else None)


def test_a_damaged_best_model_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "model-best.safetensors").write_bytes(b"half")
    recorder: Any = SimpleNamespace(validation={"best": {"step": 20}})
    drop_replaced_best(recorder, tmp_path)
    assert recorder.validation == {} and not list(tmp_path.iterdir())


def test_each_batch_of_a_validation_is_a_sign_of_life(tmp_path: Path) -> None:
    task = TASKS["digits-mlp"]
    trainer = Trainer(config(recipe="ddp", validate_every=2), build_model(task, 0), SingleProcess())
    data, places = task.load(None), list[str]()
    validation = Validation(trainer, None, data, tmp_path)
    validation.after(1, places.append)
    assert places == []
    validation.after(2, places.append)
    assert places == ["validation after 2 steps"] * math.ceil(len(data.test) / 100)


def test_time_and_bytes_of_checkpoints_are_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Threads share torch's generator, and initial weights that differ would be sent.
    initial = build_model(TASKS["digits-mlp"], 0)
    monkeypatch.setattr("abtrain.commands.train.loop.build_model", lambda *arguments: copy.deepcopy(initial))

    def result(**settings: Any) -> dict[str, Any]:
        chosen = config(recipe="ddp", workers=2, steps=6, out=tmp_path / str(len(settings)), **settings)
        return run_in_process(2, lambda comm: train(chosen, comm))[0]

    plain, saved = result(), result(checkpoint_every=2)
    assert saved["payload_bytes"]["by_phase"]["checkpoint"] > 0
    assert saved["payload_ratio"] == plain["payload_ratio"]
    seconds = saved["seconds"]
    assert plain["seconds"]["checkpoint"] == 0 < seconds["checkpoint"]
    assert sum(seconds.values()) == pytest.approx(2 * seconds["total"])


def test_a_request_to_stop_takes_effect_at_a_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that waits there cannot vote, so the others must not wait for its vote."""
    store, arrived = HashStore(), threading.Event()
    after = Validation.after

    def arrive(validation: Validation, step: int, beat: Any) -> None:
        if step == 3 and validation._trainer.ab.communicator.rank == 0:
            arrived.set()
        after(validation, step, beat)

    class Asked(Stopping):
        def agreed_between(self, step: int) -> int:
            if self._comm.rank == 1 and step == 2:
                arrived.wait(30)
                self._requests.note(signal.SIGTERM)
            return super().agreed_between(step)

    monkeypatch.setattr(Validation, "after", arrive)
    monkeypatch.setattr("abtrain.commands.train.loop.Stopping", Asked)
    monkeypatch.setattr("abtrain.commands.train.stopping._PATIENCE_SECONDS", 0.5)
    chosen = config(recipe="local_sgd:every=20", workers=2, steps=40, validate_every=3, out=tmp_path)
    with pytest.raises(StoppedError, match="SIGTERM"):
        run_in_process(2, lambda comm: train(chosen, comm, store))
    assert json.loads((tmp_path / "outcome.json").read_text())["step"] == 3


def test_a_run_that_is_replaced_leaves_no_model(tmp_path: Path) -> None:
    settings = config(recipe="ddp", validate_every=10, steps=10, out=tmp_path)
    train(settings, SingleProcess())
    train(dataclasses.replace(settings, validate_every=0, overwrite=True), SingleProcess())
    assert not (tmp_path / "model-best.safetensors").exists() and (tmp_path / "model.safetensors").exists()
