"""What happens at step t. Pure: no torch, no communication, no state.

A recipe is a prologue of phases followed by a cycle of phases, repeated until the steps are spent. A phase says what
the weights look like, what is trained, and how the workers agree. `Recipe.at(step)` is a function of the step alone,
so a resumed run needs nothing but its step number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from abtrain.errors import ConfigurationError, UsageError
from abtrain.sync import GradientSync, Sync, Trains, WeightSync, share_problems, whole_number_problems

Weights = Literal["full", "factored"]
OptimizerState = Literal["reset", "project"]
SVDMode = Literal["each", "shared"]


@dataclass(frozen=True)
class Phase:
    """A stretch of steps in which weights, trained parts and synchronization stay the same.

    Args:
        name: how the phase is called in logs, metrics and payload counts.
        steps: its length; the last phase of a run is cut off where the steps are spent.
        weights: `full` matrices W, or `factored` into A and B.
        trains: `all` parameters, one factor by the group's role (`a_or_b`), or B only (`b`). Parameters that are not
            factored are always trained.
        sync: how workers agree.
        damping: precondition the gradients of factors by each other, with this damping (see
            `abtrain.lowrank.precondition`); 0: leave them as they are.
    """

    name: str
    steps: int
    weights: Weights = "full"
    trains: Trains = "all"
    sync: Sync = GradientSync()
    damping: float = 0.0

    def problems(self) -> list[str]:
        """What is wrong with the phase; empty if nothing is."""
        where = f"phase {self.name!r}"
        found = whole_number_problems(f"{where}: steps", self.steps, least=1)
        if self.weights not in ("full", "factored"):
            found.append(f"{where}: weights={self.weights!r} is unknown: use 'full' or 'factored'")
        if self.trains not in ("all", "a_or_b", "b"):
            found.append(f"{where}: trains={self.trains!r} is unknown: use 'all', 'a_or_b' or 'b'")
        if self.trains != "all" and self.weights == "full":
            found.append(f"{where}: trains={self.trains!r} needs factors: use weights='factored'")
        if self.trains == "a_or_b" and not isinstance(self.sync, WeightSync):
            found.append(f"{where}: groups that train different factors have no common gradient: use a WeightSync")
        found += share_problems(f"{where}: damping", self.damping)
        if not isinstance(self.sync, Sync):
            found.append(f"{where}: sync={self.sync!r} is unknown: use GradientSync(), WeightSync(every) or None")
        elif self.sync is not None:
            wrong = self.sync.problems()
            if not wrong and isinstance(self.sync, WeightSync) and self.sync.every > self.steps:
                wrong = [f"every={self.sync.every} is longer than the phase: use at most its {self.steps} steps"]
            found += [f"{where}: {problem}" for problem in wrong]
        return found


class RankRule(Protocol):
    """How many singular values to keep. The rules themselves are in `abtrain.lowrank.rank`."""

    def __call__(self, singular_values: Sequence[float], m: int, n: int) -> int:
        """Returns k >= 1, given min(m, n) singular values in descending order of an m x n matrix."""
        ...

    def problems(self) -> list[str]:
        """What is wrong with the rule's settings; empty if nothing is."""
        ...


@dataclass(frozen=True)
class Factoring:
    """Which weights are factored, and how.

    Args:
        rank_rule: how many singular values each weight keeps.
        keep_dense_if_larger: leave a weight dense where its factors would be no smaller, k (m + n) >= m n.
        min_dim: leave a weight dense whose smaller matrix dimension is below this.
        exclude: globs of parameter names that stay dense, such as `head.*`.
        optimizer_state: at a change of shape, `reset` the optimizer's state of the weight, or `project` it.
        svd: `each` worker decomposes every weight, or the work is `shared`: one owner a weight sends its factors.
    """

    rank_rule: RankRule
    keep_dense_if_larger: bool = False
    min_dim: int = 2
    exclude: tuple[str, ...] = ()
    optimizer_state: OptimizerState = "reset"
    svd: SVDMode = "each"

    def problems(self) -> list[str]:
        """What is wrong with these settings; empty if nothing is."""
        rule = self.rank_rule
        known = hasattr(rule, "problems")
        found = rule.problems() if known else [f"rank_rule={rule!r} is no rank rule: use SigmaCutoff(0.15), for one"]
        found += whole_number_problems("min_dim", self.min_dim, least=1)
        if not isinstance(self.exclude, tuple | list) or not all(isinstance(glob, str) for glob in self.exclude):
            found.append(f"exclude={self.exclude!r} is not a list of globs: use one, such as ('head.*',)")
        if self.optimizer_state not in ("reset", "project"):
            found.append(f"optimizer_state={self.optimizer_state!r} is unknown: use 'reset' or 'project'")
        if self.svd not in ("each", "shared"):
            found.append(f"svd={self.svd!r} is unknown: use 'each' or 'shared'")
        return found


@dataclass(frozen=True)
class Position:
    """Where a step stands in its recipe.

    Attributes:
        step: index of the step, from 0.
        phase: the phase that the step belongs to.
        phase_index: which of the recipe's phases that is, prologue and cycle counted through.
        cycle: how many cycles are completed; 0 in the prologue.
        step_in_phase: index of the step in this run of the phase, from 0.
        steps_in_phase: length of this run of the phase, cut off at the recipe's end.
    """

    step: int
    phase: Phase
    phase_index: int
    cycle: int
    step_in_phase: int
    steps_in_phase: int

    @property
    def first(self) -> bool:
        return self.step_in_phase == 0

    @property
    def last(self) -> bool:
        return self.step_in_phase == self.steps_in_phase - 1

    @property
    def merges(self) -> bool:
        """Whether the groups merge after this step."""
        sync = self.phase.sync
        return isinstance(sync, WeightSync) and (self.last or (self.step_in_phase + 1) % sync.every == 0)


@dataclass(frozen=True)
class Recipe:
    """A method of training, as data.

    Args:
        name: how it is called.
        total_steps: optimizer steps of the whole run.
        prologue: phases that are run once.
        cycle: phases that are repeated until the steps are spent.
        factoring: which weights are factored and how; needed if a phase is factored.
        lr_rebound_steps: after a change of parameter shapes, steps in which the learning rate climbs back (0: none).

    Raises:
        ConfigurationError: all that is wrong with it, at once.
    """

    name: str
    total_steps: int
    prologue: tuple[Phase, ...] = ()
    cycle: tuple[Phase, ...] = ()
    factoring: Factoring | None = None
    lr_rebound_steps: int = 0

    def __post_init__(self) -> None:
        found = self._problems()
        if found:
            raise ConfigurationError([f"recipe {self.name!r}: {problem}" for problem in found])

    @property
    def phases(self) -> tuple[Phase, ...]:
        return self.prologue + self.cycle

    @property
    def factored(self) -> bool:
        """Whether any phase is factored."""
        return any(phase.weights == "factored" for phase in self.phases)

    def at(self, step: int) -> Position:
        """The position of step `step`.

        Raises:
            UsageError: the step is not one of the recipe's.
        """
        if not 0 <= step < self.total_steps:
            raise UsageError(
                f"step {step} is not in recipe {self.name!r} of {self.total_steps} steps "
                f"(0 to {self.total_steps - 1}): build the recipe with more total_steps"
            )
        into, cycle, phases, index = step, 0, self.prologue, 0
        prologue_steps = sum(phase.steps for phase in self.prologue)
        if step >= prologue_steps:
            cycle, into = divmod(step - prologue_steps, sum(phase.steps for phase in self.cycle))
            phases, index = self.cycle, len(self.prologue)
        for phase in phases:
            if into < phase.steps:
                break
            into -= phase.steps
            index += 1
        steps_left = self.total_steps - (step - into)
        return Position(step, phase, index, cycle, into, min(phase.steps, steps_left))

    def runs(self) -> Iterator[Position]:
        """The first position of every run of a phase, from the start to the end."""
        step = 0
        while step < self.total_steps:
            position = self.at(step)
            yield position
            step += position.steps_in_phase

    def _problems(self) -> list[str]:
        found = whole_number_problems("total_steps", self.total_steps, least=1)
        found += whole_number_problems("lr_rebound_steps", self.lr_rebound_steps, least=0)
        for phase in self.phases:
            found += phase.problems()
        if not self.cycle:
            found.append("the cycle is empty: give at least one phase")
        if self.factoring is not None:
            found += self.factoring.problems()
        elif self.factored:
            found.append("a factored phase needs a rank rule: give factoring=Factoring(...)")
        if len(self.phases) > 1 and any(phase.sync is None for phase in self.phases):
            found.append("a phase without sync leaves workers apart for good: it must be the only phase")
        prologue_steps = sum(phase.steps for phase in self.prologue) if not found else 0
        if prologue_steps and prologue_steps >= self.total_steps:
            found.append(
                f"the prologue ({prologue_steps} steps) leaves nothing of the {self.total_steps} total_steps "
                "to its cycle: shorten it or lengthen the run"
            )
        return found
