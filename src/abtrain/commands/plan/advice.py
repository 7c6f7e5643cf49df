"""Recommends a recipe for a cluster: among the fast recipes, the one that resembles data parallel training most.

The module does not predict accuracy. It assumes that training resembles data parallel training more if workers merge
their weights more often, and if fewer training steps run while a merge is sent. The module tries recipes in this order,
beginning with data parallel training in bfloat16. It recommends the first recipe whose run takes at most a ninth longer
than that of the fastest recipe. It tries merges in the recipe's own wire format and in the format `auto`, since formats
with few bits lose almost no accuracy (benchmarks/merges.md).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

from abtrain import recipes
from abtrain.comm.topology import Topology
from abtrain.commands.plan.collectives import Cluster, cost_of, scoped
from abtrain.commands.plan.forecast import FactorSeconds, Forecast, WorkerSeconds, forecast
from abtrain.commands.plan.payload import predict
from abtrain.commands.plan.settings import problem_of
from abtrain.commands.plan.shapes import ModelShapes, ranks_for
from abtrain.commands.plan.stragglers import Speeds
from abtrain.commands.plan.totals import payload_ratio
from abtrain.recipes import automatic
from abtrain.recipes.factoring import Factoring
from abtrain.recipes.phase import SHORT_RUN
from abtrain.recipes.recipe import Recipe
from abtrain.recipes.sync import WeightSync
from abtrain.recipes.wires import AUTO

GOOD_ENOUGH = 0.9
"""A recipe is fast enough if its speed is at least this share of the fastest recipe's speed."""
ROUNDS = (1, 2, 4, 8, 16)
"""The numbers of steps between merges that are tried, as multiples of the recipe's default."""
DELAYS = (0, 0.1, 0.5)
"""The numbers of training steps that may run while a merge is sent, as shares of the steps between two merges."""
_USUAL_ROUND = 20
"""The number of steps between merges that is used for recipes without a default."""
DELAY_OPTIONS = ("delay", "warmup_delay")
"""The options of recipes that set how many training steps run while a merge is sent."""
CASES = {
    "a CNN, or another model": recipes.DEFAULT,
    "a transformer from scratch": "ab_local",
    "any model, without factors": "auto",
}
"""The recipes that are recommended for slow links, by the kind of model. README has the same table."""


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
        shapes: a function that takes the `Factoring` of a recipe, or None, and returns the shapes of the model.
        compression: the parameters of the full model divided by those of the factored model, for recipes with factors.
            None: each factored weight keeps a quarter of its parameters.
        steps: the number of steps of the run.
        alone: the seconds that one worker takes for its own work, without communication.
        cluster: the nodes, their workers and their links.
        group_size: the number of workers in a group.
        speeds: the speeds of the workers; None if all workers are equally fast.
        algorithm: the algorithm of all-reduces, such as `ring`.
        measure_factors: a function that takes the rank of each weight by name, and returns the seconds that factors
            add. If it is None, the forecast ignores these seconds.
    """

    shapes: Callable[[Factoring | None], ModelShapes]
    compression: float | None
    steps: int
    alone: WorkerSeconds
    cluster: Cluster
    group_size: int = 1
    speeds: Speeds | None = None
    algorithm: str = "ring"
    measure_factors: Callable[[Mapping[str, int]], FactorSeconds] | None = None

    def offer(self, name: str, **options: Any) -> Offer:
        """Builds the recipe `name` with these options, and forecasts its run in this setting.

        Raises:
            ConfigurationError: an option of the recipe, the compression or the group size is invalid.
        """
        recipe = recipes.build(name, self.steps, **options)
        if recipe.choice is not None:
            options |= automatic.choose(self.circumstances(), recipe.choice.budget).options
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

    def circumstances(self) -> automatic.Circumstances:
        """Returns the forecast of what the recipe `auto` measures in this setting."""
        links, at_once = scoped(self.cluster, "counterparts", self.group_size)
        numbers = self.shapes(None).numel / self.group_size
        reduce, latency = (
            cost_of("all_reduce", links, at_once * nbytes, self.algorithm).seconds for nbytes in (4 * numbers, 8)
        )
        alone, measured = self.alone, WeightSync(automatic.MEASURED_STEPS, wire="ternary")
        each, overall = (
            self.speeds.slowdown(steps, self.group_size) if self.speeds else 1.0
            for steps in (1, automatic.MEASURED_STEPS)
        )
        left = self.steps - (recipes.build("auto", self.steps).chooses_at or 0)
        return automatic.Circumstances(
            overall * alone.step,
            reduce,
            latency,
            left,
            uneven=max(each - overall, 0.0) * alone.step,
            computing=overall * alone.merge(measured, self.cluster.workers // self.group_size, round(numbers)),
            # What is measured here runs on a CPU.
            hides=0.0 if self.measure_factors else automatic.BACKWARD,
        )


@dataclass(frozen=True)
class Recommendation:
    """The recommended recipe, and the recipes to compare it with.

    Attributes:
        choice: the recommended recipe.
        ddp: data parallel training in bfloat16, which is the reference.
        fastest: the fastest recipe that was tried.
        cases: a recipe for each kind of model, as in CASES. It is empty if one recipe was requested by name, or
            if `choice` is data parallel training.
    """

    choice: Offer
    ddp: Offer
    fastest: Offer
    cases: Mapping[str, Offer]


def recommend(setting: Setting, name: str = "") -> Recommendation:
    """Recommends data parallel training in bfloat16, or a recipe with suitable options.

    Args:
        setting: the model, the cluster and the step times.
        name: the recipe whose options are chosen. If it is empty, this is the default recipe, and `cases` of the result
            lists recipes for other kinds of models.

    Raises:
        ConfigurationError: the compression or the group size of the setting is invalid.
    """
    ddp = setting.offer("ddp", wire="bf16")
    ladder = [ddp, *_ladder(setting, name or recipes.DEFAULT)]
    fastest = min(ladder, key=lambda offer: offer.forecast.seconds)
    good = (offer for offer in ladder if fastest.forecast.seconds >= GOOD_ENOUGH * offer.forecast.seconds)
    choice = ddp if setting.steps < SHORT_RUN else next(good)
    cases = {}
    if choice is not ddp and not name:
        for case, text in CASES.items():
            recipe, options = recipes.parse(text)
            cases[case] = choice if recipe == choice.name else setting.offer(recipe, **options)
    return Recommendation(choice, ddp, fastest, cases)


def _ladder(setting: Setting, name: str) -> Iterator[Offer]:
    """Yields variants of a recipe. The first resembles data parallel training most, the last resembles it least."""
    known = recipes.options_of(name)
    if "every" not in known:
        return
    defaults = inspect.signature(recipes.RECIPES[name]).parameters
    usual = defaults["every"].default or _USUAL_ROUND
    wires = [{}, {"wire": AUTO}] if "wire" in known and defaults["wire"].default != AUTO else [{}]
    for times, share, wire in product(ROUNDS, DELAYS, wires):
        every = times * usual
        options: dict[str, Any] = {"every": every} if every != defaults["every"].default else {}
        options |= wire
        options |= {option: round(share * every) for option in DELAY_OPTIONS if share and option in known}
        # The run needs a round in its first phase and one after it. `recipes.build` allows phases shorter than a round.
        fits = 2 * every <= setting.steps and not problem_of(partial(recipes.build, name, setting.steps, **options))
        if fits and (not share or any(option in known for option in DELAY_OPTIONS)):
            yield setting.offer(name, **options)
