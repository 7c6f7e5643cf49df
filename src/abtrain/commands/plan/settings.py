"""The settings of `abtrain recipes` and `abtrain plan`, and everything that can be wrong with them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from abtrain import recipes
from abtrain.errors import ConfigurationError, nearest
from abtrain.recipes.factoring import Factoring
from abtrain.recipes.numbers import whole_number_problems

if TYPE_CHECKING:
    from abtrain.commands.plan.shapes import ModelShapes

# torch takes seconds to import: what needs it is imported where it is used, so that `--help` answers at once.

ALL = "all"
DEFAULT_PARAMETERS = 25e6
_MOST_PARAMETERS = 1e13
_RECIPE_HELP = f"One of {', '.join(recipes.RECIPES)}, also with options (ab_outer:every=10,wire=int8); or all."


@dataclass(frozen=True)
class ModelSettings:
    """The settings of a model that both commands take."""

    task: str | None = None
    """One of `abtrain train`, such as fashion-cnn: takes that model's own shapes."""
    parameters: float | None = None
    """Of a model in square weights, in place of a task's; 25e6 by default."""
    width: int | None = None
    """Of those square weights; by default 1,024, more for very large models."""
    compression: float = 4
    """Parameters of the full model over those of the factored one, where a recipe factors."""


@dataclass(frozen=True)
class RecipesConfig(ModelSettings):
    """Lists the recipes: what each phase does, and its predicted payload against DDP in float32."""

    recipe: Annotated[Positional[str], arg(help=_RECIPE_HELP)] = ALL
    steps: int = 10_000
    """Optimizer steps of the run."""
    workers: int = 4
    """Processes that train."""
    group_size: int = 1
    """Workers that share their gradients at every step."""


@dataclass(frozen=True)
class PlanConfig(ModelSettings):
    """Predicts payload, wire bytes and seconds on given links, and recommends a recipe, rounds and a wire."""

    recipe: Annotated[Positional[str], arg(help=_RECIPE_HELP)] = ALL
    steps: int = 10_000
    """Optimizer steps of the run."""
    step_time: str | None = None
    """Of one worker alone, such as 80ms; with a task it is measured here by default."""
    batch_size: int | None = None
    """Samples per worker and step, when the step's time is measured; by default the task's."""
    data: Path | None = None
    """Folder with the task's data, when the step's time is measured; by default its usual place."""
    nodes: int = 4
    """Machines."""
    workers_per_node: int = 1
    """Processes that train on each of them."""
    group_size: int | None = None
    """Workers that share their gradients at every step; by default those of a node, and 1 on a single node."""
    rate: str = "1gbit"
    """Of a node's link, in each direction: 100mbit, 1gbit."""
    rates: str | None = None
    """Unlike links, one for each node: 1gbit,1gbit,100mbit,100mbit."""
    latency: str = "0.1ms"
    """Until a message arrives from the worker before it in the ring, but for its bytes; what software and
    processors add is in it: 0.5ms, 80us. benchmarks/allreduce.py --megabytes 0.0004 --rounds 200 --pause 10 tells."""
    algorithm: str = "ring"
    """How numbers are added up over all workers: ring (Gloo's way) or hierarchical."""
    jitter: float = 0.0
    """Spread of a step's time: standard deviation over mean."""
    slow_share: float = 0.0
    """Share of the workers that are slower for good."""
    slow_factor: float = 2.0
    """How many times longer a step of those takes."""
    seed: int = 0
    """Of the unlike workers."""

    @property
    def workers_a_group(self) -> int:
        """The group size, or its default."""
        if self.group_size is not None:
            return self.group_size
        return self.workers_per_node if self.nodes > 1 else 1


def model_problems(config: RecipesConfig | PlanConfig) -> list[str]:
    """Returns the problems of the recipe, the model and the length of a run; empty if there are none."""
    from abtrain.commands.tasks.task import TASKS

    found = []
    name = config.recipe.partition(":")[0]
    if name not in (*recipes.RECIPES, ALL):
        found.append(f"unknown recipe {name!r}: {nearest(name, [*recipes.RECIPES, ALL])}")
    elif name == ALL != config.recipe:
        found.append(f"options belong to one recipe: name it in place of {ALL}, as in ab_outer:every=10")
    if config.task is not None and config.task not in TASKS:
        found.append(f"unknown task {config.task!r}: {nearest(config.task, TASKS)}")
    if config.task is not None and config.parameters is not None:
        found.append("--task has a model of its own: leave out --parameters")
    if config.parameters is not None and not 1 <= config.parameters <= _MOST_PARAMETERS:
        found.append(f"--parameters {config.parameters:g} is out of range: use a number from 1 to {_MOST_PARAMETERS:g}")
    if not (math.isfinite(config.compression) and config.compression >= 1):
        found.append(f"--compression {config.compression:g} is not a finite number of at least 1: use one")
    found += whole_number_problems("--steps", config.steps, least=1)
    if not found and config.task is None:
        found += problem_of(lambda: shapes_for(config))
    return found


def problem_of(attempt: Callable[[], object]) -> list[str]:
    """Returns the problems that an attempt raises; empty if it succeeds."""
    try:
        attempt()
    except ConfigurationError as error:
        return list(error.problems)
    return []


def shapes_for(config: ModelSettings) -> Callable[[Factoring | None], ModelShapes]:
    """The shapes of the model that is asked about, given the factoring of a recipe.

    Args:
        config: valid.
    """
    import torch

    from abtrain.commands.plan.shapes import assumed_shapes, shapes_of
    from abtrain.commands.tasks.task import TASKS

    if config.task is not None:
        with torch.device("meta"):
            model = TASKS[config.task].model()
        return lambda factoring: shapes_of(model, factoring)
    assumed = assumed_shapes(round(config.parameters or DEFAULT_PARAMETERS), config.width)
    return lambda factoring: assumed


def chosen(config: RecipesConfig | PlanConfig) -> list[str]:
    """The recipes asked for, as texts."""
    return list(recipes.RECIPES) if config.recipe == ALL else [config.recipe]


def model_in_words(config: ModelSettings, model: ModelShapes) -> str:
    """Describes the assumptions about the model in one line."""
    compression = f"compression {config.compression:g} : 1 where factored"
    if config.task is not None:
        return f"{config.task}: {model.numel:,} parameters, {compression}"
    width = max(parameter.shape[0] for parameter in model.parameters.values())
    return f"{model.numel:,} parameters in square weights of {width:,} or less, {compression}"
