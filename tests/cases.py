"""Small models, batches and a loop that tests run on threads, on Gloo ranks, and in the reference."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abtrain import ABTraining, recipes
from abtrain.comm.communicator import Communicator
from abtrain.lowrank.classify import classify
from abtrain.reference import ab_training

SCHEDULE = {"warmup_steps": 3, "ab_steps": 4, "rebound_steps": 2, "lr_rebound_steps": 2}
THREE_CYCLES = 3 + 3 * (4 + 2)
CLASSES = 5


class Attention(nn.Module):
    """nn.MultiheadAttention between two Linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = self.norm(h + self.attention(h, h, h, need_weights=False)[0])
        return self.head(h.mean(1))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, CLASSES))


def _conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(8, 6, 3, stride=2, groups=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(6 * 2 * 2, CLASSES),
    )


_GENERATOR = threading.Lock()  # torch's own is one for all threads

MODELS = {"mlp": (_mlp, (10,)), "conv": (_conv, (2, 6, 6)), "attention": (Attention, (4, 6))}


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Inside it, PyTorch's generator is this thread's alone, and begins at the seed."""
    with _GENERATOR, torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def build(kind: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """The model of that kind, the same in every process and thread."""
    with seeded(seed):
        return MODELS[kind][0]().to(dtype)


def batch(kind: str, worker: int, step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + worker)
    x = torch.randn(6, *MODELS[kind][1], generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, CLASSES, (6,), generator=generator)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=5e-2, momentum=0.9)


OPTIMIZERS = {"adamw": adamw, "sgd": sgd}


def train(
    comm: Communicator,
    model: nn.Module,
    kind: str,
    recipe: str = "ab",
    optimizer: str = "adamw",
    steps: int = THREE_CYCLES,
    **options: Any,
) -> dict[str, Tensor]:
    """Runs a recipe to its end and returns the full-rank weights."""
    dtype = next(model.parameters()).dtype
    if recipe in ("ab", "ab_no_groups"):
        options = {**SCHEDULE, "sigma_cutoff": 0.2, **options}
    opt = OPTIMIZERS[optimizer](model.parameters())
    ab = ABTraining(model, opt, recipes.build(recipe, steps, **options), communicator=comm)
    for step in range(steps):
        x, y = batch(kind, comm.rank, step, dtype)
        F.cross_entropy(ab(x), y).backward()
        opt.step()
        opt.zero_grad()
        ab.step()
    assert ab.finished
    return ab.dense_state_dict()


def train_by_reference(
    kind: str, recipe: str, workers: int, group_size: int, optimizer: str = "adamw", dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """The same run by `reference.py`."""
    model = build(kind, dtype)
    factoring = recipes.ab(100).factoring
    names = [t.name for t in classify(model, factoring) if t.kind == "factored"]
    return ab_training(
        model,
        names,
        lambda worker, step: batch(kind, worker, step, dtype),
        F.cross_entropy,
        OPTIMIZERS[optimizer],
        workers=workers,
        group_size=group_size,
        groups=recipe == "ab",
        total_steps=THREE_CYCLES,
        sigma_cutoff=0.2,
        **SCHEDULE,
    )


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert set(one) == set(other)
    return max((one[name] - other[name]).abs().max().item() for name in one)
