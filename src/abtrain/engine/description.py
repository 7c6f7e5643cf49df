"""The report of `ABTraining.describe()`: phases, groups, and the treatment of every parameter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from abtrain.comm.topology import Topology
from abtrain.lowrank.classify import Kind, Treatment
from abtrain.recipes.recipe import Recipe


@dataclass(frozen=True)
class Description:
    """A report about a run, for printing. Programs can read its fields.

    Attributes:
        treatments: the treatments of all parameters of the model.
        factored: by name, for each weight that is factored now, the number of elements of its factors.
        dense_this_cycle: by name, for each weight that could be factored but is dense now, the reason.
        buffers: by name, for each buffer that may differ between workers, its treatment at a merge.
    """

    recipe: Recipe
    topology: Topology
    treatments: tuple[Treatment, ...]
    factored: Mapping[str, int]
    dense_this_cycle: Mapping[str, str]
    buffers: Mapping[str, str]

    @property
    def parameters(self) -> dict[Kind, int]:
        """The number of elements of each kind now, where weights that may be factored later count as averaged.

        The numbers add up to the size of the full model.
        """
        counts: Counter[Kind] = Counter({"factored": 0, "averaged": 0, "frozen": 0})
        for treatment in self.treatments:
            counts["averaged" if self._is_dense_for_now(treatment) else treatment.kind] += treatment.numel
        return dict(counts)

    def _is_dense_for_now(self, treatment: Treatment) -> bool:
        return treatment.kind == "factored" and treatment.name not in self.factored

    def __str__(self) -> str:
        lines = [*self._phase_lines(), self._group_line(), *self._parameter_lines(), self._total_line()]
        return "\n".join(lines + self._buffer_lines())

    def _phase_lines(self) -> list[str]:
        recipe = self.recipe
        lines = [f"recipe {recipe.name}, {recipe.total_steps} steps"]
        for index, phase in enumerate(recipe.phases):
            where = "once" if index < len(recipe.prologue) else "each cycle"
            lines.append(
                f"  {phase.name}: {phase.steps} steps {where}, {phase.weights}, trains {phase.trains}, {phase.sync}"
            )
        return lines

    def _group_line(self) -> str:
        topology = self.topology
        line = f"{topology.world_size} workers in {topology.n_groups} groups of {topology.group_size}"
        if not any(phase.trains == "a_or_b" for phase in self.recipe.phases):
            return line
        if topology.n_groups == 1:
            return f"{line}: the only group trains A and B in turn, cycle by cycle"
        roles = [topology.role(group[0], cycle=0) for group in topology.groups]
        return f"{line}: {roles.count('A')} train A, {roles.count('B')} train B"

    def _parameter_lines(self) -> list[str]:
        width = max((len(treatment.name) for treatment in self.treatments), default=0)
        lines = []
        for t in self.treatments:
            kind, reason = t.kind, t.reason
            if self._is_dense_for_now(t):
                now = self.dense_this_cycle.get(t.name)
                # As in `parameters`, so that the rows add up to the total.
                kind = "averaged"
                reason = f"may be factored ({reason}); " + (f"dense in this cycle: {now}" if now else "dense now")
            shape = "x".join(map(str, t.shape)) or "scalar"
            lines.append(f"  {t.name:<{width}}  {shape:>16}  {kind:<8}  {reason}")
        return lines

    def _total_line(self) -> str:
        total = sum(self.parameters.values())
        shares = (f"{count:,} {kind} ({count / max(total, 1):.2%})" for kind, count in self.parameters.items())
        now = total + sum(self.factored[t.name] - t.numel for t in self.treatments if t.name in self.factored)
        note = f"; with factors {now:,}, {total / now:.1f} : 1" if self.factored else ""
        return f"{total:,} parameters: {', '.join(shares)}{note}"

    def _buffer_lines(self) -> list[str]:
        if not self.buffers:
            return []
        width = max(map(len, self.buffers))
        lines = [f"  {name:<{width}}  {treatment}" for name, treatment in self.buffers.items()]
        return ["buffers that differ between workers at a merge (all others stay unchanged):", *lines]


def groups_and_traffic(recipe: Recipe, topology: Topology) -> str:
    """Returns one line that describes the groups of workers and the traffic between groups."""
    shared = [phase.name for phase in recipe.phases if phase.shares_gradients]
    merged = [f"every {phase.rounds.every} steps ({phase.name})" for phase in recipe.phases if phase.rounds]
    travels = [f"gradients at every step ({', '.join(shared)})"] if shared else []
    travels += [f"merges {', '.join(dict.fromkeys(merged))}"] if merged else []
    if recipe.choice is not None:
        travels = [f"chosen after {recipe.chooses_at} steps"]
    groups = f"{topology.n_groups} group{'s' * (topology.n_groups > 1)} of {topology.group_size}"
    return f"{topology.world_size} workers in {groups}; traffic between groups: {' and '.join(travels) or 'none'}"
