"""How groups become one again.

A merge averages the workers' changes of a round, and a rule makes of the average what all workers hold next (see
`abtrain.recipes.merges`).

While a hidden merge is under way, a worker trains on from what the rule would make of its own change alone, and the
difference to the outcome is made up when that arrives (eager updates: Kale, Douillard, Donchev, arXiv 2502.12996).

A worker whose part is not finite has no share: the others share what it would have had.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from abtrain.checks import told_names
from abtrain.comm.averages import average_exactly, sent_by_average
from abtrain.comm.checksums import as_bytes, checksum
from abtrain.comm.communicator import Communicator
from abtrain.comm.stages import Stages, together
from abtrain.comm.traffic import Calls
from abtrain.consistency.agreement import ROLL_CALL, Place, Told, gather_json, roll_call, share
from abtrain.errors import NonFiniteError, OnNonFinite
from abtrain.failpoints import fail_at
from abtrain.merging.buffers import Buffers, Compared, is_finite, settled
from abtrain.merging.wires import make_wire
from abtrain.merging.wires.wire import Averages, Wire
from abtrain.recipes.merges import MergeRule, Part
from abtrain.recipes.sync import WeightSync
from abtrain.recipes.wires import wire_between

Tensors = dict[str, Tensor]
_SUBTRACTED = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16}
    | {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}
)
"""Dtypes in which what was added meanwhile can be told; a tensor of another one that changed meanwhile stays."""
Observer = Callable[[Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, Tensor]], None]


class Merger:
    """Merges of one run: what the rounds started from, the outer momentum, and what wires still owe.

    Attributes:
        on_nonfinite: `drop_worker` leaves out parts that are not finite; otherwise they stop all.
        anchors: by name, what all workers held at the start of the round; halves in float32.
        momentum: by name, what a merge rule keeps of its steps; the same on all workers.
        residuals: by name, float32: what narrow wires have taken from this worker's changes and not sent yet.
        observer: told of each merge to which all workers bring a part: changes, their average, and the anchors. Called
            on all workers alike.
    """

    def __init__(self, comm: Communicator, on_nonfinite: OnNonFinite = "stop") -> None:
        self._comm = comm
        self.on_nonfinite = on_nonfinite
        self._wires: dict[str, Wire] = {}
        self.anchors: Tensors = {}
        self.momentum: Tensors = {}
        self.residuals: Tensors = {}
        self._buffers = Buffers(comm)
        self.observer: Observer | None = None

    def begin(self, tensors: Mapping[str, Tensor]) -> None:
        """A phase of rounds starts from these tensors, which all workers hold alike."""
        self.anchors = {name: tensor.to(wide(tensor.dtype), copy=True) for name, tensor in tensors.items()}
        for store in (self.momentum, self.residuals):
            for name in store.keys() - tensors.keys():
                del store[name]

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on from here."""
        starts = {name: dict(wire.starts) for name, wire in self._wires.items() if wire.starts}
        stores = {"anchors": self.anchors, "momentum": self.momentum, "residuals": self.residuals}
        stored = {name: dict(store) for name, store in stores.items()}
        return {"starts": starts, "buffers": self._buffers.state_dict(), **stored}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Replaces all that is held by copies of what a `state_dict` holds, on `device`."""

        def copies(store: Mapping[str, Tensor]) -> Tensors:
            return {name: tensor.to(device, copy=True) for name, tensor in store.items()}

        self.anchors, self.momentum = copies(state["anchors"]), copies(state["momentum"])
        self.residuals, self._wires = copies(state["residuals"]), {}
        self._buffers.load_state_dict(state["buffers"])
        for name, starts in state["starts"].items():
            self.wire(name).starts = copies(starts)

    def wire(self, name: str) -> Wire:
        """The wire of that name, the same at every call."""
        if name not in self._wires:
            self._wires[name] = make_wire(wire_between(self._comm.topology.world_size, name))
        return self._wires[name]

    def merge(
        self,
        tensors: Mapping[str, Tensor],
        sync: WeightSync,
        trained_by: Mapping[str, Sequence[bool]],
        *,
        buffers: Mapping[str, Tensor] | None = None,
        started: Mapping[str, Tensor] | None = None,
        loss: float | None = None,
        place: Place | None = None,
        averaged: Collection[str] = (),
        current: Callable[[], Mapping[str, Tensor]] | None = None,
    ) -> Stages[tuple[int, ...]]:
        """Merges, in stages: what changed is read now, and the outcome written, in place, at the end.

        Nothing of the merger itself changes before that: a merge that is begun again from the same `started` comes to
        the same end.

        What this worker has changed in the meantime is kept, on top of the outcome.

        Args:
            tensors: what this worker holds, by names that `begin` got.
            sync: by which rule, over which wire.
            trained_by: by name, for each worker whether it trained the tensor, where not all did.
            buffers: real tensors of any dtype, by name. One that all workers hold the same stays as it is, whatever it
                holds.
            started: copies of `tensors` and `buffers` as they were when the merge began; None: as they are now, and
                nothing is trained before the merge ends.
            loss: this worker's mean training loss in the round, if it is known.
            place: what has to be alike on all workers that merge, such as `step`.
            current: gives the buffers as they are when the merge ends.
            averaged: names of the buffers that are averaged where they differ; the others follow one worker.

        Returns:
            Ranks of the workers whose part was left out, the same on all workers.

        Raises:
            RanksDisagreeError: it is not. On all workers.
            NonFiniteError: a part is not finite, and parts are not to be dropped; or none is finite, or their average
                is not. On all workers.
        """
        buffers, place = buffers or {}, place or {}
        held = {**tensors, **buffers}
        at_once = started is None
        started = held if started is None else started
        deltas = {name: _change(self.anchors[name], started[name]) for name in tensors}
        sums = {name: checksum(started[name]) for name in buffers}
        told = self._buffers.told({name: started[name] for name in buffers}, sums)
        rows = yield from roll_call(self._comm, place, _told(deltas, told, loss))
        parts = [Part(*row) for row in rows]
        step = place.get("step")
        fail_at(self._comm.rank, step if isinstance(step, int) else 0, "merge.agreed")
        compared = self._buffers.compare(
            {name: started[name] for name in buffers}, sums, [part.buffers for part in parts]
        )
        alive = self._alive(parts, compared, deltas)
        followed = {name: started[name].clone() for name in compared.differing if name not in averaged}
        share(self._comm, list(followed.values()), [alive.index(True)] * len(followed))
        floats = [name for name in compared.differing if name not in followed]
        numbers = self._contribution(sync.merge, deltas, alive, trained_by, parts)
        averages, means = yield from together(
            self.wire(sync.wire).average(numbers, self._comm),
            average_exactly(self._equal_parts([started[name] for name in floats], alive), self._comm),
        )
        _check_finite(averages.mean | dict(zip(floats, means, strict=True)))
        if self.observer is not None and all(alive):
            self.observer(deltas, averages.mean, self.anchors)
        # What was trained meanwhile began from there; said before the anchors move on.
        base = (
            held if at_once else {**started, **{name: self.eager(sync.merge, name, started[name]) for name in tensors}}
        )
        merged = {name: settled(name, mean) for name, mean in zip(floats, means, strict=True)} | followed
        self._buffers.merged(merged)
        outcome = self._arrive(sync.merge, averages) | merged
        # Buffers may have been bound anew while the merge was under way.
        held |= current() if current is not None else {}
        for name, value in outcome.items():
            if held[name].shape != value.shape:
                continue
            # A worker without a share has nothing finite to keep.
            held[name].copy_(_moved(value, held[name], base[name]) if alive[self._comm.rank] else value)
        return tuple(rank for rank, is_well in enumerate(alive) if not is_well)

    def eager(self, rule: MergeRule, name: str, started: Tensor) -> Tensor:
        """The tensor that a worker trains on from while its merge is hidden, given what it held when that began."""
        anchor = self.anchors[name]
        change = _change(anchor, started)
        step, _ = rule.step(change, self.momentum.get(name))
        # A step by the change itself leads back to `started`, but for rounding.
        return started if step is change else (anchor + step).to(started.dtype)

    def _arrive(self, rule: MergeRule, averages: Averages) -> Tensors:
        """Returns the weights that all workers hold next, by name, and keeps the wire's residuals."""
        for name, D in averages.mean.items():
            self.residuals.pop(name, None)
            step, momentum = rule.step(D, self.momentum.get(name))
            self.anchors[name].add_(step)
            if momentum is not None:
                self.momentum[name] = momentum
        self.residuals |= averages.error
        return {name: self.anchors[name] for name in averages.mean}

    def _contribution(
        self,
        rule: MergeRule,
        deltas: Mapping[str, Tensor],
        alive: Sequence[bool],
        trained_by: Mapping[str, Sequence[bool]],
        parts: Sequence[Part],
    ) -> Tensors:
        """Returns this worker's part of the plain average over all workers: its share, and the wire's residuals."""
        rank, workers = self._comm.rank, self._comm.topology.world_size
        numbers = {}
        for name, delta in deltas.items():
            trained = [a and t for a, t in zip(alive, trained_by.get(name, [True] * workers), strict=True)]
            share = rule.shares(alive, trained, parts)[rank]
            numbers[name] = delta * (share * workers) if alive[rank] else torch.zeros_like(delta)
            if name in self.residuals:
                numbers[name] += self.residuals[name]
        return numbers

    def _equal_parts(self, tensors: Sequence[Tensor], alive: Sequence[bool]) -> list[Tensor]:
        """Likewise, for a plain average over those who are alive."""
        scale = len(alive) / sum(alive)
        mine = alive[self._comm.rank]
        return [tensor * scale if mine else torch.zeros_like(tensor) for tensor in tensors]

    def forget(self, names: Sequence[str]) -> None:
        """Drops what wires have learnt about tensors whose shape or basis changes."""
        for wire in self._wires.values():
            wire.forget(names)

    def _alive(self, parts: Sequence[Part], compared: Compared, deltas: Mapping[str, Tensor]) -> list[bool]:
        """Which workers' parts are finite.

        Args:
            parts: what all workers told.
            compared: how their buffers compare.
            deltas: what this worker has changed.

        Raises:
            NonFiniteError: as `merge` says.
        """
        spoiled = {rank for ranks in compared.broken.values() for rank in ranks}
        alive = [part.finite and rank not in spoiled for rank, part in enumerate(parts)]
        broken = [rank for rank, well in enumerate(alive) if not well]
        if broken and (self.on_nonfinite != "drop_worker" or not any(alive)):
            remedy = ", or leave such parts out: on_nonfinite='drop_worker'" if any(alive) else ""
            raise NonFiniteError(
                f"NaN or infinity in what rank {', '.join(map(str, broken))} brought to the merge"
                f"{self._where(broken, compared, deltas)}: nothing was averaged. Lower the learning rate, or clip "
                f"gradients{remedy}"
            )
        return alive

    def _where(self, broken: Sequence[int], compared: Compared, deltas: Mapping[str, Tensor]) -> str:
        """The names of what is not finite on these ranks, in brackets. Collective over the world."""
        named = [told_names([n for n, delta in deltas.items() if not is_finite(delta)])]
        named += [f"buffer {name}" for name, ranks in compared.broken.items() if self._comm.rank in ranks]
        told = gather_json(self._comm, ", ".join(filter(None, named)))
        of_ranks = [f"rank {rank}: {told[rank]}" if len(broken) > 1 else told[rank] for rank in broken]
        return f" ({'; '.join(of_ranks)})"


def sent_by_merge(wire: str, tensors: Sequence[Tensor], averaged: Sequence[Tensor], workers: int) -> tuple[Calls, ...]:
    """The calls of `Merger.merge`, stage by stage, where buffers differ as they did at the merge before.

    Args:
        wire: its name.
        tensors: that merge, by their shapes.
        averaged: buffers that differ and are averaged.
        workers: how many.
    """
    first, *more = make_wire(wire_between(workers, wire)).sends(tensors, workers)
    return ROLL_CALL, (*first, *sent_by_average(averaged)), *more


def _told(deltas: Mapping[str, Tensor], buffers: int, loss: float | None) -> Told:
    """Returns the two numbers that a worker sends to all others: those of a `Part`."""
    content = buffers if all(map(is_finite, deltas.values())) else -1
    return content, math.nan if loss is None else loss if math.isfinite(loss) else math.inf


def _moved(outcome: Tensor, tensor: Tensor, base: Tensor) -> Tensor:
    """The outcome of a merge, with what `tensor` has changed since it was `base` on top."""
    if outcome.dtype not in _SUBTRACTED:
        same = as_bytes(tensor.contiguous()).equal(as_bytes(base.contiguous()))
        return outcome if same else tensor
    return outcome + (tensor.to(outcome.dtype) - base)


def _check_finite(averages: Mapping[str, Tensor]) -> None:
    """All workers hold the same averages, and so all raise or none."""
    broken = [name for name, average in averages.items() if not bool(torch.isfinite(average).all())]
    if broken:
        raise NonFiniteError(
            f"what workers brought to the merge is finite, but its average is not ({told_names(broken)}): numbers are "
            "near the largest that the wire or float32 can hold, and no weight was changed. Lower the learning rate, "
            "or clip gradients"
        )


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a parameter's anchor. Rounds are anchored in float32: in halves, small outer steps would be lost."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < torch.float32.itemsize else dtype


def _change(anchor: Tensor, tensor: Tensor) -> Tensor:
    """Returns the change that a worker has made to the anchor, in its own precision."""
    return tensor.to(anchor.dtype) - anchor.to(tensor.dtype).to(anchor.dtype)
