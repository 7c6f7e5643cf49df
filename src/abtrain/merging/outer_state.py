"""Stores what merges need from one merge to the next, by tensor name, and computes with batches of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from abtrain.comm.checksums import checksum, fingerprint
from abtrain.merging.batches import Batch, cut_into_batches
from abtrain.merging.changes import change, wide
from abtrain.recipes.merges import MergeRule

Tensors = dict[str, Tensor]


class OuterState:
    """Stores the anchors, the outer momentum and the residuals of the tensors that a worker merges.

    The tensors are beside the parameters, or all on one `device`. If that is the CPU's host memory, GPUs hold none of
    this state between merges. Batches of it are then moved to the device of the parameters for each computation, so
    that results stay the same to the bit.

    Attributes:
        anchors: by name, the weights after the last merge, equal on counterparts; half precision is stored in float32.
        momentum: by name, the outer momentum of the merge rule; the same on counterparts.
        residuals: by name, in float32, the part of this worker's changes that lossy wire formats have not sent yet.
    """

    def __init__(self, device: str | None = None) -> None:
        self._device = device
        self.anchors: Tensors = {}
        self.momentum: Tensors = {}
        self.residuals: Tensors = {}

    def anchor(self, tensors: Mapping[str, Tensor]) -> None:
        """Stores the values of tensors as anchors. Keeps momentum and residuals of these tensors only."""
        self.anchors = {}  # first, so that old and new anchors are never in memory together
        self.anchors = {name: self.kept(tensor, tensor.device, wide(tensor.dtype)) for name, tensor in tensors.items()}
        self.momentum = {name: tensor for name, tensor in self.momentum.items() if name in tensors}
        self.residuals = {name: tensor for name, tensor in self.residuals.items() if name in tensors}

    def kept(self, tensor: Tensor, beside: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        """Returns a copy of a tensor, in the memory for this state. `beside` is the device of its parameter."""
        return self._room(tensor, beside, dtype or tensor.dtype).copy_(tensor)

    def _room(self, like: Tensor, beside: torch.device, dtype: torch.dtype) -> Tensor:
        """Returns an uninitialized tensor for this state. All its tensors are created here."""
        device = torch.device(self._device) if self._device else beside
        # A GPU copies to and from pinned memory several times as fast.
        pinned = device.type == "cpu" and beside.type == "cuda"
        return torch.empty_like(like, dtype=dtype, device=device, pin_memory=pinned, requires_grad=False)

    def near(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Returns a stored tensor on the device of its parameter, to compute with it there; not to be written."""
        return tensor.to(device)

    def _home(self, tensor: Tensor) -> Tensor:
        """Returns a computed tensor on the device of this state."""
        return tensor.to(self._device) if self._device else tensor

    def fingerprint(self, names: Iterable[str]) -> int:
        """Returns a hash of the anchors of these tensors."""
        batches = cut_into_batches({name: self.anchors[name] for name in names})
        return fingerprint(*(checksum(batch.flat(self.anchors)) for batch in batches))

    def change(self, batch: Batch, tensors: Mapping[str, Tensor]) -> Tensor:
        """Returns the changes of a batch since the last merge, as one flat tensor."""
        return change(self.anchors_of(batch), batch.flat(tensors))

    def anchors_of(self, batch: Batch) -> Tensor:
        """Returns the anchors of a batch as one flat tensor on the device of the parameters, not to be written."""
        return self.near(batch.flat(self.anchors), batch.device)

    def restore(self, batch: Batch, tensors: Mapping[str, Tensor]) -> None:
        """Writes the anchors of a batch into tensors."""
        if self._device:
            batch.write(tensors, self.anchors_of(batch))
        else:
            torch._foreach_copy_(batch.of(tensors), batch.of(self.anchors))

    def largest(self, batch: Batch, tensors: Mapping[str, Tensor]) -> float:
        """Returns the largest magnitude of the changes of a batch plus that of its residuals. It may be NaN."""
        return _largest(self.change(batch, tensors)) + sum(
            _largest(kept) for kept in self._known(self.residuals, batch)
        )

    def contribution(self, batch: Batch, tensors: Mapping[str, Tensor], weight: float) -> Tensor:
        """Returns the changes of a batch times a weight, plus its residuals, as one flat tensor."""
        numbers = self.change(batch, tensors).mul_(weight) if weight else torch.zeros_like(self.anchors_of(batch))
        residuals = self._flat(self.residuals, batch)
        return numbers if residuals is None else numbers.add_(residuals)

    def stepped_alone(self, batch: Batch, started: Mapping[str, Tensor], rule: MergeRule) -> Tensor:
        """Returns the weights to continue from during a hidden merge, which had the values `started` when it began."""
        before, anchors = batch.flat(started), self.anchors_of(batch)
        own = change(anchors, before)
        step, _ = rule.step(own, self._flat(self.momentum, batch))
        # A step by the change itself leads back to `started`, up to rounding.
        return before if step is own else (anchors + step).to(before.dtype)

    def advance(self, batch: Batch, rule: MergeRule, mean: Tensor, error: Tensor | None) -> None:
        """Moves the anchors of a batch by the rule's step, and stores momentum and rounding errors."""
        step, momentum = rule.step(mean, self._flat(self.momentum, batch))
        torch._foreach_add_(batch.of(self.anchors), batch.views(self._home(step)))
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
            return self.near(batch.flat(store), batch.device)
        if not known:
            return None
        absent = {name: torch.zeros_like(self.anchors[name], dtype=known[0].dtype) for name in batch.names}
        return self.near(batch.flat({**absent, **store}), batch.device)

    def _store(self, store: Tensors, batch: Batch, flat: Tensor) -> None:
        for name in batch.names:
            if name not in store:
                store[name] = self._room(self.anchors[name], batch.device, flat.dtype).zero_()
        batch.write(store, self._home(flat))


def keeps_momentum(rule: MergeRule) -> bool:
    """Returns whether a merge rule has momentum."""
    return rule.step(torch.zeros(()), None)[1] is not None


def held_by_outer_state(
    pieces: Mapping[str, Tensor], anchored: bool, momentum_of: Collection[str], residuals_of: Collection[str]
) -> dict[str, int]:
    """Returns the bytes of the tensors in an `OuterState`.

    Args:
        pieces: this worker's pieces of all tensors that merge; only shapes and dtypes matter.
        anchored: whether there are anchors, as in phases with merges.
        momentum_of: the names of the tensors that have momentum.
        residuals_of: the names of the tensors that have residuals.
    """
    numel = {name: piece.numel() for name, piece in pieces.items()}
    stored = {name: numel[name] * wide(piece.dtype).itemsize for name, piece in pieces.items()}
    return {
        "anchors": sum(stored.values()) if anchored else 0,
        "momentum": sum(stored[name] for name in momentum_of),
        "residuals": sum(torch.float32.itemsize * numel[name] for name in residuals_of),
    }


def _largest(tensor: Tensor) -> float:
    if not tensor.numel():
        return 0.0
    least, most = torch.aminmax(tensor)
    return float(torch.maximum(-least, most))
