"""Measures what factors save in each weight of a model, and in the whole model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from abtrain.commands.export.finished import FinishedRun, inputs, largest_difference
from abtrain.commands.tasks.evaluation import evaluate
from abtrain.errors import CheckpointError
from abtrain.lowrank.names import factor_letter, factor_names, weight_name

_PAIRS = 15
"""The number of times that both models are measured, alternately. Results are medians."""


@dataclass(frozen=True)
class InspectedWeight:
    """A weight in a model file, as a matrix of m rows and n columns.

    Attributes:
        name: the name of the weight.
        m: the number of rows.
        n: the number of columns, at most m.
        singular_values: the singular values of a factored weight in descending order; empty for a dense one.
    """

    name: str
    m: int
    n: int
    singular_values: tuple[float, ...]

    @property
    def rank(self) -> int:
        """The rank of the factors; 0 for a dense weight."""
        return len(self.singular_values)

    @property
    def parameters(self) -> int:
        """The number of saved values: of both factors, or of the dense weight."""
        return self.rank * (self.m + self.n) if self.rank else self.m * self.n

    @property
    def needed(self) -> int:
        """The number of largest singular values whose squares make up 99 % of the sum of squares; 0 if dense."""
        squares = torch.tensor(self.singular_values, dtype=torch.float64).square()
        return int((squares.cumsum(0) < 0.99 * squares.sum()).sum()) + 1 if self.rank else 0


def inspect_file(path: Path) -> list[InspectedWeight]:
    """Returns the matrices in a safetensors file, with the singular values of factored ones.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as a model file (safetensors): {error}") from error
    return [found for name, tensor in tensors.items() if (found := _inspected(name, tensor, tensors)) is not None]


def _inspected(name: str, tensor: Tensor, tensors: Mapping[str, Tensor]) -> InspectedWeight | None:
    weight = weight_name(name)
    A, B = (tensors.get(factor) for factor in factor_names(weight))
    if factor_letter(name) and A is not None and B is not None and A.ndim == B.ndim == 2:
        if factor_letter(name) == "B":
            return None
        # With A = Q R and B^T = P S, the singular values of A B are those of the small matrix R S^T.
        small = torch.linalg.qr(A.double()).R @ torch.linalg.qr(B.double().T).R.T
        return InspectedWeight(weight, len(A), B.shape[1], tuple(torch.linalg.svdvals(small).tolist()))
    if tensor.ndim < 2 or not tensor.is_floating_point():
        return None
    rows = tensor.reshape(len(tensor), -1).shape
    return InspectedWeight(name, max(rows), min(rows), ())


@dataclass(frozen=True)
class Gains:
    """The size, speed and accuracy of a run's model with dense weights and with factors.

    The first value of each pair is for dense weights, the second for factors in plain PyTorch modules.

    Attributes:
        parameters: the numbers of parameters.
        flops: the floating-point operations of a forward pass of one sample.
        top1: the accuracies in percent; None if the task has no classes.
        loss: the mean test losses in nats.
        latency: the milliseconds of a forward pass in one thread, by batch size.
        ratio: the median ratio of the second latency to the first, by batch size. Measurements alternate.
        difference: the largest absolute difference between outputs of the plain model and the trained model.
    """

    parameters: tuple[int, int]
    flops: tuple[float, float]
    top1: tuple[float | None, float | None]
    loss: tuple[float, float]
    latency: dict[int, tuple[float, float]]
    ratio: dict[int, float]
    difference: float


def gains(run: FinishedRun, data_folder: Path | None) -> Gains:
    """Compares the model of a run with dense weights and with factors, on the task's test data.

    Raises:
        DataError: the data is missing.
    """
    data = run.data(data_folder)
    dense, plain = run.dense(), run.plain()
    x = inputs(run, data, 256)
    found = [evaluate(model, run.task, data) for model in (dense, plain)]
    latency, ratio = {}, {}
    for size in (1, 256):
        latency[size], ratio[size] = _latency(dense, plain, x[:size])
    return Gains(
        parameters=_both(lambda m: sum(p.numel() for p in m.parameters()), dense, plain),
        flops=_both(lambda m: _flops(m, x[:1]), dense, plain),
        top1=(found[0]["top1"], found[1]["top1"]),
        loss=(float(found[0]["loss"] or 0), float(found[1]["loss"] or 0)),
        latency=latency,
        ratio=ratio,
        difference=largest_difference(run.trained(), plain, x),
    )


def _both(figure: Any, *models: nn.Module) -> Any:
    return tuple(figure(model) for model in models)


def _flops(model: nn.Module, x: Tensor) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return float(counter.get_total_flops())


@torch.no_grad()
def _latency(dense: nn.Module, plain: nn.Module, x: Tensor) -> tuple[tuple[float, float], float]:
    """Returns each model's median milliseconds of a forward pass in one thread, and the median of the ratios."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        repeats = max(1, round(0.02 / max(_seconds(dense, x, 2), 1e-6)))
        pairs = [(_seconds(dense, x, repeats), _seconds(plain, x, repeats)) for _ in range(_PAIRS + 1)][1:]
    finally:
        torch.set_num_threads(threads)
    first, second = (1e3 * statistics.median(times) for times in zip(*pairs, strict=True))
    return (first, second), statistics.median(after / before for before, after in pairs)


def _seconds(model: nn.Module, x: Tensor, repeats: int) -> float:
    """Returns the mean seconds of one forward pass, over `repeats` passes."""
    started = time.perf_counter()
    for _ in range(repeats):
        model(x)
    return (time.perf_counter() - started) / repeats
