"""Defines and validates the settings of `abtrain recipes` and `abtrain plan`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from abtrain import recipes
from abtrain.commands.command_line import Shown
from abtrain.commands.units import COUNTS, with_unit
from abtrain.errors import ConfigurationError, nearest
from abtrain.recipes.factoring import Factoring
from abtrain.recipes.numbers import whole_number_problems

if TYPE_CHECKING:
    from abtrain.commands.plan.shapes import ModelShapes

# torch takes seconds to import. Functions that need it import it, so that `--help` answers immediately.

ALL = "all"
DEFAULT_PARAMETERS = "25M"
PLAN_EXAMPLE = "abtrain plan --parameters 25M --step-time 80ms --nodes 2 --rate 100mbit"
"""A command for a model of one's own."""
_MOST_PARAMETERS = 1e13
_RECIPE_HELP = f"One of {', '.join(recipes.RECIPES)}, with options such as ab_outer:every=10,wire=int8; or all."


@dataclass(frozen=True)
class ModelSettings:
    """The settings of the model, which `abtrain recipes` and `abtrain plan` share."""

    task: Annotated[str | None, Shown(group="model")] = None
    """Task of `abtrain train` that provides the model, such as fashion-cnn."""
    parameters: str | None = None
    """Number of parameters of an assumed model of square weights, such as 350M, if there is no task; by default 25M."""
    width: int | None = None
    """Width of these square weights; by default 1,024, or more for very large models."""
    compression: float | None = None
    """Parameters of the full model over those of the factored one, for recipes with factors. By default each factored
    weight keeps a quarter of its parameters."""


@dataclass(frozen=True)
class RecipesConfig(ModelSettings):
    """List the recipes with their phases, and their predicted payload compared with DDP in float32."""

    recipe: Annotated[str, Shown(help=_RECIPE_HELP, positional=True)] = ALL
    steps: Annotated[int, Shown(group="run")] = 10_000
    """Optimizer steps of the run."""
    workers: int = 4
    """Number of workers."""
    group_size: int = 1
    """Workers that average gradients at every step."""


@dataclass(frozen=True)
class PlanConfig(ModelSettings):
    """Recommend a recipe for a model and a link, and predict bytes and seconds of all recipes."""

    recipe: Annotated[str, Shown(help=_RECIPE_HELP, positional=True)] = ALL
    steps: Annotated[int, Shown(group="run")] = 10_000
    """Optimizer steps of the run."""
    step_time: str | None = None
    """Step time of one worker alone, such as 80ms; by default it is measured here if there is a task."""
    batch_size: int | None = None
    """Samples per worker and step if the time of a step is measured; by default the task's."""
    data: Path | None = None
    """Folder with the task's data if the time of a step is measured; by default its usual place."""
    nodes: Annotated[int, Shown(group="machines and links")] = 4
    """Number of machines."""
    workers_per_node: int = 1
    """Workers on each machine."""
    group_size: int | None = None
    """Workers that average gradients at every step; by default those of a node, and 1 on a single node."""
    rate: str = "1gbit"
    """Rate of a node's link in each direction, such as 100mbit or 1gbit."""
    rates: str | None = None
    """Rates of the links of all nodes, if they differ: 1gbit,1gbit,100mbit,100mbit."""
    latency: str = "0.1ms"
    """Time until a small message arrives, such as 0.5ms or 80us, including the overhead of software and processors.
    benchmarks/allreduce.py --megabytes 0.0004 --rounds 200 --pause 10 measures it."""
    algorithm: str = "ring"
    """Algorithm of all-reduces: ring (as in Gloo) or hierarchical."""
    jitter: Annotated[float, Shown(group="workers of unequal speed")] = 0.0
    """Variation of a step's time: standard deviation over mean."""
    slow_share: float = 0.0
    """Share of workers that are permanently slower."""
    slow_factor: float = 2.0
    """Step time of slow workers over that of the others."""
    seed: int = 0
    """Seed of the simulated speeds."""
    memory: Annotated[bool, Shown(group="memory")] = False
    """Predict the peak memory of a worker instead of bytes and seconds."""
    optimizer: Literal["adamw", "muon", "momentum", "sgd"] = "adamw"
    """Optimizer: adamw or muon if the time of a step is measured; for --memory also sgd, or momentum (SGD with
    momentum)."""
    activations: str | None = None
    """Memory for activations of a training step, such as 500MB, if there is no task to measure."""

    @property
    def workers_a_group(self) -> int:
        """The number of workers in a group. The default is the workers of a node, or 1 on a single node."""
        if self.group_size is not None:
            return self.group_size
        return self.workers_per_node if self.nodes > 1 else 1


def model_problems(config: RecipesConfig | PlanConfig) -> list[str]:
    """Returns a message for each problem of the recipe, the model and the number of steps; empty if there are none."""
    from abtrain.commands.tasks.task import TASKS

    found = []
    name = config.recipe.partition(":")[0]
    if name not in (*recipes.RECIPES, ALL):
        found.append(f"unknown recipe {name!r}: {nearest(name, [*recipes.RECIPES, ALL])}")
    elif name == ALL != config.recipe:
        found.append(f"recipe {config.recipe!r} sets options for {ALL} recipes: name one, as in ab_outer:every=10")
    if config.task is not None and config.task not in TASKS:
        found.append(f"unknown task {config.task!r}: {nearest(config.task, TASKS)}")
    for name in ("parameters", "width"):
        if config.task is not None and getattr(config, name) is not None:
            found.append(f"--{name} describes an assumed model, but --task names {config.task}: leave out one")
    found += problem_of(lambda: parameters_of(config))
    if config.compression is not None and not 1 <= config.compression < math.inf:
        found.append(f"--compression {config.compression:g} is out of range: use a finite number of at least 1")
    found += whole_number_problems("--steps", config.steps, least=1)
    if not found and config.task is None:
        found += problem_of(lambda: shapes_for(config))
    return found


def parameters_of(config: ModelSettings) -> int:
    """Returns the number of parameters of the assumed model.

    Raises:
        ConfigurationError: `--parameters` is not a number in range.
    """
    text = config.parameters or DEFAULT_PARAMETERS
    count = with_unit(text.replace("_", ""), COUNTS)
    if count is None or not 1 <= count <= _MOST_PARAMETERS:
        raise ConfigurationError(
            f"--parameters {text} is not a number from 1 to {_MOST_PARAMETERS:g}: use one such as 350M, 1.3B or 25e6"
        )
    return round(count)


def problem_of(attempt: Callable[[], object]) -> list[str]:
    """Calls `attempt`, and returns the messages of its ConfigurationError, or an empty list if it raises none."""
    try:
        attempt()
    except ConfigurationError as error:
        return list(error.problems)
    return []


def shapes_for(config: ModelSettings) -> Callable[[Factoring | None], ModelShapes]:
    """Returns a function that takes a recipe's `Factoring`, or None, and returns the shapes of the model."""
    import torch

    from abtrain.commands.plan.shapes import assumed_shapes, shapes_of
    from abtrain.commands.tasks.task import TASKS

    if config.task is not None:
        with torch.device("meta"):
            model = TASKS[config.task].model()
        return lambda factoring: shapes_of(model, factoring)
    assumed = assumed_shapes(parameters_of(config), config.width)
    return lambda factoring: assumed


def chosen(config: RecipesConfig | PlanConfig) -> list[str]:
    """Returns the requested recipes as strings: RECIPE or RECIPE:OPTION=VALUE,OPTION=VALUE."""
    return list(recipes.RECIPES) if config.recipe == ALL else [config.recipe]


def compression_in_words(config: ModelSettings) -> str:
    """Returns what is assumed of factors, for the end of a line."""
    if config.compression is None:
        return "factored weights keep a quarter"
    return f"compression {config.compression:g} : 1 if factored"


def model_in_words(config: ModelSettings, model: ModelShapes) -> str:
    """Returns one line that describes the model."""
    if config.task is not None:
        return f"{config.task}: {model.numel:,} parameters"
    width = max(parameter.shape[0] for parameter in model.parameters.values())
    return f"{model.numel:,} parameters in square weights of width {width:,} or less"
