"""Rounds, predicted: which fragments of the model merge how often (see `abtrain.merging.rounds`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from abtrain.recipes.recipe import Position
from abtrain.recipes.sync import WeightSync


@dataclass(frozen=True)
class Turn:
    """The steps of one run of a phase in which the same parameters are trained.

    Attributes:
        position: of the first of them.
        steps: how many.
        merging: how often which fragments begin to merge after one of them, the run's last step left out.
        last: whether they hold that step, after which all fragments merge.
    """

    position: Position
    steps: int
    merging: Counter[tuple[int, ...]]
    last: bool


def turns(position: Position, sync: WeightSync) -> Iterator[Turn]:
    """A run of a phase of rounds, by what is trained: where factors take turns there are two, else one.

    Args:
        position: the run's first.
        sync: of its phase.
    """
    # What happens after a step repeats with this period, up to the last step.
    period = sync.every * (2 if position.phase.trains == "a_then_b" else 1)
    periods, rest = divmod(position.steps_in_phase - 1, period)
    for start in range(0, min(period, position.steps_in_phase), sync.every):
        merging: Counter[tuple[int, ...]] = Counter()
        for offset in range(start, start + sync.every):
            fragments = sync.fragments_after(offset)
            if fragments:
                merging[fragments] += periods + (offset < rest)
        last = start <= rest < start + sync.every
        steps = periods * sync.every + min(max(rest - start, 0), sync.every) + last
        yield Turn(replace(position, step=position.step + start, step_in_phase=start), steps, +merging, last)
