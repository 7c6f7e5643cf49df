"""The rounds of a phase in which groups run alone: which part of the model merges when, waited for or hidden."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from abtrain.comm.checksums import checksum, fingerprint
from abtrain.comm.communicator import Communicator
from abtrain.comm.stages import Background, Stages, finish
from abtrain.consistency.agreement import Told, roll_call
from abtrain.consistency.replicas import check_replicas
from abtrain.failpoints import fail_at
from abtrain.lowrank.names import factor_names, weight_name
from abtrain.merging.merger import Merger
from abtrain.merging.shared_tensors import SharedTensors
from abtrain.recipes.recipe import Position
from abtrain.recipes.sync import WeightSync

log = logging.getLogger("abtrain")

# Before the wire's own stages: all workers prove that they merge the same, and tell what they bring.
CHECKING = 1

TrainedBy = Mapping[str, Sequence[bool]]
"""By name, for each worker whether it trains the parameter, where not all do."""


class _UnderWay(NamedTuple):
    """A merge that is hidden behind training, and what it takes to begin it again.

    Attributes:
        stages: its rest.
        step: how many steps were done when it began.
        loss: this worker's mean training loss in the round before.
        started: what it merges, as it was when it began.
    """

    stages: Background[None]
    step: int
    loss: float | None
    started: dict[str, Tensor]


class Rounds:
    """Merges what `state` holds, as the position in the recipe says. Every worker makes the same calls.

    Attributes:
        dropped: of every merge that left workers' parts out, the step and their ranks; alike on all workers.
    """

    def __init__(self, state: SharedTensors, merger: Merger, comm: Communicator) -> None:
        self._state = state
        self._merger = merger
        self._comm = comm
        self._under_way: list[_UnderWay] = []
        self._losses: list[float] = []
        self.dropped: list[dict[str, Any]] = []

    def begin(self) -> None:
        """A phase of rounds begins; all workers hold the same."""
        self._merger.begin(self._state.parameters())
        self._losses = []

    def step(self, position: Position, step: int, loss: float | None, trained_by: TrainedBy) -> bool:
        """A training step is done. Goes on with merges that are under way, and begins those that are due.

        Args:
            position: of the step in the recipe.
            step: how many steps are done.
            loss: this worker's training loss in the step, if it is known.
            trained_by: by name, for each worker whether it trains the parameter, where not all do.

        Returns:
            Whether all workers hold the same now.

        Raises:
            RanksDisagreeError: workers are at different steps, in different phases, or hold different shapes.
            NonFiniteError: see `Merger.merge`.
        """
        sync = position.phase.sync
        assert isinstance(sync, WeightSync)
        # The loss of a step that is left out says nothing of the weights.
        if loss is not None and (math.isfinite(loss) or self._merger.on_nonfinite != "skip"):
            self._losses.append(loss)
        self._under_way = [merge for merge in self._under_way if not merge.stages.advance()]
        if position.last:
            for merge in self._under_way:
                merge.stages.finish()
            self._under_way = []
        if not position.merging:
            return False
        where = f"step {step}, phase {position.phase.name}"
        check_replicas(self._comm, self._state.replicated(), "group", where)
        mean_loss = _mean(self._losses) if self._losses else None
        if _whole_round(position):
            self._losses = []
        if sync.delay and not position.last:
            tensors, buffers = self._merging(position, trained_by)
            started = {name: tensor.clone() for name, tensor in (tensors | buffers).items()}
            self._under_way.append(self._launch(position, step, mean_loss, started, trained_by))
            for name, tensor in tensors.items():
                tensor.copy_(self._merger.eager(sync.merge, name, started[name]))
            return False
        finish(self._merge(position, step, mean_loss, None, trained_by))
        return len(position.merging) == sync.fragments

    def roll_call(self, step: int, phase: int, at: Callable[[int], Position], told: Told = (0, 0.0)) -> list[Told]:
        """All workers prove that they are about to average the same things, amid a round.

        What merges under way have still to send is sent first, in the order of the steps to come, up to where the next
        merge begins: a worker that comes here alone meets the others there, and all are told.

        Args:
            step: how many steps are done.
            phase: which of the recipe's phases this is.
            at: the position of a step in the recipe.
            told: what this worker tells all others.

        Returns:
            What each worker told, in rank order.

        Raises:
            RanksDisagreeError: workers are at different steps, in different phases, or hold different shapes.
        """
        ahead = 1
        while not self._go_ahead(ahead):
            position = at(step + ahead - 1)
            if position.last:
                self._go_ahead(position.steps_in_phase)
            if position.merges:
                break
            ahead += 1
        calling = roll_call(self._comm, self._state.place(step, phase), told)
        next(calling)
        # The others wait for a roll call one step after it began, and go on with older merges before.
        self._go_ahead(ahead + 1)
        return finish(calling)

    def _go_ahead(self, steps: int) -> bool:
        """Sends what merges under way are to send within so many steps; whether that is all of it."""
        if self._comm.topology.world_size == 1:
            return True
        sent = [merge.stages.go_ahead(steps) for merge in self._under_way]
        return all(sent)

    def _begin_anew(self) -> None:
        """Drops what is not finite here, in other fragments too: a worker is not left out of the next merge for it."""
        self._state.forget_nonfinite()
        for name, tensor in self._state.parameters().items():
            if not bool(torch.isfinite(tensor).all()):
                tensor.copy_(self._merger.anchors[name])
        self._losses = [loss for loss in self._losses if math.isfinite(loss)]

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on from here, merges under way included."""
        under_way = [
            {
                "step": merge.step,
                "progress": list(merge.stages.progress),
                "loss": None if merge.loss is None else torch.tensor(merge.loss, dtype=torch.float64),
                "started": dict(merge.started),
            }
            for merge in self._under_way
        ]
        return {
            "losses": torch.tensor(self._losses, dtype=torch.float64),
            "dropped": list(self.dropped),
            "under_way": under_way,
        }

    def load_state_dict(
        self,
        state: Mapping[str, Any],
        at: Callable[[int], Position],
        trained_by: Callable[[Position], TrainedBy],
        device: torch.device,
    ) -> None:
        """Goes on from a `state_dict`, once the merger and the model have. Collective if merges are under way.

        Those are begun again from what they began with, and come to where they were.

        Args:
            state: of this worker.
            at: the position of a step in the recipe.
            trained_by: as `step` takes it, at a position.
            device: of the model.
        """
        self._losses = state["losses"].tolist()
        self.dropped = list(state["dropped"])
        self._under_way = []
        for entry in state["under_way"]:
            position = at(entry["step"] - 1)
            started = {name: tensor.to(device, copy=True) for name, tensor in entry["started"].items()}
            loss = None if entry["loss"] is None else float(entry["loss"])
            merge = self._launch(position, entry["step"], loss, started, trained_by(position))
            merge.stages.catch_up(*entry["progress"])
            self._under_way.append(merge)

    def _launch(
        self,
        position: Position,
        step: int,
        loss: float | None,
        started: dict[str, Tensor],
        trained_by: TrainedBy,
    ) -> _UnderWay:
        sync = position.phase.sync
        assert isinstance(sync, WeightSync)
        count = CHECKING + self._merger.wire(sync.wire).stages
        stages = self._merge(position, step, loss, started, trained_by)
        return _UnderWay(Background(stages, count, sync.delay), step, loss, started)

    def _merging(self, position: Position, trained_by: TrainedBy) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The parameters and the buffers that merge after a step."""
        return merging(position, self._state.parameters(), self._state.buffers(), trained_by)

    def _merge(
        self,
        position: Position,
        step: int,
        loss: float | None,
        started: Mapping[str, Tensor] | None,
        trained_by: TrainedBy,
    ) -> Stages[None]:
        sync = position.phase.sync
        assert isinstance(sync, WeightSync)
        tensors, buffers = self._merging(position, trained_by)
        fail_at(self._comm.rank, step, "merge.begin")
        # All have held the same since the round before, or else the average would be of unlike things.
        anchors = fingerprint(*(checksum(self._merger.anchors[name]) for name in tensors))
        place = self._state.place(step, position.phase_index, merging=fingerprint(*tensors, sync), anchors=anchors)
        dropped = yield from self._merger.merge(
            tensors,
            sync,
            trained_by,
            buffers=buffers,
            started=started,
            loss=loss,
            place=place,
            averaged=self._state.averaged_buffers(),
            current=self._state.buffers,
        )
        if dropped:
            self.dropped.append({"step": step, "ranks": list(dropped)})
            if self._comm.rank == 0:
                log.warning("step %d: the part of rank %s was not finite, and left out", step, list(dropped))
        if self._comm.rank in dropped:
            self._begin_anew()
        fail_at(self._comm.rank, step, "merge.end")


def _mean(losses: Sequence[float]) -> float:
    """Infinite where a loss is not finite, or where losses are too large to be added up."""
    try:
        return math.fsum(losses) / len(losses)
    except (OverflowError, ValueError):
        return math.inf


def _whole_round(position: Position) -> bool:
    """Whether the last of the fragments begins to merge: what is merged once a round goes with it."""
    sync = position.phase.sync
    return isinstance(sync, WeightSync) and sync.fragments - 1 in position.merging


def merging(
    position: Position, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], trained_by: TrainedBy
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the parameters and buffers that merge after a step at this position of a phase of rounds."""
    sync = position.phase.sync
    assert isinstance(sync, WeightSync)
    tensors: dict[str, Tensor] = {}
    parts = cut_into_fragments(parameters, sync.fragments)
    for fragment in position.merging:
        tensors |= parts[fragment]
    # A factor that nobody trained is what it was.
    tensors = {name: tensor for name, tensor in tensors.items() if any(trained_by.get(name, (True,)))}
    return tensors, dict(buffers) if _whole_round(position) else {}


def cut_into_fragments(tensors: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Cuts named tensors, in their order, into `count` parts of about the same size; factors of a weight stay together.

    With fewer weights than parts, some parts are empty.
    """
    total = sum(tensor.numel() for tensor in tensors.values())
    fragments: list[dict[str, Tensor]] = [{} for _ in range(count)]
    before, place, previous = 0, 0, ""
    for name, tensor in tensors.items():
        partner = (previous, name) == factor_names(weight_name(name))
        if not partner:
            place = min(before * count // max(total, 1), count - 1)
        fragments[place][name] = tensor
        before, previous = before + tensor.numel(), name
    return fragments
