"""Measures, layer by layer, how far the weights of the workers have diverged when they merge.

X_i is a weight or factor of worker i at the end of a round. X is its value at the start plus the mean of all changes.

    distance = sqrt(mean_i |X_i - X|^2) / |X|
    subspace = sqrt(mean_i (1 - |Q_i^T Q|^2 / k)),    Q_i, Q orthonormal bases of the k columns of A_i and A (rows of B)

Both are 0 if the workers are equal, and `subspace` is 1 if subspaces are orthogonal. The paper suspects that groups
diverge in small singular values (Section V). Such a divergence hardly changes `distance`, but it changes `subspace`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from abtrain.comm.communicator import Communicator
from abtrain.lowrank.names import factor_letter

_Tensors = Mapping[str, Tensor]
Distances = dict[str, dict[str, float]]  # by layer, and then by `distance` or `subspace`


class Terms(NamedTuple):
    """One worker's terms of the divergence of a layer: |X_i - X|^2 / |X|^2 and 1 - |Q_i^T Q|^2 / k.

    The second term is None if the layer is not a factor.
    """

    distance: float
    subspace: float | None


@torch.no_grad()
def local_terms(changes: _Tensors, mean: _Tensors, anchors: _Tensors, factors: Collection[str]) -> dict[str, Terms]:
    """Returns this worker's terms for each tensor of two or more dimensions, by name.

    `anchors` are the weights at the start of the round, `changes` this worker's changes since then, and `mean` their
    average over all workers. `factors` contains the names of the factors.
    """
    names = [name for name in changes if changes[name].ndim > 1]
    letters = {name: factor_letter(name) if name in factors else "" for name in names}
    return {name: _local(letters[name], anchors[name], changes[name], mean[name]) for name in names}


def divergence(comm: Communicator, terms: Mapping[str, Terms]) -> Distances:
    """Returns the divergence by layer in a merge, from this worker's terms. Collective over the world.

    Sends two numbers per layer. The result has `distance` for each layer, and also `subspace` for each factor.
    """
    if not terms:
        return {}
    sums = torch.tensor([[one.distance, one.subspace or 0.0] for one in terms.values()], dtype=torch.float64)
    sums = sums.to(comm.device)
    comm.all_reduce(sums)
    roots = (sums / comm.topology.world_size).clamp(min=0).sqrt().tolist()
    return {
        name: {"distance": distance} | ({} if term.subspace is None else {"subspace": subspace})
        for (name, term), (distance, subspace) in zip(terms.items(), roots, strict=True)
    }


def _local(letter: str, anchor: Tensor, change: Tensor, mean: Tensor) -> Terms:
    """Returns a worker's terms for one tensor. `letter` is A or B for factors, otherwise empty."""
    X_i, X = (anchor + change).double(), (anchor + mean).double()
    square = float(torch.linalg.vector_norm(X_i - X) ** 2 / torch.linalg.vector_norm(X).clamp(min=1e-30) ** 2)
    if not letter or torch.equal(X_i, X):
        return Terms(square, 0.0 if letter else None)
    if letter == "B":
        X_i, X = X_i.T, X.T
    Q_i, Q = torch.linalg.qr(X_i)[0], torch.linalg.qr(X)[0]
    subspace = float(1 - torch.linalg.matrix_norm(Q_i.T @ Q) ** 2 / Q.shape[1])
    return Terms(square, subspace)
