"""Runs the rounds of a phase: in a round, each group of workers trains separately, and then all workers merge."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from abtrain.comm.checksums import fingerprint
from abtrain.comm.communicator import Communicator
from abtrain.comm.stages import Background, Stages, finish, timed
from abtrain.consistency.agreement import CALL, Told, roll_call
from abtrain.errors import OnNonFinite
from abtrain.failpoints import fail_at
from abtrain.merging.held import Held
from abtrain.merging.merge_input import MergeInput
from abtrain.merging.merger import Merger
from abtrain.merging.places import Places
from abtrain.merging.selection import rounds_of, tensors_due, trained_by, whole_round
from abtrain.merging.shared_tensors import SharedTensors
from abtrain.merging.store import Store
from abtrain.merging.wires.wire import make_wire
from abtrain.recipes.recipe import Position, Recipe

log = logging.getLogger("abtrain")

CHECKING = 1
"""The number of stages before those of the wire. In this stage, workers check that all merge the same tensors."""


class _UnderWay(NamedTuple):
    """A hidden merge, whose messages are sent while training continues.

    Attributes:
        stages: the stages of the merge that are left to run.
        step: the number of training steps done when the merge began.
        loss: this worker's mean training loss between the last merge and this one.
        started: copies of this worker's pieces of the tensors to merge, made when the merge began.
        buffers: copies of the buffers that merge, made when the merge began.
    """

    stages: Background[None]
    step: int
    loss: float | None
    started: Store
    buffers: dict[str, Tensor]


class Rounds:
    """Runs the merges of a phase: owns the shared tensors, the merger, and the hidden merges under way.

    Attributes:
        dropped: for each merge that excluded workers, the step when it began, and the workers' ranks.
        divergence: for each merge in this process, the step when it began, its phase, and the distances by layer.
        ended: for each merge that ended in the last training step, its report (see `Merger.merge`) and its `seconds`.
    """

    def __init__(
        self,
        shared: SharedTensors,
        comm: Communicator,
        on_nonfinite: OnNonFinite,
        measure_divergence: bool,
        outer_device: str | None = None,
    ) -> None:
        self.shared = shared
        measures = measure_divergence and comm.topology.world_size > 1
        self.merger = Merger(comm, on_nonfinite, measures, outer_device)
        self.merger.places = Places(comm, bool(shared.model.sharded))
        self._comm = comm
        self._under_way: list[_UnderWay] = []
        self._parameters = Held({})
        self._parts: dict[tuple[object, ...], Held] = {}  # the parameters that merge after a step
        self._phase = ""  # of the merges under way
        self._losses: list[float] = []
        self.dropped: list[dict[str, Any]] = []
        self.divergence: list[dict[str, Any]] = []
        self.ended: list[dict[str, Any]] = []

    def begin(self) -> None:
        """Prepares the merges of a phase. All workers must have the same weights."""
        self.shared.lay_out()
        self.merger.begin(self.shared.parameters())
        self._losses = []

    def release(self) -> None:
        """Forgets the parameters of a phase that has ended, so that they do not keep memory."""
        self._parameters, self._parts = Held({}), {}
        self.shared.release()

    def step(self, position: Position, step: int, loss: float | None) -> bool:
        """Advances the hidden merges, and begins merges that are due after the training step at `position`.

        `step` is the number of training steps done, and `loss` this worker's loss in the last step, if it is known.
        Returns whether all workers have the same weights now.

        Raises:
            RanksDisagreeError: workers are at different steps, in different phases, or have tensors of other shapes.
            NonFiniteError: see `Merger.merge`.
        """
        # The loss of a skipped step says nothing about the weights.
        if loss is not None and (math.isfinite(loss) or self.merger.on_nonfinite != "skip"):
            self._losses.append(loss)
        with self.shared.copies.following() if position.merging or self._under_way else nullcontext():
            self._under_way = [merge for merge in self._under_way if not merge.stages.advance()]
            if position.last:
                for merge in self._under_way:
                    merge.stages.finish()
                self._under_way = []
            return bool(position.merging) and self._begin_merge(position, step)

    def _begin_merge(self, position: Position, step: int) -> bool:
        """Merges at once, or begins a hidden merge. Returns whether all workers have the same weights afterwards."""
        sync = rounds_of(position)
        where = f"step {step}, phase {position.phase.name}"
        self.shared.check_equal("group", where)
        loss = _mean(self._losses) if self._losses else None
        if whole_round(position):
            self._losses = []
        if not sync.delay or position.last:
            finish(self._merge(position, step, loss))
            return len(position.merging) == sync.fragments
        tensors, _ = self._due(position)
        started = Store.of(self.merger.places.held(tensors))
        buffers = {name: buffer.clone() for name, buffer in self._buffers_due(position).items()}
        self._under_way.append(self._launch(position, step, loss, started, buffers))
        self.merger.step_alone(sync.merge, tensors, started)
        return False

    def roll_call(self, step: int, phase: int, at: Callable[[int], Position], numbers: Told = (0, 0.0)) -> list[Told]:
        """Checks, during a round, that all workers are about to average the same tensors. Collective over the world.

        Sends the remaining messages of hidden merges first, in the order of the coming steps, up to the next merge. If
        only one worker makes this call, the next merge of the other workers finds the mismatch, and all get the error.

        `step` is the number of training steps done, `phase` the index of the phase, and `at` returns the position of a
        step in the recipe. Returns the `numbers` of each worker, in rank order.

        Raises:
            RanksDisagreeError: workers are at different steps, in different phases, or have tensors of other shapes.
        """
        ahead = 1
        while not self._go_ahead(ahead):
            position = at(step + ahead - 1)
            if position.last:
                self._go_ahead(position.steps_in_phase)
            if position.merges:
                break
            ahead += 1
        calling = roll_call(self._comm, {CALL: "ab.merged()", **self.shared.place(step, phase)}, numbers)
        next(calling)
        # Workers that begin a merge instead advance older merges by one more step before they wait for an answer.
        self._go_ahead(ahead + 1)
        return finish(calling)

    def _go_ahead(self, steps: int) -> bool:
        """Sends the messages that hidden merges would send in the next `steps` steps. Returns whether all are sent."""
        if self._comm.topology.world_size == 1:
            return True
        meter = self._comm.meter
        # The caller may count its own messages under another name, as validation does.
        caller, meter.phase = meter.phase, self._phase
        sent = [merge.stages.go_ahead(steps) for merge in self._under_way]
        meter.phase = caller
        return all(sent)

    def _recover(self) -> None:
        """Replaces this worker's values that are not finite, so that it can take part in the next merges."""
        self.shared.forget_nonfinite()
        held = self.shared.parameters()
        flags = self.shared.anywhere([not bool(torch.isfinite(tensor).all()) for tensor in held.values()])
        broken = {name: tensor for (name, tensor), flag in zip(held.items(), flags, strict=True) if flag}
        for name, tensor in self.merger.places.pieces(broken).items():
            tensor.copy_(self.merger.anchors[name])
        self.merger.places.spread(broken)
        self._losses = [loss for loss in self._losses if math.isfinite(loss)]

    def state_dict(self) -> dict[str, Any]:
        """Returns the losses since the last merge, the entries of `dropped`, and the hidden merges under way."""
        return {
            "losses": torch.tensor(self._losses, dtype=torch.float64),
            "dropped": list(self.dropped),
            "under_way": [
                {
                    "step": merge.step,
                    "progress": list(merge.stages.progress),
                    "loss": None if merge.loss is None else torch.tensor(merge.loss, dtype=torch.float64),
                    "started": {**merge.started, **merge.buffers},
                }
                for merge in self._under_way
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any], recipe: Recipe, device: torch.device) -> None:
        """Restores a `state_dict`, after the model and the merger. Collective if the state has hidden merges.

        A hidden merge begins again from the same tensors, and advances to the stage at which it was saved.
        """
        self.shared.lay_out()
        self._losses = state["losses"].tolist()
        self.dropped = list(state["dropped"])
        self._under_way = []
        for entry in state["under_way"]:
            position = recipe.at(entry["step"] - 1)
            tensors, _ = self._due(position)
            copies = {name: tensor.to(device, copy=True) for name, tensor in entry["started"].items()}
            started = Store.of(Held({name: copies.pop(name) for name in tensors}))
            loss = None if entry["loss"] is None else float(entry["loss"])
            merge = self._launch(position, entry["step"], loss, started, copies)
            merge.stages.catch_up(*entry["progress"])
            self._under_way.append(merge)

    def _launch(
        self, position: Position, step: int, loss: float | None, started: Store, buffers: dict[str, Tensor]
    ) -> _UnderWay:
        sync, groups, self._phase = rounds_of(position), self._comm.topology.n_groups, position.phase.name
        count = CHECKING + make_wire(sync.wire, groups).stages(groups)
        stages = Background(self._merge(position, step, loss, started, buffers), count, sync.delay)
        return _UnderWay(stages, step, loss, started, buffers)

    def _due(self, position: Position) -> tuple[Held, dict[str, list[bool]]]:
        """Returns the parameters to merge after a step, and who trained them: the same object if none has moved."""
        parameters = self.shared.parameters()
        if parameters is not self._parameters:
            self._parameters, self._parts = parameters, {}
        trained = trained_by(position, self._comm.topology, self.shared.model.factors())
        # Where all workers train all factors, cycles are alike.
        key = (position.merging, position.cycle, position.turn) if trained else position.merging
        if key not in self._parts:
            due = tensors_due(position, parameters, trained)
            self._parts[key] = parameters if len(due) == len(parameters) else Held(due)
        return self._parts[key], trained

    def _buffers_due(self, position: Position) -> dict[str, Tensor]:
        return self.shared.buffers() if whole_round(position) else {}

    def _merge(
        self,
        position: Position,
        step: int,
        loss: float | None,
        started: Store | None = None,
        started_buffers: Mapping[str, Tensor] | None = None,
    ) -> Stages[None]:
        """Merges at once, or in stages if the values to merge were copied when the merge started."""
        sync = rounds_of(position)
        tensors, trained = self._due(position)
        fail_at(self._comm.rank, step, "merge.begin")
        # Changes can be averaged only if they were made to the same anchors.
        anchors = self.merger.places.gathered(self.merger.fingerprint(self.merger.places.held(tensors)))
        merging, buffers = fingerprint(tensors.names_hash, sync), self._buffers_due(position)
        part = MergeInput(
            # Only during a hidden merge, training may replace parameters and buffers.
            tensors=(lambda: tensors) if started is None else lambda: self._due(position)[0],
            sync=sync,
            trained_by=trained,
            buffers=(lambda: buffers) if started is None else lambda: self._buffers_due(position),
            averaged=self.shared.averaged_buffers(),
            started=started,
            started_buffers=started_buffers or {},
            loss=loss,
            step=step,
            place=self.shared.place(
                step, position.phase_index, self._parameters, merging=merging, anchors=fingerprint(*anchors)
            ),
            factors=self.shared.model.factors().keys(),
        )
        (report, layers), seconds = yield from timed(self.merger.merge(part), time.perf_counter)
        self.ended.append({**report, "seconds": seconds})
        dropped = report["dropped"]
        if layers:
            self.divergence.append({"step": step, "phase": position.phase.name, "layers": layers})
        if dropped:
            self.dropped.append({"step": step, "ranks": dropped})
            if self._comm.rank == 0 and len(self.dropped) == 1:
                remedy = "If this repeats (ab.dropped_parts), lower the learning rate"
                log.warning("step %d: the merge excluded ranks %s due to NaN or infinity. %s", step, dropped, remedy)
        if self._comm.rank in dropped:
            self._recover()
        fail_at(self._comm.rank, step, "merge.end")


def rewound(state: Mapping[str, Any], step: int) -> dict[str, Any]:
    """Returns a `Rounds.state_dict` as it was at the start of its round, when `step` training steps were done."""
    dropped = [entry for entry in state["dropped"] if entry["step"] <= step]
    return {**state, "losses": torch.zeros(0, dtype=torch.float64), "dropped": dropped, "under_way": []}


def _mean(losses: Sequence[float]) -> float:
    """Returns the mean of losses: NaN if one is NaN; infinity if one is infinite, or the sum overflows."""
    try:
        return math.fsum(losses) / len(losses)
    except (OverflowError, ValueError):
        return math.inf
