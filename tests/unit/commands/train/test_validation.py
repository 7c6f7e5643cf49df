"""Validation while a run trains: figures, the best model, and a run that is not changed by it."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from abtrain.comm.communicator import Communicator, SingleProcess
from abtrain.comm.in_process import run_in_process
from abtrain.commands.model_file import save_model
from abtrain.commands.tasks.datasets import Data, Split
from abtrain.commands.tasks.task import TASKS, build_model, evaluate, score
from abtrain.commands.train.config import TrainConfig, resolve
from abtrain.commands.train.loop import train
from abtrain.commands.train.trainer import Trainer
from abtrain.commands.train.validation import Validation
from abtrain.errors import CheckpointError

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
        def validated(self, step: int, phase: str, quality: dict[str, Any], seconds: float) -> bool:
            seen.append({"step": step, **quality})
            return False

    def work(comm: Communicator, validates: bool) -> tuple[dict[str, torch.Tensor], list[float], int]:
        settings = config(recipe=recipe, workers=2, steps=23, validate_every=3 if validates else 0)
        trainer = Trainer(settings, copy.deepcopy(initial), comm)
        recorder: Any = Record() if comm.rank == 0 else None
        validation = Validation(trainer, recorder, few, tmp_path)
        losses: list[float] = []
        for step in range(23):
            generator = torch.Generator().manual_seed(10 * step + comm.rank)
            chosen = torch.randint(len(data.train), (8,), generator=generator)
            x, y = data.train.x[chosen], data.train.y[chosen]  # type: ignore[attr-defined]
            position = trainer.ab.position
            assert position is not None
            trainer.ab.step(trainer.optimizer_step(position, task.prepare(x), y.long()).loss)
            validation.after(step + 1)
            if validates and (step + 1) % 6 == 0:
                with trainer.ab.merged():
                    losses.append(float(evaluate(trainer.model, task, few)["loss"] or 0))
        by_phase = comm.meter.payload()["by_phase"]
        validated = by_phase.pop("validate", 0)
        assert (validated > 0) is (validates and recipe != "solo")
        return trainer.ab.dense_state_dict(), losses, sum(by_phase.values())

    plain = run_in_process(2, lambda comm: work(comm, False))
    validated = run_in_process(2, lambda comm: work(comm, True))
    for one, other in zip(plain, validated, strict=True):
        assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])
    assert [entry["step"] for entry in seen] == [3, 6, 9, 12, 15, 18, 21]
    # In all recipes with a common model it is the one that `merged` shows on every worker.
    assert [entry["loss"] for entry in seen[1::2]] == pytest.approx(validated[0][1])


def test_a_disk_that_is_full_costs_the_best_model_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse_best(path: Path, *arguments: Any) -> None:
        if path.name.startswith("model-best"):
            raise CheckpointError("no space left")
        save_model(path, *arguments)

    monkeypatch.setattr("abtrain.commands.train.validation.save_model", refuse_best)
    result = train(config(recipe="ddp", validate_every=10, steps=20, out=tmp_path), SingleProcess())
    assert result["validation"]["last"]["step"] == 20
    assert "no space left: the run continues without its best model" in caplog.text


def test_a_run_that_is_replaced_leaves_no_model(tmp_path: Path) -> None:
    settings = config(recipe="ddp", validate_every=10, steps=10, out=tmp_path)
    train(settings, SingleProcess())
    train(dataclasses.replace(settings, validate_every=0, overwrite=True), SingleProcess())
    assert not (tmp_path / "model-best.safetensors").exists() and (tmp_path / "model.safetensors").exists()
