"""Converts the saved states of a run to another number of workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from abtrain.checks import as_checkpoint_error
from abtrain.comm.checksums import checksum
from abtrain.engine.state_problems import run_problem
from abtrain.errors import CheckpointError, UsageError
from abtrain.merging.buffers import averaged_buffers
from abtrain.recipes.recipe import Position, Recipe


def can_be_resized(state: Mapping[str, Any], position: Position | None) -> bool:
    """Returns whether another number of workers can continue: workers have equal weights, or had at the last merge.

    Args:
        state: the state of a worker.
        position: the position of the next step in the recipe; None at the end.
    """
    return bool(state["workers_equal"]) or (position is not None and position.phase.rounds is not None)


def resized(states: Sequence[Mapping[str, Any]], rank: int, recipe: Recipe) -> dict[str, Any]:
    """Returns the state of worker `rank` in a run with another number of workers.

    If the states were saved between merges, the new run continues from the last merge, or the phase's start, with equal
    weights. Each new worker takes the optimizer state of one former worker, and the average of the former workers'
    compression residuals. The average residual over all workers therefore stays the same.

    Args:
        states: the states of all former workers, by rank, saved at the same step.
        rank: the worker's rank in the new run.
        recipe: the recipe of the run.

    Raises:
        CheckpointError: a state is malformed. All workers raise the error, since each checks all states.
    """
    try:
        with as_checkpoint_error("the states of the former workers are malformed: load another checkpoint"):
            return _resized(states, rank, recipe)
    except UsageError as error:
        raise CheckpointError(f"the states of the former workers fit no step of the recipe: {error}") from error


def _resized(states: Sequence[Mapping[str, Any]], rank: int, recipe: Recipe) -> dict[str, Any]:
    for problem in filter(None, (run_problem(state, recipe) for state in states)):
        raise CheckpointError(problem)
    # Only the average of residuals matters to merges. It stays the same for any number of workers that have it.
    residuals = _averages([state["merger"]["residuals"] for state in states])
    buffers = _merged_buffers([state["model"]["buffers"] for state in states])
    own: dict[str, Any] = {}
    # Every worker converts all states, so that all workers find a malformed one.
    for former, state in enumerate(states):
        converted = {**state, "merger": {**state["merger"], "residuals": residuals}}
        if not state["workers_equal"] or state["rounds"]["under_way"]:
            converted |= _at_last_merge(state, buffers, recipe)
        if former == rank % len(states):
            own = converted
    return own


def _averages(tensors: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the average of the workers' tensors, by name."""
    return {name: torch.stack([held[name] for held in tensors]).mean(0) for name in tensors[0]}


def _merged_buffers(held: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the buffers that a merge of the workers' buffers would leave, by name."""
    first = held[0]
    differ = {name for name, one in first.items() if any(checksum(buffers[name]) != checksum(one) for buffers in held)}
    averaged = averaged_buffers(differ)
    return {**first, **_averages([{name: buffers[name] for name in averaged} for buffers in held])}


def _at_last_merge(state: Mapping[str, Any], buffers: Mapping[str, Tensor], recipe: Recipe) -> dict[str, Any]:
    """Returns the entries of a state that change if its worker goes back to the last merge, with given `buffers`."""
    position = _last_merge(state, recipe)
    step, ramp, rounds = position.step, state["rebound"], state["rounds"]
    anchors, weights = state["merger"]["anchors"], state["model"]["weights"]
    started = {name: _as_parameter(anchors[name], held) if name in anchors else held for name, held in weights.items()}
    # The ramp of learning rates may have begun in an earlier phase, or may have ended in the meantime.
    done = max(ramp["done"] - (state["step"] - step), min(ramp["length"], position.step_in_phase))
    return {
        "step": step,
        "workers_equal": True,
        "model": {**state["model"], "weights": started, "buffers": buffers},
        "rounds": {
            **rounds,
            "losses": torch.zeros(0, dtype=torch.float64),
            "dropped": [entry for entry in rounds["dropped"] if entry["step"] <= step],
            "under_way": [],
        },
        "round_began": True,
        "skipped_steps": [skipped for skipped in state["skipped_steps"] if skipped < step],
        "rebound": {"length": ramp["length"], "done": done},
    }


def _as_parameter(anchor: Tensor, parameter: Tensor) -> Tensor:
    """Returns an anchor, which is real and wide, in the dtype of its parameter."""
    held = torch.view_as_complex(anchor) if parameter.is_complex() else anchor
    return held.to(parameter.dtype)


def _last_merge(state: Mapping[str, Any], recipe: Recipe) -> Position:
    """Returns the position after the last finished merge, or at the phase's start, with equal weights everywhere."""
    step = state["step"] - (1 if state["step"] == recipe.total_steps else 0)
    left = 2 if state["rounds"]["under_way"] else 1
    while True:
        position = recipe.at(step)
        left -= position.starts_round
        if position.first or left <= 0:
            return position
        step -= 1
