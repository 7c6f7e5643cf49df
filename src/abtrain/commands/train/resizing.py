"""Converts the saved states of a run to another number of workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from abtrain.checks import as_checkpoint_error
from abtrain.engine import optimizer_hooks, progress
from abtrain.engine.state_problems import run_problem
from abtrain.errors import CheckpointError, UsageError
from abtrain.merging import rounds
from abtrain.merging.buffers import pooled_buffers
from abtrain.merging.resizing import placed, pooled, rewound_weights
from abtrain.recipes.recipe import Position, Recipe


def can_be_resized(state: Mapping[str, Any], position: Position | None) -> bool:
    """Returns whether another number of workers can resume the run from this state.

    They can if all workers have equal weights. Otherwise the run must go back to its last merge. This is impossible in
    a phase without merges, or if an optimizer keeps copies of the weights, because they would keep their later values.

    Args:
        state: the state of a worker.
        position: the position of the next step in the recipe; None at the end.
    """
    if state["workers_equal"] and not state["rounds"]["under_way"]:
        return True
    return position is not None and position.phase.rounds is not None and not state["copies"]["copies"]


def resized(states: Sequence[Mapping[str, Any]], rank: int, recipe: Recipe, group_size: int = 1) -> dict[str, Any]:
    """Returns the state of worker `rank` in a run with another number of workers, or with groups of another size.

    If the states were saved between merges, the new run continues from the last merge, or the phase's start, with equal
    weights. Each new worker gets the optimizer state of one former worker, and the average of the former workers'
    compression residuals. The average residual over all workers therefore stays the same.

    Args:
        states: the states of all former workers, by rank, saved at the same step.
        rank: the worker's rank in the new run.
        recipe: the recipe of the run.
        group_size: the number of workers in a group of the new run.

    Raises:
        CheckpointError: a state is malformed. All workers raise the error, since each checks all states.
    """
    try:
        with as_checkpoint_error("the states of the former workers are malformed: load another checkpoint"):
            own = _resized(states, rank // group_size, recipe)
            return {**own, "merger": placed(own["merger"], rank % group_size, group_size)}
    except UsageError as error:
        raise CheckpointError(f"the checkpoint does not fit the recipe: {error}. Load another checkpoint") from error


def _resized(states: Sequence[Mapping[str, Any]], group: int, recipe: Recipe) -> dict[str, Any]:
    """Returns the state of the workers of one group. Its tensors are whole."""
    for problem in filter(None, (run_problem(state, recipe) for state in states)):
        raise CheckpointError(problem)
    mergers = pooled([state["merger"] for state in states])
    buffers = pooled_buffers([state["model"]["buffers"] for state in states])
    # Workers of a group continue with equal optimizer states.
    size = states[0]["merger"]["places"]
    own: dict[str, Any] = {}
    # Every worker converts all states, so that all workers find a malformed one.
    for former, (state, merger) in enumerate(zip(states, mergers, strict=True)):
        converted = {**state, "merger": merger}
        if not state["workers_equal"] or state["rounds"]["under_way"]:
            converted |= _at_last_merge(converted, buffers, recipe)
        if former == group * size % len(states):
            own = converted
    return own


def _at_last_merge(state: Mapping[str, Any], buffers: Mapping[str, Tensor], recipe: Recipe) -> dict[str, Any]:
    """Returns new values for the entries of a worker's state that change when the run goes back to its last merge.

    The model's buffers are replaced by `buffers`.
    """
    position = _last_merge(state, recipe)
    weights = rewound_weights(state["merger"], state["model"]["weights"])
    back = state["step"] - position.step
    return {
        **progress.rewound(position.step),
        "model": {**state["model"], "weights": weights, "buffers": buffers},
        "rounds": rounds.rewound(state["rounds"], position.step),
        **optimizer_hooks.rewound(state, position.step, back, position.step_in_phase),
    }


def _last_merge(state: Mapping[str, Any], recipe: Recipe) -> Position:
    """Returns the position of the last step that began with equal weights on all workers, after a merge or phase."""
    step = state["step"] - (1 if state["step"] == recipe.total_steps else 0)
    left = 2 if state["rounds"]["under_way"] else 1
    while True:
        position = recipe.at(step)
        left -= position.starts_round
        if position.first or left <= 0:
            return position
        step -= 1
