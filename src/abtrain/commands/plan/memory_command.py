"""`abtrain plan --memory`: predicts the peak memory of a worker for recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial

from rich.table import Table

from abtrain import recipes
from abtrain.comm.topology import Topology, topology_problems
from abtrain.commands.output import Output, narrow_table
from abtrain.commands.plan.memory import OUTER, Moment, StepMemory, peak_of, predict_memory
from abtrain.commands.plan.settings import (
    PlanConfig,
    chosen,
    compression_in_words,
    model_in_words,
    model_problems,
    problem_of,
    shapes_for,
)
from abtrain.commands.plan.shapes import ranks_for
from abtrain.commands.plan.step_memory import measure_process, measure_task
from abtrain.commands.units import human_bytes, parse_size
from abtrain.errors import ConfigurationError
from abtrain.recipes.factoring import Factoring
from abtrain.recipes.numbers import whole_number_problems
from abtrain.recipes.rank_rules import FixedRank
from abtrain.recipes.recipe import Recipe

_COLUMNS: Mapping[str, Sequence[str]] = {
    "model": ("parameters", "gradients", "optimizer state"),
    "step": ("activations", "preconditioner"),
    "DDP": ("gradient buckets",),
    "merges": (*OUTER, "hidden merges"),
    "other": ("temporary tensors",),
}
"""The columns of the table of all recipes, with the parts that each of them adds up."""
_UNKNOWN = "Activations are not included: give them by --activations, such as 500MB, or name a --task to measure them. "
_NOTE = (
    "Bytes are forecasts for a worker on the CPU. On a GPU, the process is not in the GPU's memory. It is assumed that "
    "the loop calls zero_grad() before ab.step(). Validation by ab.merged() between merges needs two more copies of "
    "the weights, but no gradients or activations."
)


def plan_memory(config: PlanConfig, console: Output | None = None) -> None:
    """Prints the predicted peak memory of a worker: of one recipe by part, or of all recipes.

    Raises:
        ConfigurationError: settings are invalid. The error lists all problems.
        DataError: training steps are to be measured, and the task's data is not available.
    """
    problems = _problems(config)
    if problems:
        raise ConfigurationError(problems)
    console = console or Output()
    predicted = {text: _predicted(config, text) for text in chosen(config)}
    measured = "by --activations" if config.activations else "measured here" if config.task else "not included"
    workers = config.nodes * config.workers_per_node
    for line in (
        model_in_words(config, shapes_for(config)(None)),
        f"{workers:,} workers in groups of {config.workers_a_group}, optimizer {config.optimizer}, "
        + compression_in_words(config),
        f"activations of a step: {measured}\n",
    ):
        console.print(line)
    for text, moments in predicted.items():
        if len(predicted) == 1:
            peak = peak_of(moments)
            console.print(f"{text}: at most {human_bytes(peak.total)}, in phase {peak.phase} ({peak.when})\n")
            console.print(_by_part(peak))
            console.print()
            outer = sum(peak.parts[part] for part in OUTER)
            if outer and recipes.from_text(text, config.steps).outer_device:
                console.print(f"On a GPU, {human_bytes(outer)} are in host memory: {', '.join(OUTER)}.\n")
            console.print(_by_moment(moments))
    if len(predicted) > 1:
        console.print(_of_all(predicted))
    console.print("\n" + ("" if config.activations or config.task else _UNKNOWN) + _NOTE)


def _problems(config: PlanConfig) -> list[str]:
    found = model_problems(config)
    if config.batch_size is not None:
        found += whole_number_problems("--batch-size", config.batch_size, least=1)
    if config.activations is not None:
        found += problem_of(partial(parse_size, config.activations))
        if config.task is not None:
            found.append(f"--activations is measured for --task {config.task}: leave out one")
    found += topology_problems(config.nodes * config.workers_per_node, config.workers_a_group)
    if not found:
        for text in chosen(config):
            found += problem_of(partial(recipes.from_text, text, config.steps))
        found += problem_of(lambda: ranks_for(shapes_for(config)(Factoring(FixedRank(1))), config.compression))
    return found


def _predicted(config: PlanConfig, text: str) -> list[Moment]:
    recipe = recipes.from_text(text, config.steps)
    model = shapes_for(config)(recipe.factoring)
    ranks = ranks_for(model, config.compression) if recipe.factored else {}
    topology = Topology(config.nodes * config.workers_per_node, config.workers_a_group)
    step = _step(config, recipe, tuple(ranks.items()))
    return predict_memory(recipe, model, topology, step, ranks, config.optimizer)


def _step(config: PlanConfig, recipe: Recipe, ranks: tuple[tuple[str, int], ...]) -> StepMemory:
    if config.task is None:
        given = round(parse_size(config.activations)) if config.activations else 0
        return StepMemory(measured_process(), given, given)
    return StepMemory.of(_measured(config, ()), _measured(config, ranks) if ranks else None)


@cache
def measured_process() -> int:
    return measure_process()


@cache
def _measured(config: PlanConfig, ranks: tuple[tuple[str, int], ...]) -> tuple[int, int]:
    assert config.task is not None
    return measure_task(config.task, config.data, config.batch_size, config.optimizer, dict(ranks))


def _by_part(peak: Moment) -> Table:
    table = narrow_table()
    table.add_column("part")
    table.add_column("bytes", justify="right")
    table.add_column("share", justify="right")
    for part, nbytes in [*peak.parts.items(), ("total", peak.total)]:
        if nbytes:
            table.add_row(part, human_bytes(nbytes), f"{nbytes / peak.total:.0%}")
    return table


def _by_moment(moments: Sequence[Moment]) -> Table:
    largest: dict[tuple[str, str], Moment] = {}
    for moment in moments:
        place = (moment.phase, moment.when)
        largest[place] = peak_of([largest.get(place, moment), moment])
    table = narrow_table()
    table.add_column("phase")
    table.add_column("moment")
    table.add_column("total", justify="right")
    for (phase, when), moment in largest.items():
        table.add_row(phase, when, human_bytes(moment.total))
    return table


def _of_all(predicted: Mapping[str, Sequence[Moment]]) -> Table:
    table = narrow_table()
    table.add_column("recipe", no_wrap=True)
    for heading in ("process", *_COLUMNS, "peak"):
        table.add_column(heading, justify="right", no_wrap=True)
    for text, moments in predicted.items():
        peak = peak_of(moments)
        summed = [sum(peak.parts[part] for part in parts) for parts in _COLUMNS.values()]
        table.add_row(text, *map(human_bytes, (peak.parts["process"], *summed, peak.total)))
    return table
