"""Lets the workers of a group share the work of Muon's steps.

Within a group, gradients are averaged at every step, so all workers would orthogonalize the same matrices.
"""

from __future__ import annotations

from abtrain.comm.communicator import Communicator
from abtrain.consistency.factors import SHARED_FROM
from abtrain.lowrank.optimizers import Optimizers
from abtrain.optim import Muon, Sharing


def are_shared(numbers: int, workers: int) -> bool:
    """Returns whether the workers of a group share the steps of a Muon that trains so many numbers."""
    return workers > 1 and numbers >= SHARED_FROM


def share_steps(optimizers: Optimizers, comm: Communicator) -> None:
    """Divides the steps of large Muon optimizers among the workers of each group."""
    ranks = comm.ranks("group")
    shared = Sharing(len(ranks), ranks.index(comm.rank), lambda tensor, at: comm.broadcast(tensor, ranks[at], "group"))
    for one in _muons(optimizers):
        numbers = sum(p.numel() for group in one.param_groups for p in group["params"])
        one.sharing = shared if are_shared(numbers, len(ranks)) else Sharing()


def unshare_steps(optimizers: Optimizers) -> None:
    """Lets each worker make whole steps again."""
    for one in _muons(optimizers):
        one.sharing = Sharing()


def _muons(optimizers: Optimizers) -> list[Muon]:
    return [one for one in optimizers.all if isinstance(one, Muon)]
