"""What a task trains on, and what it is judged by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset

from abtrain.errors import DataError

if TYPE_CHECKING:
    from abtrain.train.image_data import Images, Reading


@dataclass(frozen=True)
class Split(Dataset[tuple[Tensor, Tensor]]):
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
        """The same samples on `device`."""
        return Split(self.x.to(device), self.y.to(device))

    def stream(self, plan: Iterator[tuple[int, list[int]]], seed: int, rank: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of samples and targets, given the number of each step and which samples it takes."""
        for _, indices in plan:
            chosen = torch.tensor(indices, device=self.x.device)
            yield self.x[chosen], self.y[chosen]

    def in_order(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All samples once."""
        return zip(self.x.split(batch_size), self.y.split(batch_size), strict=True)


@dataclass(frozen=True)
class Data:
    """What a task trains on, and what it is judged by."""

    train: Split | Images
    test: Split | Images

    def to(self, device: torch.device) -> Data:
        """The same data on `device`."""
        return Data(self.train.to(device), self.test.to(device))

    def read_by(self, reading: Reading) -> Data:
        """The same data; what is not in memory is read so."""
        parts = (
            part if isinstance(part, Split) else replace(part, reading=reading) for part in (self.train, self.test)
        )
        return Data(*parts)
