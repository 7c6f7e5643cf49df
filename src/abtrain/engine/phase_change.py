"""Changes of phase: the form of the weights and the optimizer's state, the trained parameters, and the wrapper."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from abtrain.comm.communicator import PLAIN, Communicator, Scope
from abtrain.comm.data_parallel import DataParallel, Unsynchronized
from abtrain.consistency.agreement import take_first
from abtrain.consistency.factors import agree_on_factors
from abtrain.consistency.optimizers import equalize_optimizers
from abtrain.consistency.settings import HYPERPARAMETERS, check_phase
from abtrain.engine.lr_rebound import LRRebound
from abtrain.lowrank.classify import Treatment
from abtrain.lowrank.model import FactoredModel
from abtrain.merging.carry_over import carry_to_factors, carry_to_weights
from abtrain.merging.merger import Merger
from abtrain.merging.roles import trained_factors
from abtrain.merging.rounds import Rounds
from abtrain.recipes.recipe import Position, Recipe
from abtrain.recipes.sync import GradientSync, WeightSync

log = logging.getLogger("abtrain")


class PhaseChange:
    """Model, optimizer and wrapper, as the phase of a recipe wants them.

    Args:
        model: with its optimizer.
        treatments: what becomes of each parameter.
        comm: of this worker.
        merger: whose anchors and momentum follow the form of the weights.
        rounds: which begin with a phase that merges.
        rebound: climbs after a change of shapes.
        find_unused_parameters: as in DDP.
        same_settings: whether the optimizers' settings have to be equal on all workers.

    Attributes:
        parallel: through which forward passes go, so that gradients are averaged as the phase says.
        rank_history: of every factoring, the step, k of each weight, and why others stay dense.
        dense_this_cycle: weights that could be factored but are not at present, with the reason.
        seconds: spent on decompositions (`svd`), without what was waited for others.
    """

    def __init__(
        self,
        model: FactoredModel,
        treatments: Sequence[Treatment],
        comm: Communicator,
        merger: Merger,
        rounds: Rounds,
        rebound: LRRebound,
        find_unused_parameters: bool,
        same_settings: bool,
    ) -> None:
        self.parallel: DataParallel = Unsynchronized(model.model)
        self.rank_history: list[dict[str, Any]] = []
        self.dense_this_cycle: dict[str, str] = {}
        self.seconds = {"svd": 0.0}
        self._model, self._treatments, self._comm = model, treatments, comm
        self._merger, self._rounds, self._rebound = merger, rounds, rebound
        self._find_unused_parameters, self._same_settings = find_unused_parameters, same_settings

    def enter(self, position: Position, recipe: Recipe) -> None:
        """A phase begins. Collective over the world.

        Args:
            position: of its first step.
            recipe: that it belongs to.
        """
        phase, records = position.phase, self._model.records
        restored = list(records)
        self._comm.meter.phase = phase.name
        # The old wrapper holds gradient buffers as large as the model: they go before new parameters come.
        self.unwrap()
        reshaped = bool(records) or phase.weights == "factored"
        carry_to_weights(self._merger, records.values(), momentum=self._model.projects)
        self._model.restore()
        if phase.weights == "factored":
            self._factorize(position, recipe)
            carry_to_factors(self._merger, self._model.records.values(), momentum=self._model.projects)
        if reshaped:
            self._make_alike(restored)
            self._rebound.start(recipe.lr_rebound_steps)
        if isinstance(phase.sync, WeightSync):
            self._rounds.begin()
        self._check(position)
        self.train(position)

    def _check(self, position: Position) -> None:
        """DDP adds up elements by their place in memory, and hangs or aborts where parameters differ in number."""
        if position.phase.sync is not None:
            where = f"step {position.step}, phase {position.phase.name}"
            # Equal gradients keep workers equal only under equal settings.
            compared = self._same_settings or isinstance(position.phase.sync, GradientSync)
            check_phase(self._comm, self._model, where, HYPERPARAMETERS if compared else ())

    def _make_alike(self, restored: Sequence[str]) -> None:
        """Makes tensors bitwise equal that each worker has computed separately, by taking rank 0's."""
        dense = [name for name in restored if name not in self._model.records]
        weights = {name: self._model.model.get_parameter(name).data for name in dense}
        momentum = {f"momentum of {name}": tensor for name, tensor in self._merger.momentum.items()}
        differed = take_first(self._comm, weights | momentum)
        if differed and self._comm.rank == 0:
            log.info("%d tensors differed between workers by rounding: rank 0's were taken", len(differed))

    def train(self, position: Position) -> None:
        """Lets train what is trained at this position, its gradients averaged over the scope of the phase."""
        self.unwrap()
        phase = position.phase
        if phase.weights == "factored":
            self._model.train_only(trained_factors(position, self._comm.topology, self._comm.rank))
        if isinstance(phase.sync, WeightSync):
            self._wrap("group", PLAIN)
        elif phase.sync is not None:
            self._wrap("world", phase.sync)

    def unwrap(self) -> None:
        """Gradients are averaged no more."""
        self.parallel.close()
        self.parallel = Unsynchronized(self._model.model)

    def _wrap(self, scope: Scope, sync: GradientSync) -> None:
        self.parallel = self._comm.data_parallel(self._model.model, scope, self._find_unused_parameters, sync)

    def level(self, position: Position) -> None:
        """Groups ran alone up to this position, and gradients are shared from here on: optimizers become alike.

        Collective over the world.
        """
        if position.phase.trains in ("a_then_b", "b"):
            # Every worker has a state of its own for both factors: that of the frozen one is levelled too.
            self._model.train_only("all")
        reset = self._model.resets()
        kept = [p for name, p in self._model.trained(self._treatments).items() if name not in reset]
        equalize_optimizers(self._model.optimizers, kept, self._comm)

    def state_dict(self) -> dict[str, Any]:
        """Returns the record of factorings so far, and what the wrapper has learnt."""
        return {
            "rank_history": list(self.rank_history),
            "dense_this_cycle": dict(self.dense_this_cycle),
            "seconds": dict(self.seconds),
            "arrivals": self.parallel.arrivals(),
        }

    def load_state_dict(self, state: Mapping[str, Any], position: Position | None) -> None:
        """Goes on from a `state_dict` at a position, or at the recipe's end; the model has its form and values."""
        self.rank_history, self.dense_this_cycle = list(state["rank_history"]), dict(state["dense_this_cycle"])
        self.seconds = dict(state["seconds"])
        if position is not None:
            self._check(position)
            self.train(position)
            self.parallel.follow(state["arrivals"])

    def _factorize(self, position: Position, recipe: Recipe) -> None:
        assert recipe.factoring is not None
        start, waited = time.perf_counter(), self._comm.meter.sync_seconds
        agreed = agree_on_factors(self._comm, self._model.matrices(), recipe.factoring)
        waited = self._comm.meter.sync_seconds - waited
        self.seconds["svd"] += time.perf_counter() - start - waited
        self._model.factorize(agreed.factors, position.phase.damping)
        self.dense_this_cycle = agreed.dense
        ranks = {name: pair.k for name, pair in agreed.factors.items()}
        entry = {"cycle": position.cycle, "step": position.step, "ranks": ranks, "dense": dict(self.dense_this_cycle)}
        self.rank_history.append(entry)
