"""The view of a model that `ABTraining.merged` gives: the average of the workers, for validation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from abtrain.comm.communicator import Communicator
from abtrain.errors import UsageError
from abtrain.lowrank.optimizers import Optimizers
from abtrain.merging.copies import WeightCopies
from abtrain.merging.rounds import Rounds
from abtrain.merging.shared_tensors import SharedTensors
from abtrain.modes import own_modes
from abtrain.recipes.recipe import Position, Recipe
from abtrain.recipes.sync import WeightSync


class MergedView:
    """Shows the average of the workers for a while.

    Args:
        comm: of this worker.
        optimizers: whose modes of training and evaluation are restored with the weights.
        state: the tensors that are averaged.
        copies: of the weights that optimizers keep.
        rounds: whose merges under way come first.
    """

    def __init__(
        self, comm: Communicator, optimizers: Optimizers, state: SharedTensors, copies: WeightCopies, rounds: Rounds
    ) -> None:
        self._comm, self._optimizers = comm, optimizers
        self._state, self._copies, self._rounds = state, copies, rounds
        self._shows = False

    def refuse(self, what: str) -> None:
        """Refuses an action whose effect the end of the view would undo.

        Raises:
            UsageError: the model shows the average at present.
        """
        if self._shows:
            raise UsageError(
                f"{what} inside `with ab.merged():`, where the model holds the average of the workers for a while: "
                "leave the block first"
            )

    @contextmanager
    def shown(self, recipe: Recipe, step: int, position: Position | None, workers_equal: bool) -> Iterator[None]:
        """Shows the average inside the block. Collective on entry, not on exit.

        Args:
            recipe: of the run.
            step: how many steps are done.
            position: of the next step; None past the end.
            workers_equal: whether all workers hold the same weights.
        """
        with own_modes():
            average, before = self._average(recipe, step, position, workers_equal), self._shows
            average.__enter__()
        self._shows = before or not isinstance(average, nullcontext)
        modes = [(group, group["train_mode"]) for group in self._optimizers.groups() if "train_mode" in group]
        # The block runs in the caller's modes.
        try:
            yield
        finally:
            self._shows = before
            with own_modes():
                average.__exit__(None, None, None)
            # The weights are those of the mode that a schedule-free optimizer was in.
            for group, mode in modes:
                group["train_mode"] = mode

    def _average(
        self, recipe: Recipe, step: int, position: Position | None, workers_equal: bool
    ) -> AbstractContextManager[None]:
        """Returns the context in which the model shows the average. Collective unless there is nothing to agree on."""
        sync = None if position is None else position.phase.sync
        phase = len(recipe.phases) if position is None else position.phase_index
        alone = self._comm.topology.world_size == 1 or (position is not None and sync is None)
        if not workers_equal and isinstance(sync, WeightSync):
            self._meet(step, phase, recipe.at)
            return self._averaged()
        if alone or not workers_equal or not self._state.buffers():
            return nullcontext()
        told = self._state.told_of_buffers()
        return nullcontext() if self._meet(step, phase, recipe.at, told) else self._state.with_first_buffers()

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        with self._state.averaged(), self._copies.averaged(self._comm):
            yield

    def _meet(self, step: int, phase: int, at: Callable[[int], Position], told: int = 0) -> bool:
        """Checks that all workers are at the same step; returns whether they sent the same. Collective."""
        rows = self._rounds.roll_call(step, phase, at, (told, 0.0))
        return len({row[0] for row in rows}) == 1
