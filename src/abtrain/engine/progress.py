"""The progress of a run: the step, the position in the recipe, and which workers have equal weights."""

from __future__ import annotations

import atexit
import logging
import sys
from collections.abc import Mapping
from typing import Any

from abtrain.comm.communicator import Communicator, Scope
from abtrain.errors import PeerLostError, UsageError
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
        self._saved_step = -1
        self._told: set[str] = set()
        _LAST[comm.rank] = self

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
    def weights_differ(self) -> bool:
        """Whether groups of workers have different weights, between merges."""
        return self.in_rounds and not (self.alone or self.workers_equal)

    @property
    def loose_end(self) -> str:
        """A warning if the run ends now, before its recipe. Empty if it was closed, or saved at this step."""
        missing = self.recipe.total_steps - self.steps_done
        if self.closed or not missing or self._saved_step == self.steps_done:
            return ""
        remedy = (
            ", within a round: each worker has a different model. Save the model of `with ab.merged() as model`, or "
            "ab.state_dict() to continue later"
            if self.weights_differ
            else ": call ab.step() once after every optimizer.step(), and give the recipe as many total_steps as the "
            "loop makes, or loop `while not ab.finished`; ab.close() ends a run early"
        )
        return (
            f"the run ends at step {self.steps_done}, {missing} steps before recipe {self.recipe.name!r} ends{remedy}"
        )

    def warn_of_end(self) -> None:
        """Logs the warning of `loose_end`, if there is one. Of the workers that end at this step, one logs it."""
        end, peers = self.loose_end, self.comm.peers
        if not end:
            return
        if peers is None:
            self.warn_once("end", end)
        elif peers.is_first(f"end/{self.steps_done}"):
            # Others may end later, or wait for this worker.
            log.warning("%s%s", "" if self.alone else f"rank {self.comm.rank}: ", end)

    def leave_word(self, error: BaseException | None) -> None:
        """Leaves a message for workers that may wait for this one, if it leaves the run before its end.

        Args:
            error: the error because of which it leaves; None if it leaves by itself.
        """
        end, peers = self.loose_end, self.comm.peers
        # A worker that has lost another one is not the one to blame.
        if not end or peers is None or peers.has_lost_one or isinstance(error, PeerLostError):
            return
        where = end.partition(":")[0]
        peers.leave_word(UsageError(f"{where} ({type(error).__name__}: {error})" if error else where))

    def tell_of_close(self) -> None:
        """Tells other workers that this one ends its run now, and logs a warning if it does so within a round."""
        if self.weights_differ:
            self.warn_of_end()
        self.leave_word(sys.exception())

    def warn_once(self, topic: str, text: str) -> None:
        """Logs a warning on rank 0, unless there was one about this topic."""
        if self.comm.rank == 0 and topic not in self._told:
            self._told.add(topic)
            log.warning("%s", text)

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


_LAST: dict[int, Progress] = {}
"""The last run of each rank in this process. The dict keeps it alive after the function that trained has returned."""


@atexit.register
def warn() -> None:
    """Warns of a run that the process leaves before its end, unless after an error, and tells the other workers."""
    error = getattr(sys, "last_value", None)
    for progress in _LAST.values():
        progress.leave_word(error)
        peers = progress.comm.peers
        # A command that has told of a lost worker ends without an exception.
        if error is None and not (peers is not None and peers.has_lost_one):
            progress.warn_of_end()


def rewound(step: int) -> dict[str, Any]:
    """Returns the `Progress.state_dict` of a run directly after a merge, when `step` steps were done."""
    return {"step": step, "workers_equal": True}
