"""How groups become one again: one function each, and the table that recipes name them by."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from abtrain.comm.buckets import pack, unpack
from abtrain.comm.communicator import Communicator
from abtrain.lowrank.optimizer import LINEAR_MOMENTS, SQUARED_MOMENTS

Merge = Callable[[Sequence[Tensor], Communicator], list[Tensor]]
"""(what this worker holds, communicator) -> what every worker holds afterwards, the same bits on all."""


def mean(local: Sequence[Tensor], comm: Communicator) -> list[Tensor]:
    """The average over all workers, trained and frozen parts alike (Algorithm 1, lines 15 and 16).

    Where half of the workers trained a factor and the others kept it, its update is halved: that is the paper's merge.

    Args:
        local: tensors of the same shapes and dtypes on all workers; not changed.

    Returns:
        New tensors of the same shapes and dtypes. Halves are summed in float32.
    """
    buckets = pack(local)
    for bucket in buckets:
        comm.all_reduce(bucket.flat)
        bucket.flat.div_(comm.topology.world_size)
    return unpack(buckets, local)


MERGES: dict[str, Merge] = {"mean": mean}


def average_optimizer_state(optimizer: Optimizer, parameters: Sequence[nn.Parameter], comm: Communicator) -> None:
    """Gives all workers the same moments for `parameters`, in place: the average over those that have any.

    Workers that go on in full-rank data parallel apply the same gradient, but stay equal only if their optimizers hold
    the same state. Step counts become the largest of any worker (a gradient scaler may have skipped steps in some
    groups).
    """
    if comm.topology.world_size == 1 or not parameters:
        return
    keys = sorted(LINEAR_MOMENTS | SQUARED_MOMENTS)
    states = [optimizer.state.get(parameter, {}) for parameter in parameters]
    slots = [(state, key) for state in states for key in keys]
    holders = torch.tensor([isinstance(state.get(key), Tensor) for state, key in slots], dtype=torch.int64)
    steps = torch.tensor([float(state.get("step", 0)) for state in states], dtype=torch.float64)
    holders, steps = holders.to(comm.device), steps.to(comm.device)
    comm.all_reduce(holders)
    comm.all_reduce(steps, op="max")

    counts = holders.tolist()
    owners = [parameter for parameter in parameters for _ in keys]
    held = [i for i, count in enumerate(counts) if count]
    local = [_moment(*slots[i], like=owners[i]) for i in held]
    buckets = pack(local)
    for bucket in buckets:
        comm.all_reduce(bucket.flat)
    for i, total in zip(held, unpack(buckets, local), strict=True):
        optimizer.state[owners[i]][slots[i][1]] = total / counts[i]
    for parameter, step in zip(parameters, steps.tolist(), strict=True):
        if step:
            _set_step(optimizer.state[parameter], step)


def _moment(state: dict[str, object], key: str, like: Tensor) -> Tensor:
    value = state.get(key)
    return value if isinstance(value, Tensor) else torch.zeros_like(like, requires_grad=False)


def _set_step(state: dict[str, object], step: float) -> None:
    known = state.get("step")
    if isinstance(known, Tensor):
        known.fill_(step)
    else:
        state["step"] = torch.tensor(step, dtype=torch.float32)
