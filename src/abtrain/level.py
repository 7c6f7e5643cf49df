"""What else must be alike on all workers before they share gradients again: optimizer state and loss scale.

Workers that apply the same gradient stay equal only if their optimizers hold the same state, and averaged gradients
are right only if all were scaled alike. Groups that trained on their own leave with both of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from abtrain.comm.buckets import pack, unpack
from abtrain.comm.communicator import Communicator
from abtrain.lowrank.optimizer import LINEAR_MOMENTS, SQUARED_MOMENTS


def level_optimizer_state(optimizer: Optimizer, parameters: Sequence[nn.Parameter], comm: Communicator) -> None:
    """Gives all workers the same moments for `parameters`, in place: the average over those that have any.

    Step counts become the largest of any worker (a gradient scaler may have skipped steps in some groups).
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


def level_grad_scaler(scaler: torch.amp.GradScaler, comm: Communicator) -> None:
    """Gives all workers the lowest loss scale of any, in place."""
    state = scaler.state_dict()
    if not state:  # a scaler that is not enabled
        return
    low = torch.tensor([-state["scale"], -state["_growth_tracker"]], dtype=torch.float32).to(comm.device)
    comm.all_reduce(low, op="max")
    state["scale"], state["_growth_tracker"] = -low[0].item(), int(-low[1].item())
    scaler.load_state_dict(state)


def _moment(state: dict[str, object], key: str, like: Tensor) -> Tensor:
    value = state.get(key)
    return value if isinstance(value, Tensor) else torch.zeros_like(like, requires_grad=False)


def _set_step(state: dict[str, object], step: float) -> None:
    known = state.get("step")
    if isinstance(known, Tensor):
        known.fill_(step)
    else:
        state["step"] = torch.tensor(step, dtype=torch.float32)
