"""Stores what merges need from one merge to the next, by tensor name, and computes with batches of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from abtrain.comm.checksums import checksum, fingerprint
from abtrain.merging.batches import Batch, cut_into_batches
from abtrain.merging.changes import change, wide
from abtrain.recipes.merges import MergeRule

Tensors = dict[str, Tensor]


class OuterState:
    """Stores the anchors, the outer momentum and the residuals of the tensors that a worker merges.

    Attributes:
        anchors: by name, the weights after the last merge, equal on counterparts; half precision is stored in float32.
        momentum: by name, the outer momentum of the merge rule; the same on counterparts.
        residuals: by name, in float32, the part of this worker's changes that lossy wire formats have not sent yet.
    """

    def __init__(self) -> None:
        self.anchors: Tensors = {}
        self.momentum: Tensors = {}
        self.residuals: Tensors = {}

    def anchor(self, tensors: Mapping[str, Tensor]) -> None:
        """Stores the values of tensors as anchors. Keeps momentum and residuals of these tensors only."""
        self.anchors = {name: tensor.to(wide(tensor.dtype), copy=True) for name, tensor in tensors.items()}
        self.momentum = {name: tensor for name, tensor in self.momentum.items() if name in tensors}
        self.residuals = {name: tensor for name, tensor in self.residuals.items() if name in tensors}

    def fingerprint(self, names: Iterable[str]) -> int:
        """Returns a hash of the anchors of these tensors."""
        batches = cut_into_batches({name: self.anchors[name] for name in names})
        return fingerprint(*(checksum(batch.flat(self.anchors)) for batch in batches))

    def change(self, batch: Batch, tensors: Mapping[str, Tensor]) -> Tensor:
        """Returns the changes of a batch since the last merge, as one flat tensor."""
        return change(batch.flat(self.anchors), batch.flat(tensors))

    def largest(self, batch: Batch, tensors: Mapping[str, Tensor]) -> float:
        """Returns the largest magnitude of the changes of a batch plus that of its residuals. It may be NaN."""
        return _largest(self.change(batch, tensors)) + sum(
            _largest(kept) for kept in self._known(self.residuals, batch)
        )

    def contribution(self, batch: Batch, tensors: Mapping[str, Tensor], weight: float) -> Tensor:
        """Returns the changes of a batch times a weight, plus its residuals, as one flat tensor."""
        numbers = self.change(batch, tensors).mul_(weight) if weight else torch.zeros_like(batch.flat(self.anchors))
        residuals = self._flat(self.residuals, batch)
        return numbers if residuals is None else numbers.add_(residuals)

    def stepped_alone(self, batch: Batch, started: Mapping[str, Tensor], rule: MergeRule) -> Tensor:
        """Returns the weights to continue from during a hidden merge, which had the values `started` when it began."""
        before = batch.flat(started)
        own = change(batch.flat(self.anchors), before)
        step, _ = rule.step(own, self._flat(self.momentum, batch))
        # A step by the change itself leads back to `started`, up to rounding.
        return before if step is own else (batch.flat(self.anchors) + step).to(before.dtype)

    def advance(self, batch: Batch, rule: MergeRule, mean: Tensor, error: Tensor | None) -> None:
        """Moves the anchors of a batch by the rule's step, and stores momentum and rounding errors."""
        step, momentum = rule.step(mean, self._flat(self.momentum, batch))
        torch._foreach_add_(batch.of(self.anchors), batch.views(step))
        if momentum is not None:
            self._store(self.momentum, batch, momentum)
        if error is not None:
            self._store(self.residuals, batch, error)

    def settle(self, names: Iterable[str]) -> None:
        """Drops the residuals of tensors whose changes were sent completely."""
        for name in names:
            self.residuals.pop(name, None)

    def _known(self, store: Tensors, batch: Batch) -> Sequence[Tensor]:
        return [one.of(store[one.name]) for one in batch.ranges if one.name in store]

    def _flat(self, store: Tensors, batch: Batch) -> Tensor | None:
        """Returns stored values of a batch as one flat tensor, with zeros for missing ones; None if all miss."""
        known = self._known(store, batch)
        if len(known) == len(batch.ranges):
            return batch.flat(store)
        if not known:
            return None
        absent = {name: torch.zeros_like(self.anchors[name], dtype=known[0].dtype) for name in batch.names}
        return batch.flat({**absent, **store})

    def _store(self, store: Tensors, batch: Batch, flat: Tensor) -> None:
        for name in batch.names:
            if name not in store:
                store[name] = torch.zeros_like(self.anchors[name], dtype=flat.dtype)
        batch.write(store, flat)


def _largest(tensor: Tensor) -> float:
    if not tensor.numel():
        return 0.0
    least, most = torch.aminmax(tensor)
    return float(torch.maximum(-least, most))
