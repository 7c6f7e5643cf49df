"""The paper's tasks: one training step of each at batch 8."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from abtrain.comm.communicator import SingleProcess
from abtrain.commands.tasks.datasets import Data, Split
from abtrain.commands.tasks.task import TASKS, Task, batches, build_optimizer, smoothed_cross_entropy
from abtrain.commands.train.config import TrainConfig, resolve
from abtrain.commands.train.config_problems import validate
from abtrain.commands.train.loop import train
from abtrain.commands.train.trainer import clip_gradients, loss_of
from abtrain.errors import ConfigurationError

pytest.importorskip("torchvision")

SHAPES = {
    "imagenet-vit-b16": (86_567_656, 224, 1000),
    "imagenet-resnet50": (25_557_032, 224, 1000),
    "cifar10-vgg16": (134_301_514, 32, 10),
    "cifar100-mini-vit": (42_767_716, 32, 100),
}


def few(side: int, classes: int) -> Data:
    images = torch.randint(256, (8, 3, side, side), dtype=torch.uint8)
    split = Split(images, torch.randint(classes, (8,)))
    return Data(split, split)


@pytest.mark.parametrize("name", SHAPES)
def test_models_have_the_papers_sizes(name: str) -> None:
    with torch.device("meta"):
        model = TASKS[name].model()
    assert sum(p.numel() for p in model.parameters()) == SHAPES[name][0]


@pytest.mark.parametrize("name", SHAPES)
def test_one_training_step_at_batch_8(name: str) -> None:
    task, (_, side, classes) = TASKS[name], SHAPES[name]
    model = task.model()
    optimizer = build_optimizer(model, task.lr, task.weight_decay)
    x, y = next(batches(task, few(side, classes), seed=0, rank=0, world_size=1, batch_size=8))
    loss = loss_of(model, task, x, y, task.precision)
    loss.backward()  # type: ignore[no-untyped-call]
    clip_gradients([optimizer], task.clip)
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    assert float(torch.stack(norms).norm()) == pytest.approx(1, rel=0.02)
    # A weight of the head: what lies before it has no gradient while the head is zero, as torchvision's ViT begins.
    weight = next(p for p in reversed(list(model.parameters())) if p.ndim == 2)
    before = weight.detach().clone()
    optimizer.step()
    assert math.isfinite(loss.item()) and not torch.equal(before, weight)


def small(task: Task) -> Task:
    """The task with a model of a moment, on data of a moment."""

    def model() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 10))

    return dataclasses.replace(task, model=model, find=lambda folder: None, load=lambda folder: few(32, 10))


def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> dict[str, Any]:
    monkeypatch.setitem(TASKS, "cifar10-vgg16", small(TASKS["cifar10-vgg16"]))
    settings = {"recipe": "ddp", "workers": 1, "steps": 3, "batch_size": 4, "device": "cpu"} | settings
    return train(resolve(TrainConfig(task="cifar10-vgg16", out=tmp_path, **settings)), SingleProcess())


def test_a_run_takes_the_papers_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = trained(tmp_path, monkeypatch)["config"]
    assert (config["weight_decay"], config["clip"], config["precision"]) == (0.1, 1.0, "bf16")
    assert (config["init"], config["lr"]) == ("orthogonal", 3e-3)


def test_clipping_and_precision_change_what_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = {
        trained(tmp_path / str(i), monkeypatch, **settings)["weights_digest"]
        for i, settings in enumerate(({}, {"clip": 0.01}, {"precision": "fp32"}, {"weight_decay": 0.0}))
    }
    assert len(digests) == 4


def test_wrong_settings_have_a_message_each() -> None:
    wrong: Any = {"clip": -1.0, "precision": "fp8", "on_bad_image": "ignore", "loaders": -1}
    assert len(validate(TrainConfig(**wrong))) == 4


def test_labels_are_smoothed() -> None:
    logits, y = torch.tensor([[100.0, 0.0]]), torch.tensor([0])
    assert float(smoothed_cross_entropy(logits, y)) == pytest.approx(5.0)


def test_without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchvision.models", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'abtrain\[vision\]'"):
        TASKS["imagenet-resnet50"].model()
