"""Recommends a recipe for a cluster: the fast recipe that is closest to plain data parallel training.

The module does not predict accuracy. It orders recipes by their closeness to data parallel training instead. Training
is closer if there are fewer steps between merges, if merges have shorter delays, and if more bits per number are sent.
The module tries recipes in this order, beginning with data parallel training in bfloat16. It recommends the first
recipe that takes at most a ninth longer than the fastest one.
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
from abtrain.commands.plan.forecast import FactorSeconds, Forecast, WorkerSeconds, forecast
from abtrain.commands.plan.payload import payload_ratio, predict
from abtrain.commands.plan.settings import problem_of
from abtrain.commands.plan.shapes import ModelShapes, ranks_for
from abtrain.commands.plan.stragglers import Speeds
from abtrain.recipes.factoring import Factoring
from abtrain.recipes.recipe import Recipe

GOOD_ENOUGH = 0.9
"""A recipe is fast enough if its speed is at least this share of the fastest recipe's speed."""
ROUNDS = (10, 20, 40, 80, 160, 320)
"""Numbers of steps between merges to try."""
WIRES = ("fp32", "bf16", "int8", "int4", "auto")
"""Wires to try, from wide to narrow; `auto` is narrower than int4 for more than two workers."""
HIDDEN = 0.5
"""The delay of hidden merges as a share of a round. Merges without delay are tried first."""
DELAYS = ("delay", "warmup_delay")
"""Options that hide merges."""
RARE = ("diloco", "ab_outer")
"""Recipes to try with all these options: full weights before factors."""


@dataclass(frozen=True)
class Offer:
    """A recipe with its options and its forecast.

    Attributes:
        name: the name of the recipe.
        options: the options of the recipe that differ from its defaults.
        recipe: the recipe that is built from the name and the options.
        forecast: the predicted bytes and seconds of the run.
        ratio: the payload of the recipe divided by the payload of DDP in float32.
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
    """The model, the cluster and the step times for which recipes are compared.

    Args:
        shapes: a function that takes a recipe's factoring and returns the model's shapes.
        compression: the parameters of the full model divided by those of the factored model.
        steps: the number of steps of the run.
        alone: the seconds that one worker takes for its own work, without communication.
        cluster: the nodes, their workers and their links.
        group_size: the number of workers in a group.
        speeds: the speeds of the workers; None if all are equal.
        algorithm: the algorithm of all-reduces, such as `ring`.
        measure_factors: a function that takes the rank of each weight by name, and returns the seconds that factors
            add. None neglects these seconds.
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
        """Returns a recipe with its options and the forecast of its run in this setting.

        Raises:
            ConfigurationError: the options, the compression or the group size are invalid.
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
        return Offer(name, options, recipe, expected, payload_ratio(expected.payload, model.numel, self.steps))


@dataclass(frozen=True)
class Recommendation:
    """The recommended recipe and the reasons.

    Attributes:
        choice: the recommended recipe.
        ddp: data parallel training in bfloat16, which is the reference.
        fastest: the fastest recipe that was tried.
        smaller: the first fast recipe that produces a smaller model. It is None if the choice itself produces one,
            or if no fast recipe does.
    """

    choice: Offer
    ddp: Offer
    fastest: Offer
    smaller: Offer | None

    def __str__(self) -> str:
        saved = 1 - self.fastest.forecast.seconds / self.choice.forecast.seconds
        more = (
            "" if self.choice is self.fastest else f" The fastest recipe, {self.fastest}, takes {saved:.0%} less time."
        )
        if self.choice is self.ddp:
            return f"{self.ddp}: plain data parallel training is nearly as fast as any recipe here.{more}"
        text = (
            f"{self.choice} is {self._speed(self.choice)} {self.ddp}; "
            f"{self.choice.forecast.utilisation:.0%} of the time is computation.{more}"
        )
        if self.smaller is not None:
            text += f" For a smaller model, use {self.smaller}, {self._speed(self.smaller)} {self.ddp}."
        return text

    def _speed(self, offer: Offer) -> str:
        return f"{self.ddp.forecast.seconds / offer.forecast.seconds:.1f} times as fast as"


def recommend(setting: Setting, names: Sequence[str] = RARE) -> Recommendation:
    """Recommends data parallel training in bfloat16, or one of the recipes `names` with suitable options.

    Raises:
        ConfigurationError: the setting is invalid.
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
    """Yields recipes from the closest to data parallel training to the most distant."""
    for every in ROUNDS:
        for name in names:
            known = recipes.options_of(name)
            # A recipe needs room for a round of its first phase, and for one after it.
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
