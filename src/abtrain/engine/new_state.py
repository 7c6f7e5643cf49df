"""Examines optimizer state when it appears: most optimizers make theirs in the first steps."""

from __future__ import annotations

import logging

from abtrain.comm.communicator import Communicator
from abtrain.engine.optimizer_problems import check_modes, doubts_about_state, old_steps
from abtrain.merging.shared_tensors import SharedTensors
from abtrain.recipes.recipe import Recipe

log = logging.getLogger("abtrain")

_FIRST_STEPS = 2
"""Steps in which most optimizers make their state."""


class NewState:
    """Warns of optimizer state that cannot be saved or made equal, as soon as it exists.

    Args:
        shared: with the model, its optimizers, and the copies of weights in their state.
        recipe: of the run.
        comm: of this worker.
    """

    def __init__(self, shared: SharedTensors, recipe: Recipe, comm: Communicator) -> None:
        self._shared, self._recipe, self._speaks = shared, recipe, comm.rank == 0
        self._warned_of_steps = bool(old_steps(shared.model.optimizers))
        phases = recipe.phases
        # Gradients are shared after rounds, so that optimizer state has to be made equal between the two.
        self._equalized = (
            comm.topology.world_size > 1
            and any(phase.rounds is not None for phase in phases)
            and any(phase.shares_gradients for phase in phases)
        )

    def check(self, steps_done: int) -> None:
        """Examines state after a step of the optimizers, the one after `steps_done` steps.

        Raises:
            UsageError: state can neither be made equal nor saved, or the optimizer is in its mode of evaluation.
        """
        optimizers = self._shared.model.optimizers
        check_modes(optimizers)
        if not self._shared.copies.look() and steps_done >= _FIRST_STEPS:
            return
        doubts = doubts_about_state(optimizers, self._recipe, self._equalized)
        if steps_done == 0 and not self._warned_of_steps:
            doubts += old_steps(optimizers, most=1)
        for doubt in doubts if self._speaks else ():
            log.warning(doubt)
