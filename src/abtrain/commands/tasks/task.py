"""Defines tasks, and builds their models, batches, optimizers and schedules.

The module does not use abtrain's engine. A plain DDP loop can therefore use it, with the same initial weights and the
same batches as `abtrain train`.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import BatchSampler, DistributedSampler

from abtrain.commands.tasks import datasets as sources
from abtrain.commands.tasks import images, models
from abtrain.commands.tasks.choices import Init, OptimizerName, Precision
from abtrain.commands.tasks.pixels import (
    flip_and_shift,
    shift_by_four,
    standardize_cifar10,
    standardize_cifar100,
    standardize_fashion,
    standardize_imagenet,
)
from abtrain.commands.tasks.samples import Data
from abtrain.errors import ConfigurationError
from abtrain.optim import muon_and_adamw

WARMUP_SHARE = 0.05


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Returns the mean cross-entropy of logits (..., classes) and labels (...), in nats."""
    return F.cross_entropy(logits.flatten(0, -2), y.flatten())


@dataclass(frozen=True)
class Task:
    """A model, a data set, and default settings for training.

    Attributes:
        name: the name of the task on the command line.
        model: builds the model with PyTorch's own initialization.
        find: checks that the data is in the `--data` folder or in its default folder; raises DataError if not.
        load: reads the data; has the same argument and raises the same error as `find`.
        prepare: converts stored samples to the model's input.
        steps: the default number of steps.
        batch_size: the default number of samples per worker and step.
        lr: the default learning rate.
        augment: randomly changes a batch of stored samples in training; None for no augmentation.
        loss: computes the mean training loss from outputs and targets; validation uses plain cross-entropy.
        classifies: whether evaluation includes top-1 accuracy; otherwise it has only the mean loss.
        reads_folder: whether the task reads its data from the folder that `--data` names.
        weight_decay: the default weight decay of AdamW.
        clip: the default maximum of the global gradient norm; 0 for no limit.
        init: the default initial weights.
        precision: the default precision of forward and backward passes.
        lr_warmup: the share of the steps, from 0 to 1, in which the learning rate increases.
    """

    name: str
    model: Callable[[], nn.Module]
    find: Callable[[Path | None], object]
    load: Callable[[Path | None], Data]
    prepare: Callable[[Tensor], Tensor]
    steps: int
    batch_size: int = 32
    lr: float = 1e-3
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    classifies: bool = True
    reads_folder: bool = False
    weight_decay: float = 0.05
    clip: float = 0.0
    init: Init = "default"
    precision: Precision = "fp32"
    lr_warmup: float = WARMUP_SHARE


def smoothed_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Returns the mean cross-entropy with label smoothing of 0.1, as in all runs of the paper."""
    return F.cross_entropy(logits, y, label_smoothing=0.1)


def _papers(name: str, model: Callable[[], nn.Module], **settings: Any) -> Task:
    """Builds a task with the settings of the paper's runs: 150 epochs, the first 10 of them with warm-up."""
    return Task(
        name=name,
        model=model,
        loss=smoothed_cross_entropy,
        reads_folder=True,
        clip=1.0,
        init="orthogonal",
        precision="bf16",
        lr_warmup=10 / 150,
        **settings,
    )


_IMAGENET_DATA: dict[str, Any] = {
    "find": images.find_imagenet,
    "load": images.load_imagenet,
    "prepare": standardize_imagenet,
    "steps": 150 * 312,
    "batch_size": 256,
    "lr": 3.5e-3,
}


def _cifar(
    name: str, model: Callable[[], nn.Module], data: str, prepare: Callable[[Tensor], Tensor], **settings: Any
) -> Task:
    return _papers(
        name,
        model,
        find=functools.partial(images.find_cifar, name=data),
        load=functools.partial(images.load_cifar, name=data),
        prepare=prepare,
        augment=shift_by_four,
        steps=150 * 48,
        weight_decay=0.1,
        **settings,
    )


def _fashion(name: str, model: Callable[[], nn.Module], lr: float) -> Task:
    return Task(
        name=name,
        model=model,
        find=sources.find_fashion_mnist,
        load=sources.load_fashion_mnist,
        prepare=standardize_fashion,
        steps=2000,
        lr=lr,
        augment=flip_and_shift,
        reads_folder=True,
    )


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="digits-mlp",
            model=models.digits_mlp,
            find=sources.check_digits,
            load=sources.load_digits,
            prepare=Tensor.float,
            steps=600,
            lr=3e-3,
        ),
        _fashion("fashion-cnn", models.fashion_cnn, lr=2e-3),
        _fashion("fashion-vit", models.VisionTransformer, lr=1e-3),
        Task(
            name="pysrc-gpt",
            model=models.GPT,
            find=sources.find_pysrc,
            load=sources.load_pysrc,
            prepare=Tensor.int,
            steps=1000,
            batch_size=8,
            lr=1e-3,
            classifies=False,
        ),
        Task(
            name="random-gpt2",
            model=models.gpt2,
            find=lambda folder: None,
            load=functools.partial(sources.random_tokens, vocabulary=models.GPT2_VOCABULARY, context=64),
            prepare=Tensor.int,
            steps=40,
            batch_size=4,
            lr=3e-4,
            classifies=False,
        ),
        _papers("imagenet-vit-b16", models.vit_b_16, weight_decay=0.1, **_IMAGENET_DATA),
        _papers("imagenet-resnet50", models.resnet50, weight_decay=0.01, **_IMAGENET_DATA),
        _cifar("cifar10-vgg16", models.vgg16, "CIFAR10", standardize_cifar10, batch_size=64, lr=3e-3),
        _cifar("cifar100-mini-vit", models.mini_vit, "CIFAR100", standardize_cifar100, batch_size=256, lr=1e-3),
    )
}


def build_model(task: Task, seed: int, init: Init = "default") -> nn.Module:
    """Builds the task's model on the CPU with initial weights from `seed`. Torch's global generator is unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = task.model()
        if init == "orthogonal":
            models.orthogonal_init(model)
    return model


def build_optimizer(model: nn.Module, lr: float, weight_decay: float = 0.05) -> AdamW:
    """Builds AdamW with weight decay for parameters of two or more dimensions, and without for biases and norms."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return AdamW([group for group in groups if group["params"]], lr=lr, fused=True)


def build_optimizers(model: nn.Module, name: OptimizerName, lr: float, weight_decay: float = 0.05) -> list[Optimizer]:
    """Builds the optimizers of a run: `build_optimizer` (adamw), or `abtrain.optim.muon_and_adamw` (muon)."""
    if name == "muon":
        return muon_and_adamw(model, lr, weight_decay=weight_decay)
    return [build_optimizer(model, lr, weight_decay)]


def build_schedule(optimizer: Optimizer, steps: int, warmup: float = WARMUP_SHARE) -> LambdaLR:
    """Builds a learning-rate schedule: linear warm-up over the share `warmup` of the steps, then a cosine to zero."""
    warmup_steps = max(1, round(warmup * steps))

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        done = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
        return 0.5 * (1 + math.cos(math.pi * done))

    return LambdaLR(optimizer, factor)


def batches(
    task: Task, data: Data, *, seed: int, rank: int, world_size: int, batch_size: int, start: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Returns an infinite iterator over one worker's batches (inputs, targets), from step `start` on.

    Workers share the samples of each epoch without overlap. An incomplete last batch is dropped. A batch depends only
    on the arguments and its step.

    Raises:
        ConfigurationError: the training set is too small for one batch per worker.
    """
    samples = len(data.train)
    per_epoch = samples // world_size // batch_size
    if per_epoch == 0:
        raise ConfigurationError(
            f"batch size {batch_size} x {world_size} workers is more than the {samples} training samples of task "
            f"{task.name}: use a batch size of at most {samples // world_size}"
        )
    return _batches(task, data, seed, rank, world_size, batch_size, start)


def _batches(
    task: Task, data: Data, seed: int, rank: int, world_size: int, batch_size: int, start: int
) -> Iterator[tuple[Tensor, Tensor]]:
    sampler: DistributedSampler[Any] = DistributedSampler(
        data.train, num_replicas=world_size, rank=rank, shuffle=True, seed=seed, drop_last=True
    )
    stream = data.train.stream(_plan(sampler, batch_size, start), seed, rank)
    for step, (x, y) in zip(itertools.count(start), stream, strict=False):
        if task.augment is not None:
            x = task.augment(x, _generator(seed, rank, step))
        yield task.prepare(x), y.long()


def _plan(sampler: DistributedSampler[Any], batch_size: int, start: int) -> Iterator[tuple[int, list[int]]]:
    """Yields pairs of a step's number, from `start` on, and the indices of its samples."""
    batch_sampler = BatchSampler(sampler, batch_size, drop_last=True)
    first_epoch, skip = divmod(start, len(batch_sampler))
    steps = itertools.count(start)
    for epoch in itertools.count(first_epoch):
        sampler.set_epoch(epoch)
        # The sampler draws the order of an epoch at its first sample, so samples must not be read ahead.
        for indices in itertools.islice(batch_sampler, skip, None):
            yield next(steps), indices
        skip = 0


def _generator(seed: int, rank: int, step: int) -> torch.Generator:
    """Returns a new generator whose seed depends only on the arguments."""
    digest = hashlib.blake2b(f"{seed}/{rank}/{step}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
