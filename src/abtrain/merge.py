"""How groups become one again.

A merge averages what changed in a round, and a rule makes of the average what all workers hold next. With W_0 the
weights that all started the round from, W_i those of worker i at its end, and D = mean_i(W_i - W_0):

    mean            W = W_0 + D
    trained_only    W = W_0 + D * workers / (workers that trained it)
    outer           M = mu M + D ;  W = W_0 + lr (D + mu M)          (Nesterov; DiLoCo, arXiv 2311.08105)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from abtrain.comm.communicator import Communicator
from abtrain.comm.wire import Wire
from abtrain.sync import Mean, Outer, TrainedOnly, WeightSync


class Merger:
    """Merges of one run: what the rounds started from, and the outer momentum.

    Attributes:
        anchors: by name, what all workers held at the start of the round; halves in float32.
        momentum: by name, of `Outer` merges.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._wires: dict[str, Wire] = {}
        self.anchors: dict[str, Tensor] = {}
        self.momentum: dict[str, Tensor] = {}

    def begin(self, tensors: Mapping[str, Tensor]) -> None:
        """A round starts from these tensors, which all workers hold alike."""
        self.anchors = {name: tensor.to(_wide(tensor.dtype), copy=True) for name, tensor in tensors.items()}
        self.momentum = {name: M for name, M in self.momentum.items() if name in tensors}
        for wire in self._wires.values():
            wire.residuals = {name: error for name, error in wire.residuals.items() if name in tensors}

    def forget(self, names: Iterable[str]) -> None:
        """These tensors are about to change their shape or their basis: what was known of them no longer holds."""
        for name in names:
            self.anchors.pop(name, None)
            self.momentum.pop(name, None)
            for wire in self._wires.values():
                wire.forget(name)

    def merge(self, tensors: Mapping[str, Tensor], sync: WeightSync, trainers: Mapping[str, int]) -> None:
        """Ends a round and begins the next: all workers hold the same tensors afterwards, in place.

        Args:
            tensors: what this worker holds, by the names that `begin` got.
            sync: by which rule, over which wire.
            trainers: by name, how many workers trained a tensor, where that is not all of them.
        """
        workers, rule = self._comm.topology.world_size, sync.merge
        wire = self._wires.setdefault(sync.wire, Wire(sync.wire))
        deltas = {name: t.to(self.anchors[name].dtype) - _seen(self.anchors[name], t) for name, t in tensors.items()}
        for name, D in wire.average(deltas, self._comm).items():
            n = workers / trainers.get(name, workers)
            self.anchors[name].add_(RULES[type(rule)](self, rule, name, D, n))
            tensors[name].copy_(self.anchors[name])

    def nesterov(self, rule: Outer, name: str, D: Tensor, n: float) -> Tensor:
        M = self.momentum.setdefault(name, torch.zeros_like(D))
        M.mul_(rule.momentum).add_(D)
        return rule.lr * (D + rule.momentum * M)


RULES: dict[type, Callable[[Merger, Any, str, Tensor, float], Tensor]] = {
    Mean: lambda merger, rule, name, D, n: D,
    TrainedOnly: lambda merger, rule, name, D, n: D * n,
    Outer: Merger.nesterov,
}


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Rounds are anchored in float32: in halves, small outer steps would be lost."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < torch.float32.itemsize else dtype


def _seen(anchor: Tensor, tensor: Tensor) -> Tensor:
    """The anchor as the worker saw it, in its own precision."""
    return anchor.to(tensor.dtype).to(anchor.dtype)
