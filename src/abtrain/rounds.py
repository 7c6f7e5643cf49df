"""The rounds of a phase in which groups run alone: which part of the model merges when, waited for or hidden."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from abtrain.comm.agreement import fingerprint
from abtrain.comm.communicator import Communicator
from abtrain.comm.stages import Background, Stages, finish
from abtrain.errors import UsageError
from abtrain.merge import Merger, Outcome
from abtrain.recipe import Position
from abtrain.state import SharedState
from abtrain.sync import Weighted, WeightSync

log = logging.getLogger("abtrain")

# Before the wire's own stages: all workers prove that they merge the same, and tell what they bring.
_CHECKING = 1


class Rounds:
    """Merges what `state` holds, as the position in the recipe says. Every worker makes the same calls.

    Attributes:
        outcome: of the last merge that ended; None before the first.
    """

    def __init__(self, state: SharedState, merger: Merger, comm: Communicator) -> None:
        self._state = state
        self._merger = merger
        self._comm = comm
        self._under_way: list[Background[None]] = []
        self._losses: list[float] = []
        self.outcome: Outcome | None = None

    def begin(self) -> None:
        """A phase of rounds begins; all workers hold the same."""
        self._merger.begin(self._state.parameters())
        self._losses = []

    def step(self, position: Position, step: int, loss: float | None, trained_by: Mapping[str, Sequence[bool]]) -> bool:
        """A training step is done. Goes on with merges that are under way, and begins those that are due.

        Args:
            position: of the step in the recipe.
            step: how many steps are done.
            loss: this worker's training loss in the step, if it is known.
            trained_by: by name, for each worker whether it trains the parameter, where not all do.

        Returns:
            Whether all workers hold the same now.

        Raises:
            UsageError: the rule needs losses, and there is none.
            RanksDisagreeError: workers are at different steps, in different phases, or hold different shapes.
            NonFiniteError: see `Merger.merge`.
        """
        sync = position.phase.sync
        assert isinstance(sync, WeightSync)
        if loss is not None:
            self._losses.append(loss)
        elif isinstance(sync.merge, Weighted):
            raise UsageError(
                f"phase {position.phase.name!r} weights workers by their training loss, but ab.step() was called "
                "without one: call ab.step(loss)"
            )
        self._under_way = [merge for merge in self._under_way if not merge.advance()]
        if position.last:
            for merge in self._under_way:
                merge.finish()
            self._under_way = []
        if not position.merging:
            return False
        stages = self._merge(position, sync, step, trained_by)
        if sync.delay and not position.last:
            count = _CHECKING + self._merger.wire(sync.wire).stages
            self._under_way.append(Background(stages, count, sync.delay))
            return False
        finish(stages)
        return len(position.merging) == sync.fragments

    def _merge(
        self, position: Position, sync: WeightSync, step: int, trained_by: Mapping[str, Sequence[bool]]
    ) -> Stages[None]:
        tensors: dict[str, Tensor] = {}
        parts = cut_into_fragments(self._state.parameters(), sync.fragments)
        for fragment in position.merging:
            tensors |= parts[fragment]
        # A factor that nobody trained is what it was.
        tensors = {name: tensor for name, tensor in tensors.items() if any(trained_by.get(name, (True,)))}
        whole_round = sync.fragments - 1 in position.merging
        buffers = self._state.float_buffers() if whole_round else {}
        loss = math.fsum(self._losses) / len(self._losses) if self._losses else None
        if whole_round:
            self._losses = []
        check = self._state.checking(step, position.phase_index, merging=fingerprint(*tensors, sync))
        outcome = yield from self._merger.merge(tensors, sync, trained_by, buffers=buffers, loss=loss, check=check)
        if outcome.dropped:
            log.warning("step %d: the part of rank %s was not finite, and left out", step, list(outcome.dropped))
        if self._comm.rank in outcome.dropped:
            self._state.forget_nonfinite()
        if whole_round:
            well = set(range(self._comm.topology.world_size)) - set(outcome.dropped)
            self._state.share_counters(source=min(well))
        self.outcome = outcome


def cut_into_fragments(tensors: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Cuts named tensors, in their order, into `count` parts of about the same size; factors of a weight stay together.

    With fewer weights than parts, some parts are empty.
    """
    total = sum(tensor.numel() for tensor in tensors.values())
    fragments: list[dict[str, Tensor]] = [{} for _ in range(count)]
    before, place, previous = 0, 0, ""
    for name, tensor in tensors.items():
        partner = name.endswith(".B") and previous == f"{name[:-1]}A"
        if not partner:
            place = min(before * count // max(total, 1), count - 1)
        fragments[place][name] = tensor
        before, previous = before + tensor.numel(), name
    return fragments
