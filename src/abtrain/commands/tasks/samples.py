"""Training and test data of a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from abtrain.commands.tasks.choices import OnBadImage
from abtrain.errors import DataError


@dataclass(frozen=True)
class Reading:
    """How files are read, of what is not held in memory.

    Attributes:
        loaders: processes that read for one worker; 0: the worker itself.
        on_bad_image: where one cannot be read: `stop`, or take the next one in its place (`skip`).
    """

    loaders: int = 0
    on_bad_image: OnBadImage = "stop"


class Samples(Dataset[Any], ABC):
    """Samples with their targets, in memory or in files."""

    @abstractmethod
    def __len__(self) -> int:
        """How many there are."""

    @abstractmethod
    def to(self, device: torch.device) -> Samples:
        """The same samples, whose batches are on `device`."""

    @abstractmethod
    def read_by(self, reading: Reading) -> Samples:
        """The same samples; what is not in memory is read so."""

    @abstractmethod
    def stream(self, plan: Iterator[tuple[int, list[int]]], seed: int, rank: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of samples and targets.

        Args:
            plan: of each step, its number and which samples it takes.
            seed, rank: what is drawn depends on.

        Raises:
            DataError: a sample cannot be read, and is not to be passed over.
        """

    @abstractmethod
    def in_order(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All samples once; raises likewise."""


@dataclass(frozen=True)
class Split(Samples):
    """Samples `x` and their targets `y`, alike in their first dimension."""

    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise DataError(f"{len(self.x)} samples with {len(self.y)} targets: each sample needs exactly one")

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]

    def to(self, device: torch.device) -> Split:
        return Split(self.x.to(device), self.y.to(device))

    def read_by(self, reading: Reading) -> Split:
        return self

    def stream(self, plan: Iterator[tuple[int, list[int]]], seed: int, rank: int) -> Iterator[tuple[Tensor, Tensor]]:
        for _, indices in plan:
            chosen = torch.tensor(indices, device=self.x.device)
            yield self.x[chosen], self.y[chosen]

    def in_order(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.x.split(batch_size), self.y.split(batch_size), strict=True)


@dataclass(frozen=True)
class Data:
    """Training and test data of a task."""

    train: Samples
    test: Samples

    def to(self, device: torch.device) -> Data:
        """The same data on `device`."""
        return Data(self.train.to(device), self.test.to(device))

    def read_by(self, reading: Reading) -> Data:
        """The same data; what is not in memory is read so."""
        return Data(self.train.read_by(reading), self.test.read_by(reading))
