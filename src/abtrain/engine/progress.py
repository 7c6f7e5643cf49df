"""The progress of a run: the step, the position in the recipe, and which workers have equal weights."""

from __future__ import annotations

import atexit
import logging
import weakref
from collections.abc import Mapping
from typing import Any

from abtrain.comm.communicator import Communicator, Scope
from abtrain.errors import UsageError
from abtrain.recipes.recipe import Position, Recipe

log = logging.getLogger("abtrain")


class Progress:
    """Records the progress of a run.

    Attributes:
        steps_done: the number of completed training steps.
        position: the position of the next step in the recipe; None after the last step.
        workers_equal: whether all workers have the same weights.
        closed: whether `ABTraining.close` was called.
        shows_average: whether the model has the workers' average weights, inside `ABTraining.merged`.
    """

    def __init__(self, recipe: Recipe, comm: Communicator) -> None:
        self.recipe, self.comm = recipe, comm
        self.steps_done = comm.meter.step = 0
        self.position: Position | None = recipe.at(0)
        self.workers_equal = True
        self.closed = self.shows_average = False
        self._saved_step = 0
        _PRESENT.add(self)

    @property
    def alone(self) -> bool:
        """Whether this is the only worker."""
        return self.comm.topology.world_size == 1

    @property
    def in_rounds(self) -> bool:
        """Whether groups of workers train separately in the next step, between merges."""
        return self.position is not None and self.position.phase.rounds is not None

    @property
    def shares_gradients(self) -> bool:
        """Whether several workers exist and all use the same averaged gradients in the next step."""
        return not self.alone and self.position is not None and self.position.phase.shares_gradients

    @property
    def averages_gradients(self) -> bool:
        """Whether this worker averages its gradients with others in the next step: with all, or within its group."""
        return self.shares_gradients or (self.in_rounds and self.comm.topology.group_size > 1)

    @property
    def equal_scope(self) -> Scope | None:
        """The scope in which workers have the same weights; None if each worker has its own weights."""
        if self.workers_equal:
            return "world"
        return "group" if self.in_rounds else None

    @property
    def within_round(self) -> str:
        """A warning, on rank 0 only, if workers have different models that are not saved; otherwise empty."""
        position = self.position
        if self.comm.rank or self.alone or self.workers_equal or position is None or not self.in_rounds:
            return ""
        if self._saved_step == self.steps_done:
            return ""
        return (
            f"the run ends at step {self.steps_done}, between merges of phase {position.phase.name!r}: each worker has "
            "a different model. Save the average in `with ab.merged() as model:`, or ab.state_dict() to continue later"
        )

    def advance(self) -> Position | None:
        """Counts a step and returns the position of the next one. The caller sets `position` after the step."""
        self.steps_done += 1
        self.comm.meter.step = self.steps_done
        return self.recipe.at(self.steps_done) if self.steps_done < self.recipe.total_steps else None

    def refuse_in_view(self, action: str) -> None:
        """Raises UsageError inside `ABTraining.merged`, since the end of its block would undo the action."""
        if self.shows_average:
            raise UsageError(
                f"{action} is not allowed inside `with ab.merged():`, where the model temporarily has the average "
                "weights of all workers: leave the block first"
            )

    def check_open(self) -> None:
        """Raises UsageError if the run was closed."""
        if self.closed:
            raise UsageError("ABTraining was closed: build it again to continue, or train the model without it")

    def check_unfinished(self) -> None:
        """Raises UsageError if the run was closed or its recipe has ended."""
        self.check_open()
        if self.position is None:
            raise UsageError(
                f"recipe {self.recipe.name!r} ended after its {self.recipe.total_steps} steps: "
                "stop the loop there, or build the recipe with a larger total_steps"
            )

    def state_dict(self) -> dict[str, Any]:
        """Returns the step and whether workers have equal weights, and records that this step was saved."""
        self._saved_step = self.steps_done
        return {"step": self.steps_done, "workers_equal": self.workers_equal}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a saved `state_dict`."""
        self.steps_done = self._saved_step = self.comm.meter.step = state["step"]
        self.workers_equal = state["workers_equal"]
        self.position = self.recipe.at(state["step"]) if state["step"] < self.recipe.total_steps else None


_PRESENT: weakref.WeakSet[Progress] = weakref.WeakSet()
"""The `Progress` objects of all runs in this process."""


@atexit.register
def warn() -> None:
    """Logs a warning if the process ends between merges, when each worker has a different model."""
    for progress in list(_PRESENT):
        if progress.within_round:
            log.warning("%s", progress.within_round)


def rewound(step: int) -> dict[str, Any]:
    """Returns the `Progress.state_dict` of a run directly after a merge, when `step` steps were done."""
    return {"step": step, "workers_equal": True}
