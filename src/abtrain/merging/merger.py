"""Merges the workers' models: all workers get the same new weights, computed from the changes of each worker.

A merge averages the changes that workers have made to their weights since the last merge. Changes are sent in a wire
format, which may compress them. A rule turns the average into new weights (see `abtrain.recipes.merges`).

A hidden merge sends its messages during the next training steps. Meanwhile, each worker trains from the weights that
the rule computes from its own change alone. When the average arrives, the difference to the merged weights is added
(eager updates: Kale, Douillard, Donchev, arXiv 2502.12996).

A worker whose values are not finite may be excluded from the average. The other workers then get larger shares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from abtrain.checks import told_names
from abtrain.comm.buckets import average_over_world, sent_by_average_over_world
from abtrain.comm.checksums import checksum
from abtrain.comm.communicator import Calls, Communicator
from abtrain.comm.stages import Stages, timed, together
from abtrain.comm.topology import Topology
from abtrain.consistency.agreement import ROLL_CALL, Place, gather_json, roll_call, share
from abtrain.errors import NonFiniteError, OnNonFinite
from abtrain.failpoints import fail_at
from abtrain.merging.buffers import Buffers, settled
from abtrain.merging.changes import change, is_finite, wide, write
from abtrain.merging.divergence import Distances, divergence
from abtrain.merging.places import Places, piece, sent_by_gathered, sent_by_spread
from abtrain.merging.wires.wire import Averages, Wire, make_wire
from abtrain.recipes.merges import MergeRule, Part
from abtrain.recipes.sync import WeightSync

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class MergeInput:
    """The input of one worker to one merge.

    Attributes:
        tensors: a function that returns the present tensors to merge, by the names passed to `Merger.begin`. The
            merge overwrites them in place at its end. They are equal on all workers of a group.
        sync: the settings of the merge, such as its rule and its wire format.
        trained_by: by tensor name, whether each worker trained the tensor. If a name is missing, all workers did.
        buffers: a function that returns the present buffers by name, as real tensors of any dtype. Buffers that
            are equal on all workers keep their values.
        averaged: the names of the buffers that are averaged if they differ. Other buffers take one worker's values.
        started: copies of this worker's pieces of the tensors, and of buffers, made when a hidden merge began; None if
            the merge is not hidden.
        loss: this worker's mean training loss since the last merge; None if it is unknown.
        step: the number of training steps done when the merge began.
        place: values by name, such as the step, that must be equal on all workers that merge.
        factors: the names of the tensors that are factors of a weight.
    """

    tensors: Callable[[], Mapping[str, Tensor]]
    sync: WeightSync
    trained_by: Mapping[str, Sequence[bool]]
    buffers: Callable[[], Mapping[str, Tensor]] = dict
    averaged: Collection[str] = ()
    started: Mapping[str, Tensor] | None = None
    loss: float | None = None
    step: int = 0
    place: Place = field(default_factory=dict)
    factors: Collection[str] = ()


class Merger:
    """Merges the weights of all workers, and keeps the state that is needed between merges.

    Attributes:
        on_nonfinite: `drop_worker` excludes workers whose values are not finite; otherwise all workers stop.
        places: cuts tensors into the pieces that this worker merges. All state below is of these pieces.
        anchors: by name, the weights after the last merge, equal on counterparts; half precision is stored in float32.
        momentum: by name, the outer momentum of the merge rule; the same on counterparts.
        residuals: by name, in float32, the part of this worker's changes that lossy wire formats have not sent yet.
        measures_divergence: whether to measure the divergence of weights in each merge that excludes no worker.
    """

    def __init__(
        self, comm: Communicator, on_nonfinite: OnNonFinite = "stop", measures_divergence: bool = False
    ) -> None:
        self._comm = comm
        self.on_nonfinite, self.measures_divergence = on_nonfinite, measures_divergence
        self._wires: dict[str, Wire] = {}
        self.places = Places(comm)
        self.anchors: Tensors = {}
        self.momentum: Tensors = {}
        self.residuals: Tensors = {}
        self._buffers = Buffers(comm)

    def begin(self, tensors: Mapping[str, Tensor]) -> None:
        """Prepares the merges of a phase. `tensors` are the weights to merge, by name, equal on all workers."""
        pieces = self.places.pieces(tensors)
        self.anchors = {name: tensor.to(wide(tensor.dtype), copy=True) for name, tensor in pieces.items()}
        self.momentum = {name: tensor for name, tensor in self.momentum.items() if name in tensors}
        self.residuals = {name: tensor for name, tensor in self.residuals.items() if name in tensors}

    def state_dict(self) -> dict[str, Any]:
        """Returns the size of groups, all tensors, the state of wires, and checksums of buffers that have differed."""
        return {
            "places": self.places.count,
            "starts": {name: dict(wire.starts) for name, wire in self._wires.items() if wire.starts},
            "buffers": dict(self._buffers.differed),
            "anchors": dict(self.anchors),
            "momentum": dict(self.momentum),
            "residuals": dict(self.residuals),
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restores a `state_dict`, with copies of its tensors on `device`."""

        def copies(store: Mapping[str, Tensor]) -> Tensors:
            return {name: tensor.to(device, copy=True) for name, tensor in store.items()}

        self.anchors, self.momentum = copies(state["anchors"]), copies(state["momentum"])
        self.residuals, self._wires = copies(state["residuals"]), {}
        self._buffers.differed = dict(state["buffers"])
        for name, starts in state["starts"].items():
            self.wire(name).starts = copies(starts)

    def wire(self, name: str) -> Wire:
        """Returns the `Wire` for a wire format: the same object at each call, since it may have state."""
        if name not in self._wires:
            self._wires[name] = make_wire(name, self._comm.topology.n_groups)
        return self._wires[name]

    def merge(self, part: MergeInput) -> Stages[tuple[dict[str, Any], Distances]]:
        """Merges in stages: reads this worker's changes first, and writes the new weights in place last.

        Weights, anchors, momentum and residuals change in the last stage only, so a merge that is restarted from the
        same `started` has the same outcome. Changes that this worker makes during the merge are added to the outcome.

        Returns:
            A report, and the divergence by layer (empty if it is not measured). The report has the input's `step`, the
            ranks of excluded workers (`dropped`), each worker's mean loss (`losses`), and the seconds that this worker
            waited for the others at the start (`wait_seconds`).

        Raises:
            RanksDisagreeError: `place` differs between workers; raised on all of them.
            NonFiniteError: a worker's values are not finite, and `on_nonfinite` is not `drop_worker`; or no worker's
                values are finite, or their average is not. Raised on all workers.
        """
        pieces = self.places.pieces(part.tensors())
        started = {**pieces, **part.buffers()} if part.started is None else part.started
        buffers = {name: started[name] for name in part.buffers()}
        changes = {name: change(self.anchors[name], started[name]) for name in pieces}
        reports, differing, waited = yield from self._compare(part, changes, buffers)
        alive = self._alive(reports, differing, changes)
        floats = [name for name in differing if name in part.averaged]
        merged = {name: buffers[name].clone() for name in differing if name not in part.averaged}
        share(self._comm, list(merged.values()), [alive.index(True)] * len(merged))
        scale, mine = len(alive) / sum(alive), alive[self._comm.rank]
        scaled = [buffers[name] * scale if mine else torch.zeros_like(buffers[name]) for name in floats]
        averages, means = yield from together(
            self.wire(part.sync.wire).average(self._shares(part, changes, alive, reports), self._comm),
            average_over_world(scaled, self._comm),
        )
        mean_buffers = dict(zip(floats, means, strict=True))
        self._check_finite(averages.mean | mean_buffers)
        distances: Distances = {}
        if self.measures_divergence and all(alive):
            distances = self._divergence(part, changes, averages.mean)
        # The weights from which training continued. They depend on the anchors, which are replaced below.
        eager = {} if part.started is None else {n: self.eager(part.sync.merge, n, started[n]) for n in changes}
        merged |= {name: settled(name, mean) for name, mean in mean_buffers.items()}
        self._buffers.merged(merged)
        outcome = self._advance_anchors(part.sync.merge, averages) | merged
        tensors = part.tensors()
        write({**self.places.pieces(tensors), **part.buffers()}, outcome, {**started, **eager} if mine else None)
        self.places.spread(tensors)
        dropped = [rank for rank, is_alive in enumerate(alive) if not is_alive]
        losses = [report.loss for report in reports]
        return {"step": part.step, "dropped": dropped, "losses": losses, "wait_seconds": waited}, distances

    def _compare(
        self, part: MergeInput, changes: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
    ) -> Stages[tuple[list[Part], dict[str, list[int]], float]]:
        """Compares `place` and buffers. Returns all reports, the buffers that differ, and the seconds waited."""
        sums = {name: checksum(buffer) for name, buffer in buffers.items()}
        content = self._buffers.report(buffers, sums) if all(map(is_finite, changes.values())) else -1
        loss = part.loss if part.loss is None or math.isfinite(part.loss) else math.inf
        calling = roll_call(self._comm, part.place, (content, math.nan if loss is None else loss))
        rows, waited = yield from timed(calling, lambda: self._comm.meter.sync_seconds)
        reports = [Part(*row) for row in rows]
        fail_at(self._comm.rank, part.step, "merge.agreed")
        return reports, self._buffers.compare(buffers, sums, [report.buffers for report in reports]), waited

    def _divergence(self, part: MergeInput, changes: Tensors, mean: Tensors) -> Distances:
        shapes = {name: tensor.shape for name, tensor in part.tensors().items()}
        anchors = {name: self.anchors[name] for name in mean}
        moved, average, before = (self.places.joined(pieces, shapes) for pieces in (changes, mean, anchors))
        return divergence(self._comm, moved, average, before, part.factors)

    def _check_finite(self, averages: Mapping[str, Tensor]) -> None:
        """Raises NonFiniteError on all workers if an average is not finite. Collective in the group."""
        broken = [name for name, average in averages.items() if not is_finite(average)]
        if any(self.places.gathered(len(broken))):
            where = told_names(broken) or "the pieces of another worker of the group"
            raise NonFiniteError(
                f"the values of all workers are finite, but their average is not ({where}): it exceeds the largest "
                "number of float32 or of the recipe's wire format. No weight was changed. Lower the learning rate, or "
                "clip gradients"
            )

    def eager(self, rule: MergeRule, name: str, started: Tensor) -> Tensor:
        """Returns the weight to continue from during a hidden merge; `started` is its value when the merge began."""
        anchor = self.anchors[name]
        own = change(anchor, started)
        step, _ = rule.step(own, self.momentum.get(name))
        # A step by the change itself leads back to `started`, up to rounding.
        return started if step is own else (anchor + step).to(started.dtype)

    def _advance_anchors(self, rule: MergeRule, averages: Averages) -> Tensors:
        """Returns the new weights of all workers, by name. Updates anchors, momentum and residuals."""
        for name, D in averages.mean.items():
            self.residuals.pop(name, None)
            step, momentum = rule.step(D, self.momentum.get(name))
            self.anchors[name].add_(step)
            if momentum is not None:
                self.momentum[name] = momentum
        self.residuals |= averages.error
        return {name: self.anchors[name] for name in averages.mean}

    def _shares(
        self, part: MergeInput, changes: Mapping[str, Tensor], alive: Sequence[bool], reports: Sequence[Part]
    ) -> Tensors:
        """Returns this worker's contributions to the average: its changes, times its share, plus its residuals."""
        topology, rank = self._comm.topology, self._comm.rank
        numbers = {}
        for name, own in changes.items():
            trainers = part.trained_by.get(name, [True] * topology.world_size)
            trained = [a and t for a, t in zip(alive, trainers, strict=True)]
            shares = part.sync.merge.shares(alive, trained, reports)
            # This worker also speaks for the others of its group, which made the same changes.
            share = math.fsum(shares[member] for member in self._comm.ranks("group"))
            numbers[name] = own * (share * topology.n_groups) if alive[rank] else torch.zeros_like(own)
            if name in self.residuals:
                numbers[name] += self.residuals[name]
        return numbers

    def forget(self, names: Sequence[str]) -> None:
        """Drops the state that wires have for the named tensors, because their shape or basis changes."""
        for wire in self._wires.values():
            wire.forget(names)

    def _alive(
        self, reports: Sequence[Part], differing: Mapping[str, Sequence[int]], changes: Mapping[str, Tensor]
    ) -> list[bool]:
        """Returns for each worker whether its values are finite. Collective over the world if it raises an error.

        Raises:
            NonFiniteError: see `merge`.
        """
        spoiled = {rank for ranks in differing.values() for rank in ranks}
        well = [report.finite and rank not in spoiled for rank, report in enumerate(reports)]
        # Each worker has looked at its own pieces only.
        alive = [all(well[member] for member in group) for group in self._comm.topology.groups for _ in group]
        broken = [rank for rank, is_alive in enumerate(alive) if not is_alive]
        if not broken or (self.on_nonfinite == "drop_worker" and any(alive)):
            return alive
        names = [told_names([name for name, own in changes.items() if not is_finite(own)])]
        if math.isinf(reports[self._comm.rank].loss):
            names.append("training loss")
        names += [f"buffer {name}" for name, ranks in differing.items() if self._comm.rank in ranks]
        of_all = gather_json(self._comm, ", ".join(filter(None, names)))
        told = {rank: of_all[rank] for rank in broken if of_all[rank]}
        found = [f"rank {rank}: {text}" for rank, text in told.items()] if len(broken) > 1 else list(told.values())
        remedy = ", or exclude such workers by on_nonfinite='drop_worker'" if any(alive) else ""
        raise NonFiniteError(
            f"the merge found NaN or infinity on rank {', '.join(map(str, broken))} ({'; '.join(found)}): nothing was "
            f"averaged. Lower the learning rate, or clip gradients{remedy}"
        )


def steps_alone(rule: MergeRule) -> bool:
    """Returns whether workers continue from other weights while a hidden merge is under way (see `Merger.eager`)."""
    own = torch.zeros(())
    return rule.step(own, None)[0] is not own


def sent_by_merge(
    wire: str, tensors: Sequence[Tensor], averaged: Sequence[Tensor], topology: Topology, rank: int = 0
) -> tuple[Calls, ...]:
    """Returns the collective calls in each stage of a merge, if the same buffers differ as at the previous merge.

    `wire` is the name of the wire format, and `averaged` the buffers to average. Only shapes and dtypes matter.
    """
    pieces = [piece(tensor, topology.place_of(rank), topology.group_size) for tensor in tensors]
    between = make_wire(wire, topology.n_groups).sends(pieces, topology.n_groups) if topology.n_groups > 1 else ((),)
    first, *more = between
    stages = [ROLL_CALL, (*first, *sent_by_average_over_world(averaged, topology)), *more]
    return (*stages[:-1], (*stages[-1], *sent_by_gathered(topology), *sent_by_spread(tensors, topology)))
