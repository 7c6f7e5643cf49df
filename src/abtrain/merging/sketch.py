"""How far workers' changes agree, from a few numbers that travel exactly, whatever the wire does to the changes.

Every worker folds its changes, under signs that all draw alike, onto a row of `WIDTH` numbers (a count sketch:
Charikar, Chen, Farach-Colton 2002). It is linear, and keeps inner products but for noise: the cosine of two changes to
within about 1 / sqrt(WIDTH).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

WIDTH = 2048


def sketch_of(changes: Mapping[str, Tensor]) -> Tensor:
    """`WIDTH` numbers and their squared length, in float64, on the device of the changes.

    Args:
        changes: finite tensors by name, the same names and shapes on all workers.
    """
    device = next((change.device for change in changes.values()), torch.device("cpu"))
    row = torch.zeros(WIDTH, dtype=torch.float64, device=device)
    for name, change in changes.items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        signs = torch.randint(0, 2, (change.numel(),), generator=generator, dtype=torch.int8).to(change.device)
        signed = change.flatten() * (2 * signs - 1)
        whole = signed.numel() // WIDTH * WIDTH
        row += signed[:whole].view(-1, WIDTH).sum(0, dtype=torch.float64)
        row[: signed.numel() - whole] += signed[whole:]
    return torch.cat([row, row.square().sum()[None]])


def agreement_in(mean: Tensor, workers: int) -> float:
    """The mean cosine between what any two workers changed, weighted by how much.

    Args:
        mean: of the sketches of so many workers.
        workers: whose changes it is of.
    """
    square, mean_square = float(mean[:-1].square().sum()), float(mean[-1])
    if workers == 1 or mean_square == 0:
        return 1.0
    # |sum of changes|^2 = the sum of squares + n (n - 1) times the mean product of two.
    return (workers * square / mean_square - 1) / (workers - 1)
