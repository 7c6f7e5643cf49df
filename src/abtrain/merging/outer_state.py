"""Stores what merges need from one merge to the next, by tensor name, and computes with batches of it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from abtrain.comm.checksums import checksum, fingerprint
from abtrain.memory import allocated
from abtrain.merging.batches import Batch
from abtrain.merging.changes import change, wide
from abtrain.merging.held import Held
from abtrain.merging.store import Layout, Store
from abtrain.merging.wires.flat import Parts, Write, joined, parts_of
from abtrain.merging.wires.scratch import Scratch
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
        self.anchors, self.momentum, self.residuals = (Store(room=self._room) for _ in range(3))

    def anchor(self, tensors: Held) -> None:
        """Stores the values of tensors as anchors. Keeps momentum and residuals of these tensors only."""
        self.anchors.clear()  # first, so that old and new anchors are never in memory together
        self.anchors = Store.of(tensors, self._room, widened=True)
        layout = Layout(tensors)
        self.momentum.lay_out(layout)
        self.residuals.lay_out(layout)

    def restore(self, anchors: Tensors, momentum: Tensors, residuals: Tensors, device: torch.device) -> None:
        """Replaces everything that is stored by these tensors, without copying them.

        `device` is that of the parameters.
        """
        layout = Layout(anchors, device)
        self.anchors, self.momentum, self.residuals = (Store(layout, self._room) for _ in range(3))
        self.anchors.update(anchors)
        self.momentum.update(momentum)
        self.residuals.update(residuals)

    def kept(self, tensor: Tensor, beside: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        """Returns a copy of a tensor, in the memory for this state. `beside` is the device of its parameter."""
        return self._room(tensor, beside, dtype or tensor.dtype).copy_(tensor)

    def _room(self, like: Tensor, beside: torch.device, dtype: torch.dtype) -> Tensor:
        """Returns an uninitialized tensor for this state. All its tensors are created here."""
        device = torch.device(self._device) if self._device else beside
        # A GPU copies to and from pinned memory several times as fast.
        if device.type == "cpu" and beside.type == "cuda":
            return torch.empty(like.shape, dtype=dtype, device=device, pin_memory=True)
        return allocated(like.numel(), dtype, device).view(like.shape)

    def near(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Returns a stored tensor on the device of its parameter, to compute with it there; not to be written."""
        return tensor.to(device)

    def _home(self, tensor: Tensor) -> Tensor:
        """Returns a computed tensor on the device of this state."""
        return tensor.to(self._device) if self._device else tensor

    def fingerprint(self, tensors: Held) -> int:
        """Returns a hash of the anchors of these tensors."""
        return fingerprint(*(checksum(_flat(self.anchors, batch)) for batch in tensors.batches()))

    def change(self, batch: Batch, tensors: Held | Store) -> Tensor:
        """Returns the changes of a batch since the last merge, as one flat tensor."""
        return change(self.anchors_of(batch), _flat(tensors, batch))

    def largest(self, batch: Batch, tensors: Held | Store, changes: Tensor | None = None) -> float:
        """Returns the largest magnitude of the changes of a batch plus that of its residuals. It may be NaN.

        Where all numbers are moderate, an upper bound takes its place, which takes half of the time. `changes` are
        the changes, if they are known.
        """
        residuals = self._known(self.residuals, batch)
        values, anchors = (_flat(tensors, batch), self.anchors_of(batch)) if changes is None else (changes, None)
        bound = sum(map(_bound, (flat for flat in (values, anchors, residuals) if flat is not None)))
        if math.isfinite(bound):
            return bound
        if anchors is None:
            found = _largest(values, lambda part, out: torch.abs(values[part], out=out))
        else:
            found = _largest(anchors, lambda part, out: change(anchors[part], values[part], out=out).abs_())
        if residuals is None:
            return found
        return found + _largest(residuals, lambda part, out: torch.abs(residuals[part], out=out))

    def contribution(self, batch: Batch, started: Held | Store, changes: Tensor | None, weight: float) -> Write:
        """Returns a function that writes a range of the changes of a batch times a weight, plus residuals.

        `changes` are the changes, if they are known.
        """
        residuals = self._known(self.residuals, batch)
        values, anchors = (_flat(started, batch), self.anchors_of(batch)) if changes is None else (changes, None)

        def write(part: slice, out: Tensor) -> None:
            if not weight:
                out.zero_()
            elif anchors is None:
                out.copy_(values[part])
            else:
                change(anchors[part], values[part], out=out)
            if weight not in (0, 1):
                out.mul_(weight)
            if residuals is not None:
                out.add_(residuals[part])

        return write

    def errors_of(self, batch: Batch) -> Tensor | None:
        """Returns memory for the rounding errors of a batch, in place of its residuals; None if there is none."""
        if batch.device.type != "cpu" or batch.dtype != torch.float32 or self._device:
            return None
        return self.residuals.memory(batch, torch.float32)

    def stepped_alone(self, batch: Batch, started: Held | Store, rule: MergeRule) -> Tensor:
        """Returns the weights to continue from during a hidden merge, which had the values `started` when it began."""
        before = _flat(started, batch)
        own = change(self.anchors_of(batch), before)
        step, _ = rule.step(own, self._known(self.momentum, batch))
        # A step by the change itself leads back to `started`, up to rounding.
        return before if step is own else (self.anchors_of(batch) + step).to(before.dtype)

    def advance(
        self, batch: Batch, rule: MergeRule, mean: Parts, error: Tensor | None, to: Tensor | None
    ) -> Tensor | None:
        """Moves the anchors of a batch by the rule's step, and stores momentum and rounding errors.

        `mean` is computed part by part, so that everything between it and the anchors stays in a CPU's cache. Copies
        the anchors into the flat tensor `to`, or returns them as one flat tensor if it is None.
        """
        known, anchors = self._known(self.momentum, batch), self.anchors.memory(batch, batch.dtype)
        if anchors is None:
            whole = allocated(batch.numel, batch.dtype, batch.device)
            step, momentum = rule.step(joined(mean, whole), known)
            self.anchors.add(batch, self._home(step))
            if momentum is not None:
                self.momentum.put(batch, self._home(momentum))
        else:
            for place, part in mean:
                for piece in parts_of(part):
                    at = slice(place.start + piece.start, min(place.start + piece.stop, place.stop))
                    self._advance(batch, rule, at, part[piece], known, anchors)
                    if to is not None:
                        to[at].copy_(anchors[at])
        if error is not None:
            memory = self.residuals.memory(batch, error.dtype)
            if memory is None or memory.data_ptr() != error.data_ptr():
                self.residuals.put(batch, self._home(error))
        if to is None:
            return self.anchors_of(batch)
        if anchors is None:
            to.copy_(self.anchors_of(batch))
        return None

    def _advance(
        self, batch: Batch, rule: MergeRule, place: slice, mean: Tensor, known: Tensor | None, anchors: Tensor
    ) -> None:
        step, momentum = rule.step(mean, None if known is None else known[place])
        anchors[place].add_(self._home(step))
        if momentum is not None:
            kept = self.momentum.memory(batch, momentum.dtype)
            assert kept is not None, "anchors lie side by side, and momentum does not"
            kept[place].copy_(momentum)

    def settle(self, names: Iterable[str]) -> None:
        """Drops the residuals of tensors whose changes were sent completely."""
        for name in names if self.residuals else ():
            self.residuals.pop(name, None)

    def anchors_of(self, batch: Batch) -> Tensor:
        """Returns the anchors of a batch as one flat tensor on the device of the parameters, not to be written."""
        return self.near(_flat(self.anchors, batch), batch.device)

    def _known(self, store: Store, batch: Batch) -> Tensor | None:
        """Returns stored values of a batch, with zeros for missing ones, on the device of the parameters."""
        flat = store.flat(batch)
        return None if flat is None else self.near(flat, batch.device)


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


def _flat(tensors: Held | Store, batch: Batch) -> Tensor:
    flat = tensors.flat(batch)
    assert flat is not None, f"no value of {batch.names[0]} is stored"
    return flat


def _bound(flat: Tensor) -> float:
    """Returns an upper bound of the magnitudes; infinity or NaN if it is unknown.

    It is the Euclidean norm, which is known if the sum of squares is finite, and then below 2e19. Squares of numbers
    below 1e-19 may become 0, and such numbers exceed it.
    """
    return math.sqrt(float(torch.dot(flat, flat))) if flat.dtype == torch.float32 else math.inf


def _largest(flat: Tensor, magnitudes: Write) -> float:
    """Returns the largest of the magnitudes of a tensor like `flat`; NaN if one of them is NaN."""
    scratch, largest = Scratch(flat), -1.0
    for part in parts_of(flat):
        out = scratch(0, flat[part].shape, flat.dtype)
        magnitudes(part, out)
        found = float(_most(out))
        if math.isnan(found):
            return found
        largest = max(largest, found)
    return max(largest, 0.0)


def _most(magnitudes: Tensor) -> Tensor:
    # Floats from 0 on have the order of their bits, and PyTorch finds the largest integer five times as fast.
    if magnitudes.dtype == torch.float32:
        return magnitudes.view(torch.int32).amax().view(torch.float32)
    return magnitudes.amax()
