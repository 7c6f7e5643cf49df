"""Saving what the engine holds and going on from it: which parts there are, and what a saved run is recognized by."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from abtrain.checks import as_checkpoint_error, said
from abtrain.comm.checksums import checksum, stable_repr
from abtrain.comm.communicator import Scope
from abtrain.comm.meter import Meter
from abtrain.consistency.saved_marks import marked
from abtrain.consistency.settings import HYPERPARAMETERS, chosen
from abtrain.engine.lr_rebound import LRRebound
from abtrain.errors import CheckpointError, UsageError
from abtrain.lowrank.model import FactoredModel
from abtrain.lowrank.model_state import load_model_state, model_state
from abtrain.lowrank.precondition import Preconditioner
from abtrain.merging.buffers import averaged_buffers
from abtrain.merging.copies import WeightCopies
from abtrain.merging.merger import Merger
from abtrain.merging.rounds import Rounds, TrainedBy
from abtrain.recipes.recipe import Position, Recipe
from abtrain.recipes.sync import WeightSync

VERSION = 7
"""Of the content of `ABTraining.state_dict`: other content, another number."""


@dataclass(frozen=True)
class Parts:
    """All of the engine that has a state of its own."""

    model: FactoredModel
    merger: Merger
    rounds: Rounds
    rebound: LRRebound
    preconditioner: Preconditioner
    copies: WeightCopies
    grad_scaler: torch.amp.GradScaler | None
    meter: Meter

    def state_dict(self, equal: Scope | None) -> dict[str, Any]:
        """The state of every part, by its name.

        Args:
            equal: whose workers hold the same weights, if any do.
        """
        model = model_state(self.model)
        return {
            "model": model | marked("weights", model["weights"], equal),
            "merger": self.merger.state_dict(),
            "rounds": self.rounds.state_dict(),
            "rebound": self.rebound.state_dict(),
            "preconditioner": self.preconditioner.state_dict(),
            "copies": self.copies.state_dict(),
            "grad_scaler": {} if self.grad_scaler is None else self.grad_scaler.state_dict(),
            "meter": self.meter.state_dict(),
        }

    def load_state_dict(
        self,
        state: Mapping[str, Any],
        at: Callable[[int], Position],
        trained_by: Callable[[Position], TrainedBy],
    ) -> None:
        """Every part but the meter goes on from its state. Collective if merges were under way.

        Args:
            state: a `state_dict` that fits the model.
            at: the position of a step in the recipe.
            trained_by: who trains which factors at a position.
        """
        device = next(self.model.model.parameters()).device
        load_model_state(self.model, state["model"])
        self.merger.load_state_dict(state["merger"], device)
        self.rounds.load_state_dict(state["rounds"], at, trained_by, device)
        self.rebound.load_state_dict(state["rebound"])
        self.preconditioner.load_state_dict(state["preconditioner"], device)
        self.copies.load_state_dict(state["copies"])
        if self.grad_scaler is not None and state["grad_scaler"]:
            self.grad_scaler.load_state_dict(state["grad_scaler"])


def recipe_fingerprint(recipe: Recipe) -> str:
    """64 hexadecimal digits, the same for the same recipe in every process."""
    return hashlib.sha256(stable_repr(recipe).encode()).hexdigest()


def run_problem(state: Any, recipe: Recipe) -> str:
    """Why a state is not one of this version, or not of a run of this recipe; empty if it is."""
    version = state.get("version") if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping) or type(version) is not int or version != VERSION:
        return (
            f"this is no state of version {VERSION} of abtrain's checkpoints, but {said(version)}: load what "
            "ABTraining.state_dict() returned, with the version of abtrain that saved it"
        )
    saved, wanted = state.get("recipe"), recipe_fingerprint(recipe)
    if isinstance(saved, str) and saved == wanted:
        return ""
    other = saved[:12] if isinstance(saved, str) else saved
    return (
        f"the checkpoint is of another recipe than {recipe.name!r} of {recipe.total_steps} steps (fingerprint "
        f"{said(other)}, not {wanted[:12]!r}): build the recipe with the same settings, or start a new run"
    )


def alike(state: Mapping[str, Any], position: Position | None) -> dict[str, object]:
    """Returns the values that collectives depend on, which have to be equal in the states of all workers.

    Args:
        state: of a worker.
        position: of the step that comes next; None at the end.
    """
    model, merger = state["model"], state["merger"]
    shared = position is not None and position.phase.sync is not None
    return {
        "shape": {name: str(tuple(weight.shape)) for name, weight in model["weights"].items()},
        "momentum_of": sorted(merger["momentum"]),
        "residuals_of": sorted(merger["residuals"]),
        "starts_of": {wire: sorted(starts) for wire, starts in merger["starts"].items()},
        "progress": [entry["progress"] for entry in state["rounds"]["under_way"]],
        "order_of_gradients_known": bool(state["arrivals"]),
        "param_groups": [chosen(group, HYPERPARAMETERS) for one in model["optimizers"] for group in one["groups"]]
        if shared
        else [],
    }


def can_be_resized(state: Mapping[str, Any], position: Position | None) -> bool:
    """Whether another number of workers may go on from a state: all hold the same model, or did so at their last merge.

    Args:
        state: of a worker.
        position: of the step that comes next; None at the end.
    """
    merges = position is not None and isinstance(position.phase.sync, WeightSync)
    return bool(state["workers_equal"]) or merges


def resized(states: Sequence[Mapping[str, Any]], rank: int, recipe: Recipe) -> dict[str, Any]:
    """The state of worker `rank` of another number of workers, from those of all workers.

    Amid a round, that is the state of its start: what all held after their last merge. A worker takes over the inner
    optimizer of one of the former ones. What wires owe is owed by all together: each takes the average, so that the
    average over all stays what it was.

    Args:
        states: of all former workers, at the same step.
        rank: of the worker, now.
        recipe: of the run.

    Raises:
        CheckpointError: a state is malformed; the same on all workers, since each looks at all states.
    """
    try:
        with as_checkpoint_error("the states of the former workers are malformed: load another checkpoint"):
            return _resized(states, rank, recipe)
    except UsageError as error:
        raise CheckpointError(f"the states of the former workers are of no step of the recipe: {error}") from error


def _resized(states: Sequence[Mapping[str, Any]], rank: int, recipe: Recipe) -> dict[str, Any]:
    for problem in filter(None, (run_problem(state, recipe) for state in states)):
        raise CheckpointError(problem)
    residuals = [other["merger"]["residuals"] for other in states]
    owed = {name: torch.stack([held[name] for held in residuals]).mean(0) for name in residuals[0]}
    merged = {
        name: _merged(name, [other["model"]["buffers"][name] for other in states])
        for name in states[0]["model"]["buffers"]
    }
    own: dict[str, Any] = {}
    # All, since a state that is malformed is to be found by all workers, and not only by those who take it over.
    for former, state in enumerate(states):
        taken = {**state, "merger": {**state["merger"], "residuals": owed}}
        if not state["workers_equal"] or state["rounds"]["under_way"]:
            taken |= _at_last_merge(state, merged, recipe)
        if former == rank % len(states):
            own = taken
    return own


def _at_last_merge(state: Mapping[str, Any], buffers: Mapping[str, Tensor], recipe: Recipe) -> dict[str, Any]:
    """Returns the entries of a state that change when its worker goes back to the last merge, with these `buffers`."""
    position = _last_merge(state, recipe)
    back, climb = state["step"] - position.step, state["rebound"]
    anchors = state["merger"]["anchors"]
    weights = {
        name: _as_parameter(anchors[name], weight) if name in anchors else weight
        for name, weight in state["model"]["weights"].items()
    }
    # The climb may have ended since, or have begun in an earlier phase.
    done = max(climb["done"] - back, min(climb["length"], position.step_in_phase))
    rounds = {
        "losses": torch.zeros(0, dtype=torch.float64),
        "under_way": [],
        "dropped": [entry for entry in state["rounds"]["dropped"] if entry["step"] <= position.step],
    }
    return {
        "step": position.step,
        "model": {**state["model"], "weights": weights, "buffers": dict(buffers)},
        "rounds": {**state["rounds"], **rounds},
        "rebound": {"length": climb["length"], "done": done},
        "skipped_steps": [step for step in state["skipped_steps"] if step < position.step],
        "workers_equal": True,
        "round_began": True,
    }


def _merged(name: str, buffers: Sequence[Tensor]) -> Tensor:
    """One buffer of all workers as a merge would leave it (see `abtrain.merging.buffers`)."""
    first = buffers[0]
    if not averaged_buffers([name]) or all(checksum(buffer) == checksum(first) for buffer in buffers):
        return first
    return torch.stack(list(buffers)).mean(0)


def _last_merge(state: Mapping[str, Any], recipe: Recipe) -> Position:
    """Where the round began at whose start all held the same: of a merge under way, nobody knows the outcome yet."""
    step = state["step"] - (1 if state["step"] == recipe.total_steps else 0)
    rounds = 2 if state["rounds"]["under_way"] else 1
    while True:
        position = recipe.at(step)
        rounds -= position.starts_round
        if position.first or rounds <= 0:
            return position
        step -= 1


def _as_parameter(anchor: Tensor, parameter: Tensor) -> Tensor:
    """An anchor, which is real and wide, in the dtype of its parameter."""
    held = torch.view_as_complex(anchor) if parameter.is_complex() else anchor
    return held.to(parameter.dtype)
