"""Predicts the peak memory of a worker from shapes, and from the measured memory of a process and of a training step.

The prediction adds up the tensors that exist at the same time at certain moments of a run: in a training step, in a
merge, when weights are factored or multiplied out, and when optimizer state is made equal. Each part of the library
predicts its own tensors, in the module that creates them. The largest moment is the peak. It is assumed that the loop
calls `zero_grad()` before `ab.step()`, and that validation by `ab.merged()` needs less than a training step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

from torch import Tensor

from abtrain.comm.communicator import PLAIN
from abtrain.comm.hooks import held_by_averaging
from abtrain.comm.topology import Topology
from abtrain.commands.plan.payload import ADAMW, idle_factors
from abtrain.commands.plan.shapes import ModelShapes
from abtrain.consistency.optimizers import OptimizerShape, used_by_equalize_optimizers
from abtrain.lowrank.classify import UNSHARED
from abtrain.lowrank.model import used_by_restore
from abtrain.lowrank.names import factor_letter, factor_names, weight_name
from abtrain.lowrank.precondition import used_by_preconditioner
from abtrain.lowrank.svd import used_by_decompose
from abtrain.merging.memory import MergesMemory, used_by_merges
from abtrain.merging.outer_state import held_by_outer_state, keeps_momentum
from abtrain.merging.selection import trained_by
from abtrain.merging.wires.wire import make_wire
from abtrain.recipes.recipe import Position, Recipe
from abtrain.recipes.sync import GradientSync, WeightSync
from abtrain.shards import cut

OUTER = ("anchors", "outer momentum", "residuals")
"""The parts that `outer_device="cpu"` moves to host memory."""
PARTS = (
    *("process", "parameters", "gradients", "optimizer state", "activations", "gradient buckets"),
    *(*OUTER, "hidden merges", "preconditioner", "temporary tensors"),
)
OptimizerName = Literal["adamw", "muon", "momentum", "sgd"]
_MOMENTUM, _NOTHING = OptimizerShape(tensors=1, numbers=0), OptimizerShape(tensors=0, numbers=0)
OPTIMIZERS: Mapping[OptimizerName, tuple[OptimizerShape, OptimizerShape]] = {
    "adamw": (ADAMW, ADAMW),
    "muon": (_MOMENTUM, ADAMW),
    "momentum": (_MOMENTUM, _MOMENTUM),
    "sgd": (_NOTHING, _NOTHING),
}
"""The sizes of the state for a matrix inside the model, and for another parameter."""
_CYCLES = 2
"""The number of cycles of a recipe after which its needs repeat."""


@dataclass(frozen=True)
class StepMemory:
    """The measured memory of a worker without communication, in bytes.

    Attributes:
        process: the process with its libraries and data, before it builds the model.
        full: what a training step with full weights needs at its peak, besides parameters, gradients and optimizer
            state: activations, and temporary tensors of the optimizer.
        factored: the same with factored weights.
    """

    process: int
    full: int
    factored: int = 0

    @classmethod
    def of(cls, full: tuple[int, int], factored: tuple[int, int] | None = None) -> StepMemory:
        """Combines results of `measure_steps` with full and with factored weights, which took two processes."""
        return cls(*full, max(sum(factored) - full[0], 0) if factored else 0)


@dataclass(frozen=True)
class Moment:
    """The memory of a worker at one moment of a run.

    Attributes:
        phase: the name of the phase.
        when: the moment in words.
        parts: the bytes of each part, in the order of `PARTS`.
    """

    phase: str
    when: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def predict_memory(
    recipe: Recipe,
    model: ModelShapes,
    topology: Topology,
    step: StepMemory,
    ranks: Mapping[str, int] | None = None,
    optimizer: OptimizerName = "adamw",
    rank: int = 0,
) -> list[Moment]:
    """Predicts the memory of one worker at all moments of a run that may be its peak, in chronological order.

    Args:
        recipe: the recipe of the run.
        model: the shapes of the model, with the recipe's `factoring`.
        topology: the workers and their groups.
        step: the measured memory of the process and of a training step.
        ranks: the rank k of each factored weight by name. Other weights stay dense.
        optimizer: the kind of the optimizer; with `muon`, AdamW trains what is not a matrix inside the model.
        rank: the rank of the worker.
    """
    walk = _Walk(recipe, model, topology, step, dict(ranks or {}), OPTIMIZERS[optimizer], rank)
    most = len(recipe.prologue) + _CYCLES * len(recipe.cycle)
    return [moment for position in islice(recipe.runs(), most) for moment in walk.moments(position)]


def peak_of(moments: Sequence[Moment]) -> Moment:
    """Returns the moment with the largest total."""
    return max(moments, key=lambda moment: moment.total)


@dataclass
class _Walk:
    """Follows the tensors of one worker from phase to phase.

    Attributes:
        held: the parameters in their present form, by name.
        momentum, residuals: the names of the tensors that have outer momentum and residuals.
    """

    recipe: Recipe
    model: ModelShapes
    topology: Topology
    step: StepMemory
    ranks: dict[str, int]
    optimizer: tuple[OptimizerShape, OptimizerShape]
    rank: int
    held: dict[str, Tensor] = field(default_factory=dict)
    momentum: set[str] = field(default_factory=set)
    residuals: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.held = dict(self.model.parameters)

    def moments(self, position: Position) -> Iterator[Moment]:
        """Yields the moments of a phase, whose first step is at `position`."""
        phase = position.phase
        if self._factored():
            yield self._moment(position, "factors are multiplied out", temporary=self._restoring())
            self._take_form({})
        if phase.weights == "factored":
            yield self._moment(position, "weights are factored", temporary=self._decomposing())
            self._take_form(self.ranks)
        yield from self._training(position)

    def _training(self, position: Position) -> Iterator[Moment]:
        """Yields a training step, a merge, and the end of the phase."""
        sync, trained = position.phase.rounds, self._trained(position)
        used, merges_before = MergesMemory(0, 0), False
        if sync is not None:
            used, merges_before = self._used_by_merges(position, sync), position.steps_in_phase > sync.every
        if sync is not None and merges_before:
            self._merge(position, sync)
        yield self._moment(
            position,
            "training step",
            gradients=sum(tensor.nbytes for tensor in trained.values()),
            activations=self.step.factored if self._factored() else self.step.full,
            buckets=self._buckets(position, trained),
            hidden=used.hidden if merges_before else 0,
        )
        if sync is None:
            return
        self._merge(position, sync)
        yield self._moment(position, "merge", temporary=used.most)
        after = position.step + position.steps_in_phase
        if after < self.recipe.total_steps and self.recipe.at(after).phase.shares_gradients:
            equalizing = sum(used_by_equalize_optimizers(part, shape) for shape, part in self._by_state(trained))
            yield self._moment(position, "optimizer state is made equal", temporary=equalizing)

    def _used_by_merges(self, position: Position, sync: WeightSync) -> MergesMemory:
        factors = [name for name in self.held if name not in self.model.parameters]
        by, buffers = trained_by(position, self.topology, factors), list(self.model.buffers.values())
        return used_by_merges(sync, self._merging(position), by, buffers, self.topology, self.rank)

    def _merge(self, position: Position, sync: WeightSync) -> None:
        """Adds the state that the first merge of a phase creates."""
        merging = self._merging(position).keys()
        if keeps_momentum(sync.merge):
            self.momentum |= merging
        if self.topology.n_groups > 1 and make_wire(sync.wire, self.topology.n_groups).lossy:
            self.residuals |= merging

    def _moment(
        self,
        position: Position,
        when: str,
        gradients: int = 0,
        activations: int = 0,
        buckets: int = 0,
        hidden: int = 0,
        temporary: int = 0,
    ) -> Moment:
        phase = position.phase
        place, count = self.topology.place_of(self.rank), self.topology.group_size
        anchored = phase.rounds is not None and when not in ("weights are factored", "factors are multiplied out")
        outer = held_by_outer_state(cut(self._shared(), place, count), anchored, self.momentum, self.residuals)
        preconditions = phase.damping and activations and self._factored()
        factors = [tensor for name, tensor in self.held.items() if name not in self.model.parameters]
        everything = [*self.held.values(), *self.model.buffers.values()]
        sizes = (
            self.step.process,
            sum(tensor.nbytes for tensor in everything),
            gradients,
            self._optimizer_state(self._trained(position, ever=True)),
            activations,
            buckets,
            *outer.values(),
            hidden,
            used_by_preconditioner(factors) if preconditions else 0,
            temporary,
        )
        return Moment(phase.name, when, dict(zip(PARTS, sizes, strict=True)))

    def _factored(self) -> bool:
        return self.held.keys() != self.model.parameters.keys()

    def _take_form(self, ranks: Mapping[str, int]) -> None:
        """Changes the form of weights: those in `ranks` become factored, and all others dense."""
        projects = self.recipe.factoring is not None and self.recipe.factoring.optimizer_state != "reset"
        matrices, held = self.model.matrices(), dict[str, Tensor]()
        for name, W in self.model.parameters.items():
            pair = factor_names(name)
            if name in matrices and name in ranks:
                shape, k = matrices[name], ranks[name]
                held |= zip(pair, (W.new_empty(shape.m, k), W.new_empty(k, shape.n)), strict=True)
            else:
                held[name] = W
        for store, follows in ((self.momentum, projects), (self.residuals, True)):
            for name in matrices.keys() & self.ranks.keys():
                names = {name, *factor_names(name)}
                if store & names:
                    store -= names
                    store |= names & held.keys() if follows else set()
        self.held = held

    def _shared(self) -> dict[str, Tensor]:
        """Returns the tensors that merge, or would merge, by name."""
        kinds = self.model.kinds
        return {name: tensor for name, tensor in self.held.items() if kinds.get(name) not in UNSHARED}

    def _merging(self, position: Position) -> dict[str, Tensor]:
        """Returns the tensors that merge in a phase: all but the factors that no worker trains."""
        leaders = [group[0] for group in self.topology.groups]
        idle = idle_factors(position, self.topology, leaders)
        return {name: tensor for name, tensor in self._shared().items() if not self._is_of(name, idle)}

    def _trained(self, position: Position, ever: bool = False) -> dict[str, Tensor]:
        """Returns the tensors that have gradients on this worker: in a phase's first step, or `ever` in the phase."""
        idle = idle_factors(position, self.topology, [self.rank]) if self._factored() else set()
        sync = position.phase.rounds
        if ever and position.phase.trains == "a_then_b" and sync and position.steps_in_phase > sync.every:
            idle = set()
        ignored = self.model.without_gradient
        return {n: tensor for n, tensor in self.held.items() if n not in ignored and not self._is_of(n, idle)}

    def _by_state(self, trained: Mapping[str, Tensor]) -> list[tuple[OptimizerShape, list[Tensor]]]:
        """Returns the tensors inside the model and the others, each with the size of their optimizer state."""
        parts: tuple[list[Tensor], list[Tensor]] = ([], [])
        for name, tensor in trained.items():
            weight = name if name in self.model.parameters else weight_name(name)
            parts[weight not in self.model.hidden].append(tensor)
        return list(zip(self.optimizer, parts, strict=True))

    def _optimizer_state(self, trained: Mapping[str, Tensor]) -> int:
        return sum(shape.tensors * sum(tensor.nbytes for tensor in part) for shape, part in self._by_state(trained))

    def _is_of(self, name: str, letters: set[str]) -> bool:
        return name not in self.model.parameters and factor_letter(name) in letters

    def _buckets(self, position: Position, trained: Mapping[str, Tensor]) -> int:
        sync = position.phase.sync
        if sync is None:
            return 0
        shares = isinstance(sync, GradientSync)
        workers = self.topology.world_size if shares else self.topology.group_size
        wire = sync if isinstance(sync, GradientSync) else PLAIN
        return held_by_averaging(list(trained.values()), wire) if workers > 1 else 0

    def _decomposing(self) -> int:
        """Returns the bytes of all factors, which exist beside the weights, and of decomposing the largest weight."""
        shapes = {name: shape for name, shape in self.model.matrices().items() if name in self.ranks}
        itemsize = max((self.model.parameters[name].itemsize for name in shapes), default=0)
        factors = sum(itemsize * self.ranks[name] * (shape.m + shape.n) for name, shape in shapes.items())
        used = (used_by_decompose(shape.m, shape.n, self.ranks[name]) for name, shape in shapes.items())
        return factors + max(used, default=0)

    def _restoring(self) -> int:
        """Returns the bytes of all weights, while some of their factors are left."""
        shapes = [shape for name, shape in self.model.matrices().items() if name in self.ranks]
        factoring = self.recipe.factoring
        projects = factoring is not None and factoring.optimizer_state != "reset"
        return max((used_by_restore(shape.m, shape.n, projects) for shape in shapes), default=0)
