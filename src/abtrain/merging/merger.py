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
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from abtrain.checks import told_names
from abtrain.comm.buckets import average_over_world
from abtrain.comm.checksums import checksum
from abtrain.comm.communicator import Communicator
from abtrain.comm.stages import Stages, timed, together
from abtrain.consistency.agreement import CALL, gather_json, roll_call, share
from abtrain.errors import NonFiniteError, OnNonFinite, UsageError
from abtrain.failpoints import fail_at
from abtrain.memory import Recycler
from abtrain.merging.batch_merge import IN_FLIGHT, BatchMerge, apply_at_once, average_at_once, merge_in_turn
from abtrain.merging.batches import Batch
from abtrain.merging.buffers import Buffers, settled
from abtrain.merging.changes import change, is_finite, write
from abtrain.merging.divergence import Distances, divergence
from abtrain.merging.held import Held
from abtrain.merging.merge_input import MergeInput
from abtrain.merging.outer_state import OuterState
from abtrain.merging.places import Places
from abtrain.merging.selection import weights_of
from abtrain.merging.sent import steps_alone
from abtrain.merging.store import Store
from abtrain.merging.wires.wire import make_wire
from abtrain.recipes.merges import NOT_FINITE, TOO_LARGE, MergeRule, Part

Tensors = dict[str, Tensor]
_LARGEST = 3.3e38
"""The largest average that every wire format can send: that of bfloat16, rounded down."""


class Merger(OuterState):
    """Merges the weights of all workers, and keeps the state that is needed between merges.

    Attributes:
        on_nonfinite: `drop_worker` excludes workers whose values are not finite; otherwise all workers stop.
        places: cuts tensors into the pieces that this worker merges. All stored tensors are of these pieces.
        measures_divergence: whether to measure the divergence of weights in each merge that excludes no worker.
    """

    def __init__(
        self,
        comm: Communicator,
        on_nonfinite: OnNonFinite = "stop",
        measures_divergence: bool = False,
        outer_device: str | None = None,
    ) -> None:
        super().__init__(outer_device)
        self._comm = comm
        self.on_nonfinite, self.measures_divergence = on_nonfinite, measures_divergence
        self.places = Places(comm)
        self._buffers = Buffers(comm)
        self._interrupted = False

    def begin(self, tensors: Mapping[str, Tensor]) -> None:
        """Prepares the merges of a phase. `tensors` are the weights to merge, by name, equal on all workers."""
        self.anchor(self.places.held(tensors))

    def state_dict(self) -> dict[str, Any]:
        """Returns the size of groups, all tensors, and checksums of buffers that have differed.

        Raises:
            UsageError: a merge was interrupted, so only a part of the weights has merged.
        """
        if self._interrupted:
            raise UsageError(
                "a merge was interrupted, and only some weights are merged: continue from the last checkpoint"
            )
        return {
            "places": self.places.count,
            "buffers": dict(self._buffers.differed),
            "anchors": dict(self.anchors),
            "momentum": dict(self.momentum),
            "residuals": dict(self.residuals),
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restores a `state_dict`, with copies of its tensors. `device` is that of the parameters."""

        def copies(store: Mapping[str, Tensor]) -> Tensors:
            return {name: self.kept(tensor, device) for name, tensor in store.items()}

        self.restore(copies(state["anchors"]), copies(state["momentum"]), copies(state["residuals"]), device)
        self._interrupted = False
        self._buffers.differed = dict(state["buffers"])

    def step_alone(self, rule: MergeRule, tensors: Held, started: Store) -> None:
        """Writes the weights to continue from during a hidden merge that began with the pieces `started`."""
        if steps_alone(rule):
            pieces = self.places.held(tensors)
            for batch in pieces.batches():
                pieces.write(batch, self.stepped_alone(batch, started, rule))
            self.places.spread(tensors)

    def merge(self, part: MergeInput) -> Stages[tuple[dict[str, Any], Distances]]:
        """Merges in stages: compares the workers first, and then merges one batch of weights after the other.

        A hidden merge changes all values in its last stage, so that a merge that is restarted from the same `started`
        has the same outcome. Changes that this worker makes during the merge are added to the outcome. Any other merge
        completes a batch before it begins the next but one, so it needs memory for two of them.

        Returns:
            A report, and the divergence by layer (empty if it is not measured). The report has the input's `step`, the
            ranks of excluded workers (`dropped`), each worker's mean loss (`losses`), and the seconds that this worker
            waited for the others at the start (`wait_seconds`).

        Raises:
            RanksDisagreeError: `place` differs between workers; raised on all of them.
            NonFiniteError: a worker's values are not finite, and `on_nonfinite` is not `drop_worker`; or no worker's
                values are finite, or they are so large that their average may not be. Raised on all workers.
        """
        tensors = part.tensors()
        pieces = self.places.held(tensors)
        started, buffers = (pieces, part.buffers()) if part.started is None else (part.started, part.started_buffers)
        # Small models have their changes computed once. Those of large models would need too much memory.
        changes = dict[Batch, Tensor]() if part.started is None and len(pieces.batches()) <= IN_FLIGHT else None
        reports, differing, waited = yield from self._compare(part, started, pieces, buffers, changes)
        alive = self._alive(reports, differing, started, pieces)
        measuring = self.measures_divergence and all(alive)
        works = self._works(part, started, pieces, alive, reports, measuring, changes or {})
        averaging = self._average_buffers(part, buffers, differing, alive)
        if part.started is None:
            self._interrupted = True
            merge_in_turn(works, pieces, self._check_finite)
            merged = yield from averaging
        else:
            # One worker needs fewer stages for weights than for buffers, and weights change in the last stage only.
            outcomes, merged = yield from together(average_at_once(works), averaging)
            tensors = part.tensors()
            apply_at_once(works, outcomes, self.places.held(tensors), self._check_finite)
        self.settle(name for work in works if work.sent_all for name in work.batch.names)
        if merged:
            base = {name: buffers[name] for name in merged} if alive[self._comm.rank] else None
            write(part.buffers(), merged, base)
        self._buffers.merged(merged)
        self.places.spread(tensors)
        self._interrupted = False
        terms = {name: term for work in works for name, term in work.terms.items()}
        dropped = [rank for rank, is_alive in enumerate(alive) if not is_alive]
        losses = [report.loss for report in reports]
        report = {"step": part.step, "dropped": dropped, "losses": losses, "wait_seconds": waited}
        return report, divergence(self._comm, terms) if measuring else {}

    def _compare(
        self,
        part: MergeInput,
        started: Held | Store,
        pieces: Held,
        buffers: Mapping[str, Tensor],
        changes: dict[Batch, Tensor] | None,
    ) -> Stages[tuple[list[Part], dict[str, list[int]], float]]:
        """Compares `place` and buffers. Returns all reports, the buffers that differ, and the seconds waited.

        Stores the changes of batches in `changes`, unless it is None.
        """
        sums = {name: checksum(buffer) for name, buffer in buffers.items()}
        largest = []
        for batch in pieces.batches():
            if changes is not None:
                changes[batch] = self.change(batch, started)
            largest.append(self.largest(batch, started, None if changes is None else changes[batch]))
        content = self._buffers.report(buffers, sums)
        if not all(map(math.isfinite, largest)):
            content = NOT_FINITE
        elif max(largest, default=0.0) * self._comm.topology.world_size**2 > _LARGEST:
            content = TOO_LARGE
        loss = part.loss if part.loss is None or math.isfinite(part.loss) else math.inf
        place = {CALL: "ab.step()", **part.place}
        calling = roll_call(self._comm, place, (content, math.nan if loss is None else loss))
        rows, waited = yield from timed(calling, lambda: self._comm.meter.sync_seconds)
        reports = [Part(*row) for row in rows]
        fail_at(self._comm.rank, part.step, "merge.agreed")
        return reports, self._buffers.compare(buffers, sums, [report.buffers for report in reports]), waited

    def _average_buffers(
        self,
        part: MergeInput,
        buffers: Mapping[str, Tensor],
        differing: Mapping[str, Sequence[int]],
        alive: Sequence[bool],
    ) -> Stages[Tensors]:
        """Returns the new values of the buffers that differ between workers. Collective over the world."""
        floats = [name for name in differing if name in part.averaged]
        followed = {name: buffers[name].clone() for name in differing if name not in part.averaged}
        share(self._comm, list(followed.values()), [alive.index(True)] * len(followed))
        scale, mine = len(alive) / sum(alive), alive[self._comm.rank]
        scaled = [buffers[name] * scale if mine else torch.zeros_like(buffers[name]) for name in floats]
        means = yield from average_over_world(scaled, self._comm)
        return followed | {name: settled(name, mean) for name, mean in zip(floats, means, strict=True)}

    def _works(
        self,
        part: MergeInput,
        started: Held | Store,
        pieces: Held,
        alive: Sequence[bool],
        reports: Sequence[Part],
        measuring: bool,
        changes: dict[Batch, Tensor],
    ) -> list[BatchMerge]:
        """Returns the merges of all batches, and moves known `changes` into them."""
        topology, rank = self._comm.topology, self._comm.rank
        wire = make_wire(part.sync.wire, topology.n_groups)
        weight, others = weights_of(part.sync.merge, pieces, part.trained_by, alive, reports, topology, rank)
        memory = Recycler()
        return [
            BatchMerge(
                state=self,
                comm=self._comm,
                places=self.places,
                wire=wire,
                part=part,
                batch=batch,
                started=started,
                changes=changes.pop(batch, None),
                weight=others.get(batch.names[0], weight) if alive[rank] else 0.0,
                excluded=not alive[rank],
                measuring=measuring,
                memory=memory,
            )
            for batch in pieces.batches(others, whole=measuring or not wire.elementwise)
        ]

    def _check_finite(self, broken: Sequence[str]) -> None:
        """Raises NonFiniteError on all workers if averages are not finite. Collective in the group."""
        if any(self.places.gathered(len(broken))):
            where = told_names(broken) or "the pieces of another worker of the group"
            outcome = "Some weights are merged" if self._interrupted else "No weight was changed"
            raise NonFiniteError(
                f"the values of all workers are finite, but their average is not ({where}). {outcome}: continue from "
                "the last checkpoint, and lower the learning rate, or clip gradients"
            )
        self._interrupted = True

    def _alive(
        self,
        reports: Sequence[Part],
        differing: Mapping[str, Sequence[int]],
        started: Held | Store,
        names: Iterable[str],
    ) -> list[bool]:
        """Returns for each worker whether its values are finite. Collective over the world if it raises an error.

        Raises:
            NonFiniteError: see `merge`.
        """
        large = [str(rank) for rank, report in enumerate(reports) if report.buffers == TOO_LARGE]
        if large:
            raise NonFiniteError(
                f"the values of all workers are finite, but their average is not, or may not be: on rank "
                f"{', '.join(large)} weights have changed too much to be added up in float32. No weight was changed. "
                "Lower the learning rate, or clip gradients"
            )
        spoiled = {rank for ranks in differing.values() for rank in ranks}
        well = [report.finite and rank not in spoiled for rank, report in enumerate(reports)]
        # Each worker has looked at its own pieces only.
        alive = [all(well[member] for member in group) for group in self._comm.topology.groups for _ in group]
        broken = [rank for rank, is_alive in enumerate(alive) if not is_alive]
        if not broken or (self.on_nonfinite == "drop_worker" and any(alive)):
            return alive
        changes = {n: change(self.near(self.anchors[n], started[n].device), started[n]) for n in names}
        mine = [told_names([n for n, changed in changes.items() if not is_finite(changed)])]
        if math.isinf(reports[self._comm.rank].loss):
            mine.append("training loss")
        mine += [f"buffer {name}" for name, ranks in differing.items() if self._comm.rank in ranks]
        of_all = gather_json(self._comm, ", ".join(filter(None, mine)))
        told = {rank: of_all[rank] for rank in broken if of_all[rank]}
        found = [f"rank {rank}: {text}" for rank, text in told.items()] if len(broken) > 1 else list(told.values())
        remedy = ", or exclude such workers by on_nonfinite='drop_worker'" if any(alive) else ""
        raise NonFiniteError(
            f"the merge found NaN or infinity on rank {', '.join(map(str, broken))} ({'; '.join(found)}): nothing was "
            f"averaged. Lower the learning rate, or clip gradients{remedy}"
        )
