"""Defines `auto`, a recipe that measures a training step and the links, and then chooses how often workers merge.

The choice is data: it becomes the options of the recipe, such as `auto:every=20,wire=ternary,delay=10`. A recipe with
these options measures nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Annotated, Any

from abtrain.errors import ConfigurationError
from abtrain.recipes import shared
from abtrain.recipes.numbers import is_finite_number
from abtrain.recipes.options import only_declared
from abtrain.recipes.phase import Phase
from abtrain.recipes.recipe import Choice, Recipe
from abtrain.recipes.shared import are_counts
from abtrain.recipes.sync import GradientSync, WeightSync

MEASURED_STEPS = 20
"""The largest number of steps that `auto` measures before it chooses."""
MOST_WAITING = 0.05
"""The largest share of the time that workers should wait for each other or compute merges."""
MEASURED_BITS = 1.8
"""The payload, in bits for each parameter, of the merges that `auto` measures, which are in ternary numbers."""
LEAST_ROUNDS = 10
"""The smallest number of rounds in which workers should merge."""
_MESSAGES = 6
"""The number of collectives of a merge that wait for the latency of the links: two averages, and what is compared."""
BACKWARD = 0.6
"""The share of a training step during which an accelerator sends the gradients of data parallel training.

A CPU that computes the backward pass has no time to add up gradients beside it.
"""


@dataclass(frozen=True)
class Circumstances:
    """What `auto` chooses by, the same numbers on all workers.

    Attributes:
        step: the seconds of a training step of the slowest worker, without communication between groups.
        reduce: the seconds in which groups would add up all parameters of the model in float32 (one all-reduce).
        latency: the seconds of the smallest collective between groups.
        steps: the training steps that are left in the run; None if they do not matter.
        shares_gradients: whether the model and its optimizer allow data parallel training over all workers.
        uneven: the seconds that workers would wait for each other in a step if they did so at every step.
        computing: the seconds that a worker computes in a merge, such as codes in few bits.
        hides: the share of a step during which gradients are sent: `BACKWARD` on accelerators, and 0 on CPUs.
    """

    step: float
    reduce: float
    latency: float = 0.0
    steps: int | None = None
    shares_gradients: bool = True
    uneven: float = 0.0
    computing: float = 0.0
    hides: float = BACKWARD

    def sending(self, bits: float) -> float:
        """Returns the seconds in which groups send and add up this many bits for each parameter."""
        return bits / 32 * self.reduce + _MESSAGES * self.latency


@dataclass(frozen=True)
class Row:
    """One way to synchronize workers, with its measured loss.

    Attributes:
        every: the steps between merges; 1 if gradients are averaged at every step.
        wire: the format of merges, or of gradients.
        delay: the training steps during which a merge is sent.
        bits: the payload of a merge in bits for each parameter; 32 for gradients in float32.
        above: the loss above that of data parallel training, as a share of it, in the mean over measured models.
    """

    every: int
    wire: str
    delay: int
    bits: float
    above: float

    @property
    def share(self) -> float:
        """The payload as a share of that of data parallel training in float32."""
        return self.bits / 32 / self.every

    @property
    def options(self) -> dict[str, Any]:
        """The options of `auto` that stand for this row."""
        return {"every": self.every, "wire": self.wire, "delay": self.delay}

    def waiting(self, here: Circumstances) -> float:
        """Returns the share of the time that workers would not train, from 0 to 1: they wait, or compute merges."""
        seconds = here.sending(self.bits)
        if self.every == 1:
            waited = max(seconds - here.hides * here.step, 0.0)
        else:
            # Workers send numbers and then averages, and wait for each at the end of a step.
            steps = (self.delay // 2, self.delay - self.delay // 2)
            waited = sum(max(seconds / 2 - part * here.step, 0.0) for part in steps) + here.computing
        # What makes single steps long or short evens out over a round.
        waited = waited / self.every + here.uneven / math.sqrt(self.every)
        return waited / (waited + here.step) if waited else 0.0


@cache
def frontier() -> Sequence[Row]:
    """Returns the measured rows, the least loss first. `benchmarks/frontier.py` makes their file."""
    table = json.loads(files(__package__).joinpath("frontier.json").read_text(encoding="utf-8"))
    return sorted((Row(**row) for row in table["rows"]), key=lambda row: (row.above, row.share))


def choose(here: Circumstances, budget: float | None = None) -> Row:
    """Returns the row with the least loss for which workers wait or merge at most `MOST_WAITING` of the time.

    If there is none, returns the row for which they wait least.

    Args:
        here: the measured circumstances.
        budget: the largest payload, as a share of that of data parallel training in float32; None for no limit.
    """
    rows = [row for row in frontier() if budget is None or row.share <= budget]
    rows = [row for row in rows if row.every > 1 or here.shares_gradients]
    if here.steps is not None:
        # The shortest rounds are always possible.
        shortest = min(row.every for row in rows)
        rows = [row for row in rows if row.every <= max(here.steps // LEAST_ROUNDS, shortest)]
    fast = [row for row in rows if row.waiting(here) <= MOST_WAITING]
    return fast[0] if fast else min(rows, key=lambda row: row.waiting(here))


def in_words(row: Row, here: Circumstances) -> str:
    """Returns a sentence that says what `auto` has chosen, and why."""
    what = "averages gradients at every step" if row.every == 1 else f"merges every {row.every} steps"
    hidden = f", sent during {row.delay} steps" if row.delay else ""
    return (
        f"auto {what} in {row.wire}{hidden}: a step takes {1e3 * here.step:.3g} ms, adding up all parameters between "
        f"groups would take {1e3 * here.reduce:.3g} ms, a small message takes {1e3 * here.latency:.2g} ms and a merge "
        f"computes for {1e3 * here.computing:.2g} ms, so that workers wait or merge {row.waiting(here):.1%} of the "
        f"time and send {row.share:.2%} of DDP's bytes"
    )


def completed(recipe: Recipe, options: Mapping[str, Any]) -> Recipe:
    """Returns a recipe of `auto` with the options of its choice.

    Raises:
        ConfigurationError: the options are not those of a choice.
    """
    return auto(recipe.total_steps, **options, outer_device=recipe.outer_device)


def chosen(recipe: Recipe) -> dict[str, Any]:
    """Returns the options that a completed recipe of `auto` was given; empty for another recipe."""
    if recipe.name != "auto" or recipe.choice is not None:
        return {}
    sync = recipe.cycle[0].sync
    if isinstance(sync, WeightSync):
        return {"every": sync.every, "wire": sync.wire, "delay": sync.delay}
    assert isinstance(sync, GradientSync)
    return {"every": 1, "wire": sync.wire, "delay": 0}


@only_declared
def auto(
    total_steps: int,
    *,
    budget: Annotated[float | None, "Largest payload, as a share of DDP's in fp32; by default no limit."] = None,
    every: Annotated[
        int | None, "Steps between merges; 1: gradients are averaged at every step; by default measured and chosen."
    ] = None,
    wire: Annotated[str | None, "Format in which merges or gradients are sent; by default chosen."] = None,
    delay: Annotated[int | None, "Training steps during which a merge is sent; by default chosen."] = None,
    outer_device: shared.OuterDevice = None,
) -> Recipe:
    """Measures training steps and links at the start of the run, then chooses how often and how to synchronize.

    Workers train and merge in two rounds, which are measured. Of a table of measured losses, `auto` takes the row with
    the least loss for which workers wait or compute merges at most 5 % of the time. The optimizer stays as it is.

    Raises:
        ConfigurationError: settings are invalid, or some of `every`, `wire` and `delay` are given and others are not.
    """
    _check(budget, every, wire, delay)
    first = min(MEASURED_STEPS, total_steps // 10) if are_counts(total_steps) else 0
    # The last merge of several tells what a merge takes, since the first one also prepares memory.
    every_measured = max(first // 2, 1)
    prologue = (Phase("measure", first, sync=WeightSync(every_measured, wire="ternary")),) if first > 0 else ()
    choice = Choice(budget) if prologue and every is None else None
    if every is None:
        # This cycle stands for the choice in forecasts. A run that is too short to measure has it.
        every, wire, delay = (20, "ternary", 0) if prologue else (1, "fp32", 0)
    sync = GradientSync(wire) if every == 1 else WeightSync(every, wire=str(wire), delay=delay or 0)  # type: ignore[arg-type]
    cycle = (Phase("full" if every == 1 else "rounds", total_steps, sync=sync),)
    return Recipe("auto", total_steps, prologue, cycle, outer_device=outer_device, choice=choice)


def _check(budget: float | None, every: int | None, wire: str | None, delay: int | None) -> None:
    found = []
    given = {"every": every, "wire": wire, "delay": delay}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        found.append(
            f"{', '.join(name for name in given if name not in missing)} given without {', '.join(missing)}: give all "
            "three, or none, so that auto chooses them"
        )
    if budget is not None:
        least = min(row.share for row in frontier())
        if not is_finite_number(budget) or not budget >= least:
            found.append(
                f"budget={budget!r} is not a number of at least {least:.2g}, the smallest share of DDP's bytes that "
                "was measured: use one, such as 0.01"
            )
    if every == 1 and delay:
        found.append(f"delay={delay} has no effect with every=1, where gradients are averaged: use delay=0")
    if found:
        raise ConfigurationError([f"recipe 'auto': {problem}" for problem in found])
