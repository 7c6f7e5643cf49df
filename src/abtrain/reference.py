"""Implements Algorithm 1 of the paper on one page, with all workers simulated in one process.

The results of `abtrain.engine` must match this reference, which shares no code with it. Weights are in plain dicts,
and the model computes with the product A B of a factored weight. Every tensor has its own optimizer; a tensor of a new
shape gets a new optimizer. All workers of a group have the same weights, so one replica per group is enough: it is
trained on the mean of their gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

Batch = tuple[Tensor, Tensor]


def ab_training(
    model: nn.Module,
    factored: Sequence[str],
    batch: Callable[[int, int], Batch],
    loss: Callable[[Tensor, Tensor], Tensor],
    make_optimizer: Callable[[list[Tensor]], Optimizer],
    *,
    groups: bool = True,
    sigma_cutoff: float,
    **schedule: int,
) -> dict[str, Tensor]:
    """Trains a model by Algorithm 1, or with `groups=False` by the paper's "AB - No Groups".

    Args:
        model: the model with the initial parameters; it is not changed.
        factored: names of the weights to decompose.
        batch: a function (worker, step) -> (inputs, targets).
        loss: a function (output, targets) -> scalar.
        make_optimizer: a function that builds an optimizer, with its learning rate, for a list of one tensor.
        groups: True if groups train separately.
        sigma_cutoff: the share of the largest singular value below which singular values are dropped.
        schedule: the other fields of `_Run` by name: `workers`, `total_steps`, `warmup_steps` and so on.

    Returns:
        The full-rank parameters at the end of training, averaged over all workers, by name.
    """
    run = _Run(model, batch, loss, **schedule)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    world, cycle = [_Replica(start, make_optimizer)], 0  # one replica while all workers are equal
    run.train(world, run.warmup_steps)  # lines 5-6
    while run.step < run.total_steps:  # lines 7, 22
        if groups:
            world = [copy.deepcopy(world[0]) for _ in range(run.n_groups)]
        for g, replica in enumerate(world):
            replica.decompose(factored, sigma_cutoff)  # lines 8-10
            first_half = g < run.n_groups / 2 if run.n_groups > 1 else cycle % 2 == 0
            replica.trained = ("A" if first_half else "B") if groups else "B"  # lines 1-4, 12
        run.rebound = 0  # line 11
        run.train(world, run.ab_steps)  # lines 13-14
        world = [_mean(world)]  # lines 15-16
        world[0].recompose()  # lines 17-18
        run.rebound = 0  # line 19
        run.train(world, run.rebound_steps)  # lines 20-21
        cycle += 1
    return {name: tensor.detach() for name, tensor in world[0].tensors.items()}


@dataclass
class _Run:
    """Trains replicas by the schedule of Algorithm 1, and counts steps. The fields have the paper's names."""

    model: nn.Module
    batch: Callable[[int, int], Batch]
    loss: Callable[..., Tensor]
    workers: int
    total_steps: int
    warmup_steps: int
    ab_steps: int
    rebound_steps: int
    lr_rebound_steps: int
    group_size: int = 1

    def __post_init__(self) -> None:
        self.n_groups = self.workers // self.group_size
        self.step, self.rebound = 0, self.lr_rebound_steps  # rebound: steps since the learning rate's rebound began

    def train(self, replicas: list[_Replica], steps: int) -> None:
        """Trains every replica on the mean gradient of its workers, for `steps` steps or until the run's end."""
        size, ramp = self.workers // len(replicas), self.lr_rebound_steps + 1
        for _ in range(min(steps, self.total_steps - self.step)):
            for g, replica in enumerate(replicas):
                members = range(g * size, (g + 1) * size)
                batches = [self.batch(worker, self.step) for worker in members]
                gradients = [replica.gradients(self.model, self.loss, x, y) for x, y in batches]
                replica.update(gradients, lr_factor=min(1.0, (self.rebound + 1) / ramp))
            self.step, self.rebound = self.step + 1, self.rebound + 1


class _Replica:
    """Stores the tensors of one worker, or of several workers with equal tensors, each with its own optimizer."""

    def __init__(self, tensors: dict[str, Tensor], make_optimizer: Callable[[list[Tensor]], Optimizer]) -> None:
        self.make_optimizer = make_optimizer
        self.tensors: dict[str, Tensor] = {}
        self.optimizers: dict[str, Optimizer] = {}
        self.shapes: dict[str, torch.Size] = {}  # of decomposed weights, before the decomposition
        self.trained = ""
        for name, tensor in tensors.items():
            self.put(name, tensor)

    def put(self, name: str, tensor: Tensor, state: dict[str, Any] | None = None) -> None:
        self.tensors[name] = tensor.detach().clone().requires_grad_()
        self.optimizers[name] = self.make_optimizer([self.tensors[name]])
        if state:
            self.optimizers[name].state[self.tensors[name]] = state

    def weights(self) -> dict[str, Tensor]:
        full = {name: t for name, t in self.tensors.items() if name.rpartition(".")[0] not in self.shapes}
        for name, shape in self.shapes.items():
            W = self.tensors[f"{name}.A"] @ self.tensors[f"{name}.B"]
            full[name] = (W.T if shape[0] < shape[1:].numel() else W).reshape(shape)
        return full

    def gradients(self, model: nn.Module, loss: Callable[..., Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
        value = loss(functional_call(model, self.weights(), (x,)), y)
        return list(torch.autograd.grad(value, list(self.tensors.values())))

    def update(self, gradients: list[list[Tensor]], lr_factor: float) -> None:
        """Updates all tensors but the frozen factor, with the mean gradient of the group's workers (equation 1)."""
        for (name, tensor), *parts in zip(self.tensors.items(), *gradients, strict=True):
            path, _, factor = name.rpartition(".")
            if path in self.shapes and factor != self.trained:
                continue
            tensor.grad = torch.stack(parts).mean(0)
            (group,) = self.optimizers[name].param_groups
            scheduled = group["lr"]
            group["lr"] = scheduled * lr_factor
            self.optimizers[name].step()
            group["lr"] = scheduled

    def decompose(self, names: Sequence[str], sigma_cutoff: float) -> None:
        for name in names:
            weight = self.tensors.pop(name).detach()
            self.shapes[name] = weight.shape
            W = weight.flatten(1)
            W = W.T if W.shape[0] < W.shape[1] else W
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
            k = int((sigma_cutoff * S[0] <= S).sum())
            self.put(f"{name}.A", U[:, :k] @ S[:k].sqrt().diag())  # eq. 3
            self.put(f"{name}.B", S[:k].sqrt().diag() @ Vh[:k])

    def recompose(self) -> None:
        full = self.weights()
        names, self.shapes = list(self.shapes), {}
        for name in names:
            del self.tensors[f"{name}.A"], self.tensors[f"{name}.B"]
            self.put(name, full[name])


def _mean(replicas: Sequence[_Replica]) -> _Replica:
    """Returns a replica with all tensors and their optimizer states averaged over the given replicas."""
    merged = copy.deepcopy(replicas[0])
    for name in merged.tensors:
        known = [state for replica in replicas if (state := replica.optimizers[name].state[replica.tensors[name]])]
        state = {key: torch.stack([s[key] for s in known]).mean(0) for key in (known[0] if known else {})}
        merged.put(name, torch.stack([replica.tensors[name].detach() for replica in replicas]).mean(0), state)
    return merged
