"""Defines the interface to training and test samples, and implements it for samples in memory."""

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
    """The settings for reading samples from files.

    Attributes:
        loaders: the number of processes that read for one worker; 0 if the worker itself reads.
        on_bad_image: whether to `stop` at an image that cannot be read, or to `skip` it and use the next one.
    """

    loaders: int = 0
    on_bad_image: OnBadImage = "stop"


class Samples(Dataset[Any], ABC):
    """The interface to samples in memory or in files. A sample is an input with its target."""

    @abstractmethod
    def __len__(self) -> int:
        """Returns the number of samples."""

    @abstractmethod
    def to(self, device: torch.device) -> Samples:
        """Returns the same samples, with batches on `device`."""

    @abstractmethod
    def read_by(self, reading: Reading) -> Samples:
        """Returns the same samples with other settings for reading files."""

    @abstractmethod
    def stream(self, plan: Iterator[tuple[int, list[int]]], seed: int, rank: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields a batch for each step of `plan`: the inputs and the targets of its samples, as two tensors.

        Args:
            plan: pairs of a step's number and the indices of its samples.
            seed: the seed of the random numbers, such as those of random crops.
            rank: the rank of this worker. Workers of different ranks draw different random numbers.

        Raises:
            DataError: a sample cannot be read, and `on_bad_image` is `stop`.
        """

    @abstractmethod
    def in_order(self, batch_size: int, part: int = 0, parts: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields every `parts`-th batch of the samples in their stored order, starting with batch `part`.

        Batches are counted from 0. Samples of the other batches are not read.

        Raises:
            DataError: a sample cannot be read, and `on_bad_image` is `stop`.
        """


@dataclass(frozen=True)
class Split(Samples):
    """Samples in memory: inputs `x` and targets `y`, two tensors with the same first dimension."""

    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise DataError(f"{len(self.x)} inputs have {len(self.y)} targets: each input needs exactly one target")

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

    def in_order(self, batch_size: int, part: int = 0, parts: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.x.split(batch_size)[part::parts], self.y.split(batch_size)[part::parts], strict=True)


@dataclass(frozen=True)
class Data:
    """The training and test data of a task."""

    train: Samples
    test: Samples

    def to(self, device: torch.device) -> Data:
        """Returns the same data on `device`."""
        return Data(self.train.to(device), self.test.to(device))

    def read_by(self, reading: Reading) -> Data:
        """Returns the same data with other settings for reading files."""
        return Data(self.train.read_by(reading), self.test.read_by(reading))
