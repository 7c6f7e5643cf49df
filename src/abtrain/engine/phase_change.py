"""Prepares model, optimizer and wrapper for the next phase of a recipe."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from abtrain.checks import told_names
from abtrain.comm.communicator import PLAIN, Communicator, Scope
from abtrain.comm.data_parallel import DataParallel, Unsynchronized
from abtrain.consistency.agreement import take_rank_0
from abtrain.consistency.factors import agree_on_factors
from abtrain.consistency.optimizers import equalize_grad_scaler, equalize_optimizers
from abtrain.consistency.settings import check_phase
from abtrain.engine.beginning import announce
from abtrain.engine.graph_limit import GraphLimit
from abtrain.engine.optimizer_hooks import OptimizerHooks
from abtrain.lowrank.model import FactoredModel
from abtrain.merging.carry_over import carry_over, into_factors, into_weight
from abtrain.merging.changes import is_finite
from abtrain.merging.rounds import Rounds
from abtrain.merging.selection import trained_factors
from abtrain.recipes.recipe import Position, Recipe
from abtrain.recipes.sync import GradientSync

log = logging.getLogger("abtrain")


class PhaseChange:
    """Brings model, optimizer and wrapper into the form that a phase of a recipe requires.

    If weights become dense or factored, converts the momentum and residuals of merges, and starts the LR rebound.

    Attributes:
        parallel: the wrapper for forward passes, which averages gradients over the scope of the phase.
        rank_history: one entry for each time that weights were factored; see `ABTraining.rank_history`.
        dense_this_cycle: by name, for each weight that could be factored but is dense now, the reason.
        seconds: the seconds spent on singular value decompositions (`svd`), without the time of waiting for workers.
    """

    def __init__(
        self,
        model: FactoredModel,
        rounds: Rounds,
        hooks: OptimizerHooks,
        comm: Communicator,
        find_unused_parameters: bool,
        grad_scaler: torch.amp.GradScaler | None,
    ) -> None:
        self.parallel: DataParallel = Unsynchronized(model.model)
        self.rank_history: list[dict[str, Any]] = []
        self.dense_this_cycle: dict[str, str] = {}
        self.seconds = {"svd": 0.0}
        self._model, self._rounds, self._hooks, self._comm = model, rounds, hooks, comm
        self._find_unused_parameters, self._grad_scaler = find_unused_parameters, grad_scaler
        self._graph_limit = GraphLimit()
        hooks.guard.whose = self._whose_gradients

    def enter(self, position: Position, recipe: Recipe) -> None:
        """Begins the phase whose first step is at `position` in the recipe. Collective over the world."""
        phase, records = position.phase, self._model.records
        restored = list(records)
        # The next phase has other anchors. Until then, decompositions need the memory.
        self._rounds.merger.anchors.clear()
        self._comm.meter.phase = phase.name
        # The old wrapper has gradient buffers as large as the model: free them before new parameters are allocated.
        self.unwrap()
        self._rounds.release()
        reshaped = bool(records) or phase.weights == "factored"
        carry_over(self._rounds.merger, records.values(), self._model.projects, into_weight)
        self._model.restore()
        if phase.weights == "factored":
            self._factorize(position, recipe)
            carry_over(self._rounds.merger, self._model.records.values(), self._model.projects, into_factors)
        if reshaped:
            self._make_equal(restored)
            self._hooks.rebound.start(recipe.lr_rebound_steps)
        if phase.rounds is not None:
            self._rounds.begin()
        self._check(position)
        self.train(position)
        self._rounds.shared.copies.renew()

    def _check(self, position: Position) -> None:
        """Compares layouts and settings of all workers. If layouts differ, DDP would add unrelated elements or hang."""
        if position.phase.sync is not None:
            where = f"step {position.step}, phase {position.phase.name}"
            check_phase(self._comm, self._model, where, self._rounds.shared.compared_settings(position.phase))

    def _make_equal(self, restored: Sequence[str]) -> None:
        """Gives all workers rank 0's restored weights and momentum, since rounding may differ between workers."""
        dense = [name for name in restored if name not in self._model.records]
        weights = {name: self._model.model.get_parameter(name).data for name in dense}
        merger = self._rounds.merger
        shapes = {name: tensor.shape for name, tensor in self._model.parameters().items()}
        momentum = merger.places.joined(merger.momentum, shapes)
        differed = take_rank_0(self._comm, weights | {f"momentum of {name}": held for name, held in momentum.items()})
        for name, piece in merger.places.pieces(momentum).items():
            merger.momentum[name].copy_(piece)
        if differed and self._comm.rank == 0:
            log.info("%d tensors differed between workers by rounding: all workers use rank 0's now", len(differed))

    def train(self, position: Position) -> None:
        """Unfreezes the parameters that the phase trains at this position, and wraps the model to average gradients."""
        self.unwrap()
        phase = position.phase
        if phase.weights == "factored":
            self._model.train_only(trained_factors(position, self._comm.topology, self._comm.rank))
        self._graph_limit.allow_form(self._model)
        if phase.rounds is not None:
            self._wrap("group", PLAIN)
        elif isinstance(phase.sync, GradientSync):
            self._wrap("world", phase.sync)

    def unwrap(self) -> None:
        """Removes the wrapper, so that gradients are no longer averaged."""
        self.parallel.close()
        self.parallel = Unsynchronized(self._model.model)

    def _wrap(self, scope: Scope, sync: GradientSync) -> None:
        self.parallel = self._comm.data_parallel(self._model.model, scope, self._find_unused_parameters, sync)

    def after_step(self, position: Position, upcoming: Position) -> None:
        """Prepares the optimizer for the next step, after a step in a phase with merges. Collective over the world."""
        if upcoming.first and upcoming.phase.shares_gradients:
            self._equalize(position)
        if position.phase.trains == "a_then_b" and upcoming.turn != position.turn and not upcoming.first:
            self.train(upcoming)

    def _equalize(self, position: Position) -> None:
        """Makes optimizer state and loss scale equal on all workers, before they average gradients."""
        if position.phase.trains in ("a_then_b", "b"):
            # Each worker has state for both factors. The state of the frozen factor must become equal, too.
            self._model.train_only("all")
        reset = self._model.resets()
        kept = [p for name, p in self._model.trained(self._rounds.shared.treatments).items() if name not in reset]
        equalize_optimizers(self._model.optimizers, kept, self._comm)
        if self._grad_scaler is not None:
            equalize_grad_scaler(self._grad_scaler, self._comm)

    def _whose_gradients(self) -> str:
        """Returns the end of an error message, with the worker whose gradients are not finite."""
        rank = self._comm.rank
        if not self.parallel.spoiled():
            return f", produced by a worker other than rank {rank}"
        shared = self._rounds.shared
        held = shared.replicated() | {f"buffer {name}": buffer for name, buffer in shared.buffers().items()}
        broken = told_names([name for name, tensor in held.items() if not is_finite(tensor)])
        return f", produced by rank {rank}{f' (which has NaN or infinity in {broken})' if broken else ''}"

    def state_dict(self) -> dict[str, Any]:
        """Returns `rank_history`, `dense_this_cycle`, `seconds`, and the order in which gradients become ready."""
        return {
            "rank_history": list(self.rank_history),
            "dense_this_cycle": dict(self.dense_this_cycle),
            "seconds": dict(self.seconds),
            "arrivals": self.parallel.arrivals(),
        }

    def load_state_dict(self, state: Mapping[str, Any], position: Position | None) -> None:
        """Restores a `state_dict` at a position (None: the recipe's end). The model must be restored already."""
        self.rank_history, self.dense_this_cycle = list(state["rank_history"]), dict(state["dense_this_cycle"])
        self.seconds = dict(state["seconds"])
        if position is not None:
            self._check(position)
            self.train(position)
            self.parallel.follow(state["arrivals"])

    def _rest(self) -> str:
        """Returns how many weights stay dense in this cycle, with the first reason; empty if none."""
        reasons = list(self.dense_this_cycle.values())
        if not reasons:
            return ""
        more = ", and other reasons" if len(set(reasons)) > 1 else ""
        return f"; {len(reasons)} stay{'s' * (len(reasons) == 1)} dense ({reasons[0]}{more})"

    def _factorize(self, position: Position, recipe: Recipe) -> None:
        assert recipe.factoring is not None
        start, waited = time.perf_counter(), self._comm.meter.sync_seconds
        factors, self.dense_this_cycle = agree_on_factors(self._comm, self._model.matrices(), recipe.factoring)
        waited = self._comm.meter.sync_seconds - waited
        self.seconds["svd"] += time.perf_counter() - start - waited
        self._model.factorize(factors, position.phase.damping)
        ranks = {name: pair.k for name, pair in factors.items()}
        entry = {"cycle": position.cycle, "step": position.step, "ranks": ranks, "dense": dict(self.dense_this_cycle)}
        self.rank_history.append(entry)
        text = f"step {position.step}: {len(factors)} of {len(self._model.names)} weights factored"
        if self._comm.rank == 0 and factors:
            announce(f"{text}, {self._model.compression:.1f} : 1{self._rest()}")
        elif self._comm.rank == 0:
            name, reason = next(iter(self.dense_this_cycle.items()))
            log.warning(
                f"{text}, so the model is no smaller ({name}: {reason}). Keep fewer singular values (a larger "
                "sigma_cutoff, or rank_rule=fixed:16), or use local_sgd"
            )
