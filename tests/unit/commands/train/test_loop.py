import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch

from abtrain.checkpoint.digest import weights_digest
from abtrain.comm.communicator import SingleProcess
from abtrain.commands.tasks.datasets import Data, Split
from abtrain.commands.tasks.task import TASKS, batches, build_model, build_optimizer, build_schedule
from abtrain.commands.train.config import TrainConfig, resolve
from abtrain.commands.train.loop import train
from abtrain.errors import ConfigurationError, NonFiniteError


def config(**settings: object) -> TrainConfig:
    defaults: dict[str, object] = {"recipe": "ddp", "workers": 1, "steps": 12, "device": "cpu", "log_every": 5}
    return resolve(TrainConfig(**(defaults | settings)))  # type: ignore[arg-type]


def test_ddp_ends_with_the_weights_of_a_plain_loop(tmp_path: Path) -> None:
    task = TASKS["digits-mlp"]
    model = build_model(task, seed=3)
    optimizer = build_optimizer(model, task.lr)
    schedule = build_schedule(optimizer, steps=12)
    stream = batches(task, task.load(None), seed=3, rank=0, world_size=1, batch_size=task.batch_size)
    for x, y in itertools.islice(stream, 12):
        task.loss(model(x), y).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    result = train(config(seed=3, out=tmp_path), SingleProcess())
    assert result["weights_digest"] == weights_digest(model)


def test_the_result_is_what_the_folder_holds(tmp_path: Path) -> None:
    recipe = "ab:sigma_cutoff=0.9,warmup_steps=4,ab_steps=3,rebound_steps=1"
    result = train(config(recipe=recipe, out=tmp_path), SingleProcess())
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(json.dumps(result, default=str))
    assert [entry["step"] for entry in result["ranks"]] == [4, 8]
    assert result["compression"] > 1
    assert (result["recipe"], result["config"]["recipe"]) == ("ab", recipe)
    assert result["versions"].keys() == {"python", "torch", "abtrain"}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 7, 10, 11, 12]
    logged = [line for line in lines if "loss" in line]
    assert [line["step"] for line in logged] == [5, 10, 12]
    figures = {"loss", "lr", "grad_norm", "samples_per_second", "payload_bytes"}
    assert logged[0].keys() == {"step", "phase", "seconds"} | figures
    merges = [line["merge"] for line in lines if "merge" in line]
    assert [(merge["began"], merge["ranks"]) for merge in merges] == [(7, [0]), (11, [0])]


def test_a_language_model_has_a_loss_but_no_top1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = TASKS["pysrc-gpt"]
    few = Data(*(Split(*torch.randint(256, (2, 10, 128), dtype=torch.uint8)) for _ in range(2)))
    monkeypatch.setitem(TASKS, task.name, dataclasses.replace(task, load=lambda folder: few))
    result = train(config(task="pysrc-gpt", steps=1, batch_size=2, out=tmp_path), SingleProcess())
    assert result["top1"] is None and 4 < result["loss"] < 7


def test_settings_that_do_not_fit_the_data_leave_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="batch size 2000"):
        train(config(batch_size=2000, out=tmp_path / "run"), SingleProcess())
    with pytest.raises(ConfigurationError):
        train(config(recipe="ab:exclude=*", out=tmp_path / "run"), SingleProcess())
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"worker 0 is (nan|inf) at step \d+ .*lower --lr"):
        train(config(lr=1e30, out=tmp_path), SingleProcess())
    assert not (tmp_path / "result.json").exists()
    assert torch.is_grad_enabled()
