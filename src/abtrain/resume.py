"""Saving what the engine holds and going on from it: which parts there are, and what a saved run is recognized by."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from abtrain.comm.meter import Meter
from abtrain.errors import CheckpointError
from abtrain.lowrank.model import FactoredModel
from abtrain.lowrank.precondition import Preconditioner
from abtrain.lowrank.saved import load_model_state, model_state
from abtrain.merge import Merger
from abtrain.rebound import LRRebound
from abtrain.recipe import Position, Recipe
from abtrain.rounds import Rounds, TrainedBy
from abtrain.switch import Switch

VERSION = 2
"""Of the content of `ABTraining.state_dict`: other content, another number."""

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # in the repr of a rank rule that is no dataclass


@dataclass(frozen=True)
class Parts:
    """All of the engine that has a state of its own."""

    model: FactoredModel
    merger: Merger
    rounds: Rounds
    switch: Switch
    rebound: LRRebound
    preconditioner: Preconditioner
    grad_scaler: torch.amp.GradScaler | None
    meter: Meter

    def state_dict(self) -> dict[str, Any]:
        """The state of every part, by its name."""
        return {
            "model": model_state(self.model),
            "merger": self.merger.state_dict(),
            "rounds": self.rounds.state_dict(),
            "switch": self.switch.state_dict(),
            "rebound": self.rebound.state_dict(),
            "preconditioner": self.preconditioner.state_dict(),
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
        self.switch.load_state_dict(state["switch"])
        self.rebound.load_state_dict(state["rebound"])
        self.preconditioner.load_state_dict(state["preconditioner"], device)
        if self.grad_scaler is not None and state["grad_scaler"]:
            self.grad_scaler.load_state_dict(state["grad_scaler"])


def stable_repr(value: object) -> str:
    """Its `repr`, the same in every process."""
    return _ADDRESS.sub("", repr(value))


def recipe_fingerprint(recipe: Recipe) -> str:
    """64 hexadecimal digits, the same for the same recipe in every process."""
    return hashlib.sha256(stable_repr(recipe).encode()).hexdigest()


def check_run(state: Mapping[str, Any], recipe: Recipe) -> None:
    """Makes sure that a state is of this version, and of a run of this recipe.

    Raises:
        CheckpointError: it is not.
    """
    if not isinstance(state, Mapping) or state.get("version") != VERSION:
        found = state.get("version") if isinstance(state, Mapping) else type(state).__name__
        raise CheckpointError(
            f"this is no state of version {VERSION} of abtrain's checkpoints, but {found!r}: load what "
            "ABTraining.state_dict() returned, with the version of abtrain that saved it"
        )
    if state["recipe"] != recipe_fingerprint(recipe):
        raise CheckpointError(
            f"the checkpoint is of another recipe than {recipe.name!r} of {recipe.total_steps} steps (fingerprint "
            f"{state['recipe'][:12]}, not {recipe_fingerprint(recipe)[:12]}): build the recipe with the same settings, "
            "or start a new run"
        )


def decided(recipe: Recipe, state: Mapping[str, Any]) -> Recipe:
    """The recipe with the lengths that were decided by measurement before the state was saved."""
    for decision in state["decisions"]:
        recipe = recipe.cut_after(recipe.at(decision["step"] - 1))
    return recipe


def can_be_resized(state: Mapping[str, Any]) -> bool:
    """Whether another number of workers may go on from a state: all held the same model, and no merge was under way."""
    return bool(state["workers_equal"]) and not state["rounds"]["under_way"]


def resized(states: Sequence[Mapping[str, Any]], rank: int) -> dict[str, Any]:
    """The state of worker `rank` of another number of workers, from those of all workers at a merge.

    A worker takes over the inner optimizer of one of the former ones. What wires owe is owed by all together: each
    takes the average, so that the average over all stays what it was.
    """
    state = dict(states[rank % len(states)])
    residuals = [other["merger"]["residuals"] for other in states]
    owed = {name: torch.stack([held[name] for held in residuals]).mean(0) for name in residuals[0]}
    state["merger"] = {**state["merger"], "residuals": owed}
    # The first worker alone measures.
    state["switch"] = states[0]["switch"] if rank == 0 else {"spectra": {}, "drift": {}, "sizes": {}}
    return state
