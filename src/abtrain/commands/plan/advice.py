"""Which recipe suits a cluster: forecasts of many, and the one closest to plain data parallel training that is fast.

Nothing here knows what a recipe costs in accuracy. What is known is the order: the fewer steps between merges, the
sooner a merge is there and the wider the wire, the closer to data parallel training. So recipes are tried in that
order, data parallel training in bfloat16 first, and the first that takes at most a ninth longer than the fastest of all
is recommended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

from abtrain import recipes
from abtrain.comm.topology import Topology
from abtrain.commands.plan.collectives import Cluster
from abtrain.commands.plan.forecast import Forecast, forecast
from abtrain.commands.plan.payload import payload_ratio, predict
from abtrain.commands.plan.settings import problem_of
from abtrain.commands.plan.shapes import ModelShapes, ranks_for
from abtrain.commands.plan.stragglers import Speeds
from abtrain.commands.plan.worker_seconds import FactorSeconds, WorkerSeconds
from abtrain.recipes.factoring import Factoring
from abtrain.recipes.recipe import Recipe

GOOD_ENOUGH = 0.9
"""Speed over that of the fastest recipe, from which a recipe closer to data parallel training is worth more."""
ROUNDS = (10, 20, 40, 80, 160, 320)
"""Steps between merges that are tried."""
WIRES = ("fp32", "bf16", "int8", "int4", "auto")
"""Wires that are tried, widest first; `auto` is narrower than int4 among more than two workers."""
HIDDEN = 0.5
"""Share of a round that merges are hidden behind where that is tried; merges that are waited for are tried before."""
DELAYS = ("delay", "warmup_delay")
"""Options that hide merges."""
RARE = ("diloco", "ab_outer")
"""Recipes that are tried with all of those: full weights before factors."""


@dataclass(frozen=True)
class Offer:
    """A recipe with its options, and what it would take.

    Attributes:
        name: of the recipe.
        options: those that differ from its defaults.
        recipe: built.
        forecast: bytes and seconds.
        ratio: payload over that of DDP in float32.
    """

    name: str
    options: dict[str, Any]
    recipe: Recipe
    forecast: Forecast
    ratio: float

    def __str__(self) -> str:
        return recipes.write(self.name, self.options)


@dataclass(frozen=True)
class Setting:
    """All that a plan depends on but the recipe.

    Args:
        shapes: the model's shapes, given a recipe's factoring.
        compression: of the model while it is factored.
        steps: of the run.
        alone: what a worker takes for its own work.
        cluster: nodes and links.
        group_size: workers a group.
        speeds: of the workers; None: all alike.
        algorithm: of all-reduces.
        measure_factors: tells what factors of these ranks add to that, by the name of the weight; None: nothing.
    """

    shapes: Callable[[Factoring | None], ModelShapes]
    compression: float
    steps: int
    alone: WorkerSeconds
    cluster: Cluster
    group_size: int = 1
    speeds: Speeds | None = None
    algorithm: str = "ring"
    measure_factors: Callable[[Mapping[str, int]], FactorSeconds] | None = None

    def offer(self, name: str, **options: Any) -> Offer:
        """Returns the cost of a recipe here.

        Raises:
            ConfigurationError: options, a compression or a group size that cannot be.
        """
        recipe = recipes.build(name, self.steps, **options)
        model = self.shapes(recipe.factoring)
        ranks = ranks_for(model, self.compression) if recipe.factored else {}
        alone = self.alone
        if ranks and self.measure_factors is not None:
            alone = replace(alone, factors=self.measure_factors(ranks))
        stretches = predict(recipe, model, Topology(self.cluster.workers, self.group_size), ranks)
        expected = forecast(
            stretches,
            self.cluster,
            alone,
            group_size=self.group_size,
            speeds=self.speeds,
            algorithm=self.algorithm,
        )
        return Offer(name, options, recipe, expected, payload_ratio(expected.payload, model, self.steps))


@dataclass(frozen=True)
class Recommendation:
    """The recommended recipe, and the reasons.

    Attributes:
        choice: what to run.
        ddp: data parallel training in bfloat16, the measure.
        fastest: of all that were tried.
        smaller: the first that is as good and hands back a smaller model; None where the choice does, or none is.
    """

    choice: Offer
    ddp: Offer
    fastest: Offer
    smaller: Offer | None

    def __str__(self) -> str:
        saved = 1 - self.fastest.forecast.seconds / self.choice.forecast.seconds
        more = "" if self.choice is self.fastest else f" The fastest that was tried, {self.fastest}, saves {saved:.0%}."
        if self.choice is self.ddp:
            return f"{self.ddp} is the better choice here: plain data parallel training is nearly as fast as any.{more}"
        text = (
            f"{self.choice} is {self._speed(self.choice)} {self.ddp}; "
            f"{self.choice.forecast.utilisation:.0%} of the time is computation.{more}"
        )
        if self.smaller is not None:
            text += f" For a smaller model as well: {self.smaller}, {self._speed(self.smaller)} {self.ddp}."
        return text

    def _speed(self, offer: Offer) -> str:
        return f"{self.ddp.forecast.seconds / offer.forecast.seconds:.1f} times as fast as"


def recommend(setting: Setting, names: Sequence[str] = RARE) -> Recommendation:
    """The recipe, rounds and wire for a setting, out of data parallel training in bfloat16 and `names`.

    Raises:
        ConfigurationError: a setting that cannot be.
    """
    ddp = setting.offer("ddp", wire="bf16")
    ladder = [ddp, *_ladder(setting, names)]
    fastest = min(ladder, key=lambda offer: offer.forecast.seconds)

    def first(offers: Sequence[Offer]) -> Offer | None:
        good = (o for o in offers if fastest.forecast.seconds >= GOOD_ENOUGH * o.forecast.seconds)
        return next(good, None)

    choice = first(ladder) or fastest
    smaller = first([offer for offer in ladder if offer.recipe.factored])
    return Recommendation(choice, ddp, fastest, None if choice.recipe.factored else smaller)


def _ladder(setting: Setting, names: Sequence[str]) -> Iterator[Offer]:
    """From close to data parallel training to far from it."""
    for every in ROUNDS:
        for name in names:
            known = recipes.options_of(name)
            # A recipe needs room for a round of its first phase, and one behind it.
            if "every" not in known or 2 * every > setting.steps:
                continue
            wires = [{"wire": wire} for wire in WIRES] if "wire" in known else [{}]
            hidden = {option: round(HIDDEN * every) for option in DELAYS if option in known}
            delays = [{}, hidden] if hidden else [{}]
            for delay, wire in product(delays, wires):
                options = {"every": every, **wire, **delay}
                # A phase may be shorter than a round.
                if not problem_of(partial(recipes.build, name, setting.steps, **options)):
                    yield setting.offer(name, **options)
