"""Saves the state of a run as one dictionary, and checks and loads such a dictionary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from abtrain.checks import as_checkpoint_error
from abtrain.consistency.agreement import CALL, check_equal, raise_together
from abtrain.consistency.replicas import marked
from abtrain.consistency.settings import chosen
from abtrain.engine.optimizer_hooks import OptimizerHooks
from abtrain.engine.phase_change import PhaseChange
from abtrain.engine.progress import Progress
from abtrain.engine.state_parts import ResumedRun
from abtrain.engine.state_problems import VERSION, recipe_fingerprint, recipe_settings, state_problem
from abtrain.lowrank.model import FactoredModel
from abtrain.lowrank.model_state import load_model_state, model_state
from abtrain.merging.places import Places
from abtrain.merging.rounds import Rounds
from abtrain.merging.sharded_state import group_problem, sharded_like
from abtrain.merging.shared_tensors import SharedTensors
from abtrain.recipes import automatic
from abtrain.recipes.recipe import Position


@dataclass(frozen=True)
class EngineState:
    """The parts of the engine that have state. `phases` is loaded last, since it wraps the restored model."""

    progress: Progress
    model: FactoredModel
    rounds: Rounds
    hooks: OptimizerHooks
    phases: PhaseChange
    grad_scaler: torch.amp.GradScaler | None

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of this worker: the states of all parts, by name."""
        model, scope = model_state(self.model), self.rounds.shared.same_on(self.progress.equal_scope)
        return {
            "version": VERSION,
            "recipe": recipe_fingerprint(self.progress.recipe),
            "settings": recipe_settings(self.progress.recipe),
            "chosen": automatic.chosen(self.progress.recipe),
            "model": model | marked("weights", model["weights"], scope),
            "merger": self.rounds.merger.state_dict(),
            "rounds": self.rounds.state_dict(),
            "copies": self.rounds.shared.copies.state_dict(),
            "grad_scaler": {} if self.grad_scaler is None else self.grad_scaler.state_dict(),
            "meter": self.progress.comm.meter.state_dict(),
            **self.progress.state_dict(),
            **self.hooks.state_dict(),
            **self.phases.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Checks the states of all workers, and then loads this worker's state. Collective over the world.

        Raises:
            CheckpointError, RanksDisagreeError, NonFiniteError: see `ABTraining.load_state_dict`.
        """
        comm, recipe = self.progress.comm, self.progress.recipe
        run = ResumedRun(recipe, comm, self.rounds.shared, self.grad_scaler)
        check_equal(comm, {CALL: "ab.load_state_dict()"})
        raise_together(comm, state_problem(state, run))
        position = recipe.at(state["step"]) if state["step"] < recipe.total_steps else None
        check_equal(
            comm,
            _equal_on_all(state, position, self.rounds.shared),
            "workers load states that do not belong together",
            "Load on every worker what was saved at the same step of the same run",
        )
        if {*state["model"].get("sharded", ())} != {*self.model.sharded}:
            raise_together(comm, group_problem(self.model, state["model"], Places(comm)))
        with as_checkpoint_error(
            "the state could not be applied, and the model must not be trained now: build model, optimizer and "
            "ABTraining again, and load another checkpoint"
        ):
            self._load(state)

    def _load(self, state: Mapping[str, Any]) -> None:
        self.model.reshard()
        device = next(self.model.model.parameters()).device
        progress, comm = self.progress, self.progress.comm
        self.phases.unwrap()
        comm.begin_run()
        progress.load_state_dict(state)
        comm.meter.phase = state["meter"]["phase"]
        load_model_state(self.model, sharded_like(self.model, state["model"], Places(comm)))
        self.rounds.shared.copies.load_state_dict(state["copies"])
        self.rounds.merger.load_state_dict(state["merger"], device)
        self.rounds.load_state_dict(state["rounds"], progress.recipe, device)
        self.hooks.load_state_dict(state, device)
        if self.grad_scaler is not None and state["grad_scaler"]:
            self.grad_scaler.load_state_dict(state["grad_scaler"])
        if progress.equal_scope is not None:
            where = f"step {progress.steps_done} of the loaded states"
            self.rounds.shared.check_equal(progress.equal_scope, where)
        self.phases.load_state_dict(state, progress.position)
        # The meter is loaded last, so that it does not count the messages of loading.
        comm.meter.load_state_dict(state["meter"])


def _equal_on_all(state: Mapping[str, Any], position: Position | None, shared: SharedTensors) -> dict[str, object]:
    """Returns the values that must be equal in the states of all workers, since collectives depend on them."""
    model, merger, under_way = state["model"], state["merger"], state["rounds"]["under_way"]
    sharded = model.get("sharded", [])
    settings = () if position is None else shared.compared_settings(position.phase)
    groups = [group for one in model["optimizers"] for group in one["groups"]] if settings else []
    return {
        "step": int(state["step"]),
        "phase": "none, the recipe has ended" if position is None else position.phase.name,
        "workers_equal": bool(state["workers_equal"]),
        "merges_since_step": [merge["step"] for merge in under_way],
        # The shapes of shards follow from those of whole weights, and may differ within a group.
        "shape": {name: str(tuple(held.shape)) for name, held in model["weights"].items() if name not in sharded},
        "sharded": sharded,
        "momentum_of": sorted(merger["momentum"]),
        "residuals_of": sorted(merger["residuals"]),
        "progress": [merge["progress"] for merge in under_way],
        "order_of_gradients_known": bool(state["arrivals"]),
        "param_groups": [chosen(group, settings) for group in groups],
    }
