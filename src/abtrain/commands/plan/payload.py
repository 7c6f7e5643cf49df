"""Payload, predicted: what `abtrain.comm.meter` will count, worked out from shapes alone.

`predict` follows the engine through a recipe, and says for each stretch of steps what a worker hands to collectives.
Counts are exact where nothing differs between workers that ought not to (initial weights, factors), every parameter
gets a gradient, no GradScaler is used, and `merged()` is not entered. Of buffers, floating-point ones are taken to
differ between workers, and all others to be equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from abtrain.comm.communicator import PLAIN, Scope, scope_spans
from abtrain.comm.following import sent_by_follow
from abtrain.comm.hooks import plain_steps, sent_by_backward
from abtrain.comm.topology import Topology
from abtrain.comm.traffic import Calls
from abtrain.commands.plan.rounds import Turn, turns
from abtrain.commands.plan.shapes import ModelShapes
from abtrain.commands.plan.stretches import Merging, Stretch
from abtrain.consistency.agreement import ROLL_CALL, sent_by_agree_on_tensors, sent_by_take_first
from abtrain.consistency.factors import sent_by_agree_on_factors
from abtrain.consistency.optimizers import OptimizerShape, sent_by_equalize_optimizers
from abtrain.consistency.replicas import sent_by_check_replicas
from abtrain.lowrank.classify import UNSHARED
from abtrain.lowrank.names import factor_names
from abtrain.lowrank.svd import Factors
from abtrain.merging.buffers import sent_by_first_comparison
from abtrain.merging.fragments import cut_into_fragments
from abtrain.merging.merger import sent_by_merge
from abtrain.merging.roles import idle_factors
from abtrain.recipes.recipe import Position, Recipe
from abtrain.recipes.sync import GradientSync, WeightSync

ADAMW = OptimizerShape()


def predict(
    recipe: Recipe,
    model: ModelShapes,
    topology: Topology,
    ranks: Mapping[str, int] | Sequence[Mapping[str, int]] = (),
    optimizer: OptimizerShape = ADAMW,
    rank: int = 0,
) -> list[Stretch]:
    """All that one worker hands to collectives in a run, stretch by stretch.

    Args:
        recipe: which is followed to its end.
        model: shapes by the recipe's own `factoring`.
        topology: workers and groups.
        ranks: k of each weight that is factored (others stay dense); a sequence has one mapping for each
            decomposition of the run, the last one for all that follow.
        optimizer: what it keeps, as merges before gradient syncs level it.
        rank: of the worker in its world: roles differ, and with them what is sent inside groups.
    """
    history = [ranks] if isinstance(ranks, Mapping) else list(ranks)
    if topology.world_size == 1:
        return [_alone(position) for position in recipe.runs()]
    return list(_Walk(recipe, model, topology, history or [{}], optimizer, rank).stretches())


def payload(stretches: Sequence[Stretch], topology: Topology) -> dict[str, Any]:
    """Bytes in the form of `Meter.payload()`: total, between_groups, within_groups, by_phase."""
    by_scope, by_phase = {"between_groups": 0, "within_groups": 0}, dict[str, int]()
    for stretch in stretches:
        for traffic, times in stretch.all():
            nbytes = traffic.nbytes * times
            if nbytes:
                by_scope[scope_spans(topology, traffic.scope)] += nbytes
                by_phase[stretch.phase] = by_phase.get(stretch.phase, 0) + nbytes
    return {"total": sum(by_scope.values()), **by_scope, "by_phase": by_phase}


def payload_ratio(total: float, model: ModelShapes, steps: int) -> float:
    """Payload over what DDP hands over: one float32 gradient of every parameter at every step."""
    return total / (4 * model.numel * steps)


def _alone(position: Position) -> Stretch:
    """Returns the stretch of a worker without others, which sends nothing."""
    factored = position.phase.weights == "factored"
    return Stretch(
        position.phase.name, position.steps_in_phase, factored=factored, decompositions=1.0 if factored else 0.0
    )


@dataclass(frozen=True)
class _Held:
    """A parameter as it lives at present."""

    name: str
    tensor: Tensor
    part: Literal["whole", "A", "B", "frozen"]
    has_gradient: bool = True


class _Walk:
    """One way of one of several workers through a recipe."""

    def __init__(
        self,
        recipe: Recipe,
        model: ModelShapes,
        topology: Topology,
        history: Sequence[Mapping[str, int]],
        optimizer: OptimizerShape,
        rank: int,
    ) -> None:
        self._recipe, self._model, self._topology = recipe, model, topology
        self._history, self._optimizer, self._rank = history, optimizer, rank
        self._matrices = model.matrices()
        self._factorings = 0
        self._factored = False
        self._buffers_compared = False
        self._hook_steps: dict[object, int] = {}

    def stretches(self) -> Iterator[Stretch]:
        shared = [name for name in self._model.parameters if self._model.kinds[name] != "own"]
        tensors = len(shared) + len(self._model.buffers)
        yield Stretch("setup", 0, entry=(*ROLL_CALL, *sent_by_agree_on_tensors(tensors)))
        for position in self._recipe.runs():
            yield from self._phase(position)

    def _phase(self, position: Position) -> Iterator[Stretch]:
        phase = position.phase
        ranks: Mapping[str, int] = {}
        entry: Calls = ()
        if phase.weights == "factored":
            ranks = self._history[min(self._factorings, len(self._history) - 1)]
            self._factorings += 1
            entry = self._factor(ranks)
        if self._factored or phase.weights == "factored":
            # The tensors that each worker computed for itself.
            entry = (*entry, *sent_by_take_first())
        if phase.sync is not None:
            entry = (*entry, *ROLL_CALL)
        self._factored = bool(ranks)
        held = self._held(ranks)
        if isinstance(phase.sync, GradientSync):
            stretches = self._synchronous(position, held, phase.sync, entry)
        elif phase.rounds is not None:
            stretches = self._rounds(position, held, phase.rounds, entry)
        else:
            stretches = iter([Stretch(phase.name, position.steps_in_phase, entry=entry)])
        factored = phase.weights == "factored"
        yield replace(next(stretches), factored=factored, decompositions=self._decompositions(position))
        yield from (replace(stretch, factored=factored) for stretch in stretches)

    def _decompositions(self, position: Position) -> float:
        """How much of the decompositions of a factoring this worker computes, about."""
        factoring = self._recipe.factoring
        if position.phase.weights == "full" or factoring is None:
            return 0.0
        return 1.0 if factoring.svd == "each" else 1 / self._topology.world_size

    def _rounds(self, position: Position, held: Sequence[_Held], sync: WeightSync, entry: Calls) -> Iterator[Stretch]:
        """Steps of groups that run alone, and merges between them."""
        level, entry = self._level(position, held), (*entry, *self._compare_buffers())
        *before, last = turns(position, sync)
        for turn in (*before, last):
            inside = self._gradients(turn.position, held, "group", PLAIN)
            leaving = (*level, *sent_by_check_replicas("world")) if turn is last else ()
            merges = self._merges(turn, held, sync)
            averages = PLAIN.wire if inside else None
            yield Stretch(position.phase.name, turn.steps, "group", entry, inside, merges, leaving, averages)
            entry = ()

    def _synchronous(
        self, position: Position, held: Sequence[_Held], sync: GradientSync, entry: Calls
    ) -> Iterator[Stretch]:
        """Steps that share gradients; PowerSGD's first ones share them as they are."""
        steps = position.steps_in_phase
        # The hook outlives the phase: it serves all phases in which the same shapes are trained.
        shapes = (sync, tuple(one.tensor.shape for one in held))
        done = self._hook_steps.get(shapes, 0)
        self._hook_steps[shapes] = done + steps
        plain = min(max(plain_steps(sync) - done, 0), steps)
        parts = [(count, wire) for count, wire in ((plain, PLAIN), (steps - plain, sync)) if count]
        for count, wire in parts:
            step = self._gradients(position, held, "world", wire)
            leaving = sent_by_check_replicas("world") if (count, wire) == parts[-1] else ()
            yield Stretch(position.phase.name, count, "world", entry, step, exit=leaving, averages=wire.wire)
            entry = ()

    def _held(self, ranks: Mapping[str, int]) -> list[_Held]:
        """All parameters at present, in the model's order; weights in `ranks` as factors."""
        held = []
        for name, W in self._model.parameters.items():
            if name in self._matrices and name in ranks:
                (name_A, name_B), (A, B) = factor_names(name), self._factors(name, ranks)
                held += [_Held(name_A, A, "A"), _Held(name_B, B, "B")]
            else:
                part: Literal["whole", "frozen"] = "frozen" if self._model.kinds[name] in UNSHARED else "whole"
                held.append(_Held(name, W, part, name not in self._model.without_gradient))
        return held

    def _factors(self, name: str, ranks: Mapping[str, int]) -> Factors:
        shape, W, k = self._matrices[name], self._model.parameters[name], ranks[name]
        return Factors(W.new_empty(shape.m, k), W.new_empty(k, shape.n))

    def _factor(self, ranks: Mapping[str, int]) -> Calls:
        """Returns the calls before weights are factored: outcomes and ranks, then the factors or their digests."""
        assert self._recipe.factoring is not None
        shared = self._recipe.factoring.svd == "shared"
        factors = [self._factors(name, ranks) if name in ranks else None for name in self._matrices]
        return sent_by_agree_on_factors(factors, self._topology.world_size, shared)

    def _gradients(self, position: Position, held: Sequence[_Held], scope: Scope, sync: GradientSync) -> Calls:
        """Returns DDP's calls at a step: buffers before the forward pass, then this worker's gradients."""
        if scope == "group" and self._topology.group_size == 1:
            return ()
        idle = idle_factors(position, self._topology, [self._rank])
        tensors = [one.tensor for one in held if one.has_gradient and one.part not in idle]
        if not tensors:
            return ()
        return (*sent_by_follow(list(self._model.buffers.values()), scope), *sent_by_backward(tensors, scope, sync))

    def _merges(self, turn: Turn, held: Sequence[_Held], sync: WeightSync) -> tuple[Merging, ...]:
        """All merges of a turn; a run's last one is waited for."""
        # Of those under way at once, each has the links to itself for its part of the time.
        hidden = min(sync.delay, sync.every // sync.fragments)
        merges = []
        for fragments, times in turn.merging.items():
            merges.append(Merging(times, self._merge(turn.position, held, sync, fragments), hidden))
        if turn.last:
            merges.append(Merging(1, self._merge(turn.position, held, sync, tuple(range(sync.fragments)))))
        return tuple(merges)

    def _compare_buffers(self) -> Calls:
        """At the first merge of a run, workers learn which buffers differ (see `abtrain.merging.buffers`)."""
        if self._buffers_compared or not any(one.is_floating_point() for one in self._model.buffers.values()):
            return ()
        self._buffers_compared = True
        return sent_by_first_comparison(list(self._model.buffers.values()))

    def _merge(
        self, position: Position, held: Sequence[_Held], sync: WeightSync, fragments: Sequence[int]
    ) -> tuple[Calls, ...]:
        """One merge in its stages.

        At first groups prove that each holds one model, and all that they merge the same, and tell of their parts. Then
        come parameters that some worker trained, beside the last fragment those buffers that differ.
        """
        nobody = self._trained_by_nobody(position)
        idle = {one.name for one in held if one.part in nobody}
        parts = cut_into_fragments({one.name: one.tensor for one in held if one.part != "frozen"}, sync.fragments)
        tensors = [tensor for place in fragments for name, tensor in parts[place].items() if name not in idle]
        buffers = list(self._model.buffers.values()) if sync.fragments - 1 in fragments else []
        numbers = [buffer for buffer in buffers if buffer.is_floating_point()]
        replicas = sent_by_check_replicas("group") if self._topology.group_size > 1 else ()
        first, *more = sent_by_merge(sync.wire, tensors, numbers, self._topology.world_size)
        return ((*replicas, *first), *more)

    def _trained_by_nobody(self, position: Position) -> set[str]:
        """Parts that no worker trains here."""
        one_of_each_group = (group[0] for group in self._topology.groups)
        return {"frozen"} | idle_factors(position, self._topology, one_of_each_group)

    def _all_have_both(self, position: Position) -> bool:
        """Whether every worker leaves with optimizer state of its own for both factors, frozen ones included."""
        trains, rounds = position.phase.trains, position.phase.rounds
        in_turns = trains == "a_then_b" and rounds is not None and position.steps_in_phase > rounds.every
        # A phase that others came before has what is left of theirs.
        return in_turns or (trains in ("a_then_b", "b") and position.step > 0)

    def _level(self, position: Position, held: Sequence[_Held]) -> Calls:
        """Optimizer state, levelled where gradients are shared next: of all that keeps its shape, or its moments."""
        after = position.step + position.steps_in_phase
        if after >= self._recipe.total_steps or not self._recipe.at(after).phase.shares_gradients:
            return ()
        factoring = self._recipe.factoring
        projects = factoring is not None and factoring.optimizer_state != "reset"
        kept = [one for one in held if one.part == "whole" or (projects and one.part != "frozen")]
        left = self._recipe.at(after - 1)
        nobody = {"frozen"} if self._all_have_both(position) else self._trained_by_nobody(left)
        trained = [one.tensor for one in kept if one.part not in nobody]
        return sent_by_equalize_optimizers([one.tensor for one in kept], trained, self._optimizer)
