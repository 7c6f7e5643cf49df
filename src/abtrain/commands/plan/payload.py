"""Predicts the payload of a run, which `abtrain.comm.meter` counts: the bytes that a worker passes to collectives.

The prediction needs only the shapes of the model. `predict` lists the collectives of each phase with their bytes. The
prediction is exact if initial weights and factors are equal on all workers, every parameter has a gradient, no
GradScaler is used, and `merged()` is not called. It assumes that floating-point buffers differ between workers, and
that all other buffers are equal. It leaves out what workers of a group send each other when weights change form: the
momentum and the residuals of merges.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from abtrain.comm.communicator import PLAIN, Calls, Scope
from abtrain.comm.following import sent_by_follow
from abtrain.comm.hooks import plain_steps, sent_by_backward
from abtrain.comm.topology import Topology
from abtrain.commands.plan.shapes import ModelShapes
from abtrain.commands.plan.stretches import Merging, Stretch, Turn, turns
from abtrain.consistency.agreement import ROLL_CALL, sent_by_agree_on_tensors, sent_by_comparison
from abtrain.consistency.factors import largest_share, sent_by_agree_on_factors
from abtrain.consistency.optimizers import OptimizerShape, sent_by_equalize_optimizers
from abtrain.lowrank.classify import UNSHARED
from abtrain.lowrank.names import factor_names
from abtrain.lowrank.svd import Factors
from abtrain.merging.buffers import sent_by_first_comparison
from abtrain.merging.places import sent_by_gathered, sent_by_spread
from abtrain.merging.selection import cut_into_fragments, trained_by, trained_factors
from abtrain.merging.sent import sent_by_merge, steps_alone
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
    """Predicts the bytes that one worker passes to collectives in a run.

    Args:
        recipe: the recipe of the run.
        model: the shapes of the model, with the recipe's `factoring`.
        topology: the workers and their groups.
        ranks: the rank k of each factored weight by name. Other weights stay dense. A sequence has one mapping for
            each decomposition of the run. The last mapping applies to all further decompositions.
        optimizer: the size of the optimizer's state for each parameter. Workers make this state equal before a phase
            that averages gradients at every step.
        rank: the rank of the worker. If workers train different factors, they send different amounts.

    Returns:
        The collectives in chronological order. A `Stretch` covers consecutive steps that call the same collectives.
    """
    history = [ranks] if isinstance(ranks, Mapping) else list(ranks)
    if topology.world_size == 1:
        return [_alone(position) for position in recipe.runs()]
    return list(_Walk(recipe, model, topology, history or [{}], optimizer, rank).stretches())


def idle_factors(position: Position, topology: Topology, ranks: Iterable[int]) -> set[str]:
    """Returns the factors, A or B, that none of the workers with these ranks trains at a position in the recipe."""
    trained = {trained_factors(position, topology, rank) for rank in ranks}
    return set() if "all" in trained else {"A", "B"} - trained


def _alone(position: Position) -> Stretch:
    """Returns the steps of a phase for a single worker, which sends nothing."""
    factored = position.phase.weights == "factored"
    return Stretch(
        position.phase.name, position.steps_in_phase, factored=factored, decompositions=1.0 if factored else 0.0
    )


@dataclass(frozen=True)
class _Held:
    """A parameter in its current form: a whole weight, a factor, or a parameter that merges leave out (frozen)."""

    name: str
    tensor: Tensor
    part: Literal["whole", "A", "B", "frozen"]
    has_gradient: bool = True


class _Walk:
    """Lists the collectives of one worker, phase by phase, in a run with several workers."""

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
            # Workers compare the tensors that each of them has computed separately.
            entry = (*entry, *sent_by_comparison())
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
        """Returns the largest share of the decompositions of a phase that one worker computes: the others wait."""
        factoring = self._recipe.factoring
        if position.phase.weights == "full" or factoring is None:
            return 0.0
        return largest_share(self._matrix_shapes(), factoring, self._topology)

    def _rounds(self, position: Position, held: Sequence[_Held], sync: WeightSync, entry: Calls) -> Iterator[Stretch]:
        """Yields the collectives of a phase in which groups train alone and merge."""
        equalize, entry = self._equalize(position, held), (*entry, *self._compare_buffers())
        *before, last = turns(position, sync)
        for turn in (*before, last):
            inside = self._gradients(turn.position, held, "group", PLAIN)
            leaving = (*equalize, *sent_by_comparison()) if turn is last else ()
            merges = self._merges(turn, held, sync)
            averages = PLAIN.wire if inside else None
            yield Stretch(position.phase.name, turn.steps, "group", entry, inside, merges, leaving, averages)
            entry = ()

    def _synchronous(
        self, position: Position, held: Sequence[_Held], sync: GradientSync, entry: Calls
    ) -> Iterator[Stretch]:
        """Yields the collectives of a phase that averages gradients. PowerSGD's first steps send whole gradients."""
        steps = position.steps_in_phase
        # All phases that train the same shapes share one hook, which counts the steps of all these phases.
        shapes = (sync, tuple(one.tensor.shape for one in held))
        done = self._hook_steps.get(shapes, 0)
        self._hook_steps[shapes] = done + steps
        plain = min(max(plain_steps(sync) - done, 0), steps)
        parts = [(count, wire) for count, wire in ((plain, PLAIN), (steps - plain, sync)) if count]
        for count, wire in parts:
            step = self._gradients(position, held, "world", wire)
            leaving = sent_by_comparison() if (count, wire) == parts[-1] else ()
            yield Stretch(position.phase.name, count, "world", entry, step, exit=leaving, averages=wire.wire)
            entry = ()

    def _held(self, ranks: Mapping[str, int]) -> list[_Held]:
        """Returns all parameters in their current form, in the model's order. Weights in `ranks` are factored."""
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
        """Returns the collectives that give all workers the same factors.

        Workers compare whether decompositions succeeded, and their ranks. Then each worker sends the factors of its
        share of the weights, if they share the work, and workers compare checksums of all factors.
        """
        assert self._recipe.factoring is not None
        factors = [self._factors(name, ranks) if name in ranks else None for name in self._matrices]
        return sent_by_agree_on_factors(self._matrix_shapes(), factors, self._recipe.factoring, self._topology)

    def _matrix_shapes(self) -> list[tuple[int, int]]:
        return [(shape.m, shape.n) for shape in self._matrices.values()]

    def _gradients(self, position: Position, held: Sequence[_Held], scope: Scope, sync: GradientSync) -> Calls:
        """Returns DDP's collectives in one step: buffers before the forward pass, then this worker's gradients."""
        if scope == "group" and self._topology.group_size == 1:
            return ()
        idle = idle_factors(position, self._topology, [self._rank])
        tensors = [one.tensor for one in held if one.has_gradient and one.part not in idle]
        if not tensors:
            return ()
        return (*sent_by_follow(list(self._model.buffers.values()), scope), *sent_by_backward(tensors, scope, sync))

    def _merges(self, turn: Turn, held: Sequence[_Held], sync: WeightSync) -> tuple[Merging, ...]:
        """Returns the merges after these steps. Training waits for the last merge of a phase."""
        # Merges that overlap share the links, so a merge counts as hidden only until the next one begins.
        hidden = min(sync.delay, sync.every // sync.fragments)
        merges = []
        for fragments, times in turn.merging.items():
            merges.append(self._merge(turn.position, held, sync, fragments, times, hidden))
        if turn.last:
            merges.append(self._merge(turn.position, held, sync, tuple(range(sync.fragments))))
        return tuple(merges)

    def _compare_buffers(self) -> Calls:
        """Returns the collectives that compare buffers at the first merge of a run. Later merges need none."""
        if self._buffers_compared or not any(one.is_floating_point() for one in self._model.buffers.values()):
            return ()
        self._buffers_compared = True
        return sent_by_first_comparison(list(self._model.buffers.values()))

    def _merge(
        self,
        position: Position,
        held: Sequence[_Held],
        sync: WeightSync,
        fragments: Sequence[int],
        times: int = 1,
        hidden: int = 0,
    ) -> Merging:
        """Returns a merge of some fragments, which takes place several times, with its collectives stage by stage.

        First, the workers of a group check that their weights are equal, and all workers check that they merge the same
        parameters. Then the workers merge the parameters that some worker has trained. The last fragment includes the
        buffers that differ between workers.
        """
        nobody = self._trained_by_nobody(position)
        idle = {one.name for one in held if one.part in nobody}
        parts = cut_into_fragments({one.name: one.tensor for one in held if one.part != "frozen"}, sync.fragments)
        tensors = {n: tensor for place in fragments for n, tensor in parts[place].items() if n not in idle}
        trained = trained_by(position, self._topology, [one.name for one in held if one.part in ("A", "B")])
        buffers = list(self._model.buffers.values()) if sync.fragments - 1 in fragments else []
        averaged = [buffer for buffer in buffers if buffer.is_floating_point()]
        first, *more = sent_by_merge(sync, tensors, trained, averaged, self._topology, self._rank)
        if self._topology.group_size > 1:
            first = (*sent_by_comparison(scope="group"), *sent_by_gathered(self._topology), *first)
        if hidden and steps_alone(sync.merge):
            first = (*first, *sent_by_spread(list(tensors.values()), self._topology))
        numbers = sum(tensor.numel() for tensor in tensors.values()) // self._topology.group_size
        return Merging(times, (first, *more), sync if hidden else replace(sync, delay=0), numbers, hidden)

    def _trained_by_nobody(self, position: Position) -> set[str]:
        """Returns the parts of weights, such as A, that no worker trains at this position in the recipe."""
        one_of_each_group = (group[0] for group in self._topology.groups)
        return {"frozen"} | idle_factors(position, self._topology, one_of_each_group)

    def _all_have_both(self, position: Position) -> bool:
        """Returns whether every worker has optimizer state for both factors after the phase, even for a frozen one."""
        trains, rounds = position.phase.trains, position.phase.rounds
        in_turns = trains == "a_then_b" and rounds is not None and position.steps_in_phase > rounds.every
        # Optimizer state of earlier phases is kept.
        return in_turns or (trains in ("a_then_b", "b") and position.step > 0)

    def _equalize(self, position: Position, held: Sequence[_Held]) -> Calls:
        """Returns the collectives that make optimizer state equal on all workers before gradients are averaged.

        They send the state for all parameters that keep their shape. They also send the state for factors if the
        recipe projects it to whole weights.
        """
        after = position.step + position.steps_in_phase
        if after >= self._recipe.total_steps or not self._recipe.at(after).phase.shares_gradients:
            return ()
        factoring = self._recipe.factoring
        projects = factoring is not None and factoring.optimizer_state != "reset"
        kept = [one for one in held if one.part == "whole" or (projects and one.part != "frozen")]
        left = self._recipe.at(after - 1)
        nobody = {"frozen"} if self._all_have_both(position) else self._trained_by_nobody(left)
        trained = [one.tensor for one in kept if one.part not in nobody]
        return sent_by_equalize_optimizers([one.tensor for one in kept], trained, self._optimizer, self._topology)
