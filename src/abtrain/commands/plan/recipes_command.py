"""`abtrain recipes`: lists the recipes with their phases, predicted payload and options."""

from __future__ import annotations

from functools import partial

from rich.table import Table
from rich.text import Text

from abtrain import recipes
from abtrain.comm.topology import Topology, topology_problems
from abtrain.commands.output import Output, narrow_table
from abtrain.commands.plan.payload import predict
from abtrain.commands.plan.recipe_words import options_in_words, phases_in_words, purpose_of
from abtrain.commands.plan.settings import (
    ALL,
    RecipesConfig,
    chosen,
    compression_in_words,
    model_in_words,
    model_problems,
    problem_of,
    shapes_for,
)
from abtrain.commands.plan.shapes import ranks_for
from abtrain.commands.plan.totals import over_links, payload, payload_ratio
from abtrain.commands.units import human_bytes
from abtrain.errors import ConfigurationError
from abtrain.recipes.recipe import Recipe

_NEXT_TO_NOTHING = 1e-6
_SMALL = 0.1


def list_recipes(config: RecipesConfig, console: Output | None = None) -> None:
    """Prints a table of all recipes, or the details of one: its phases, their payload, and its options.

    If the run is too short for a recipe, the table shows the reason instead of its purpose and phases.

    Raises:
        ConfigurationError: settings are invalid. The error lists all problems.
    """
    problems = model_problems(config) + topology_problems(config.workers, config.group_size)
    if not problems:
        refused = [problem_of(partial(recipes.from_text, each, config.steps)) for each in chosen(config)]
        problems += [problem for each in refused for problem in each] if all(refused) else []
    if problems:
        raise ConfigurationError(problems)
    console = console or Output()
    model = shapes_for(config)(None)
    workers = f"{config.workers} workers in groups of {config.group_size}"
    console.print(model_in_words(config, model))
    console.print(f"{config.steps:,} steps, {workers}, {compression_in_words(config)}\n")
    note = payload_note(config.workers, config.group_size)
    if note:
        console.print(f"{note.strip()}\n")
    if config.recipe == ALL:
        console.print(_table(config))
    else:
        name, _ = recipes.parse(config.recipe)
        console.print(f"{config.recipe}\n")
        console.print(_phases(config, recipes.from_text(config.recipe, config.steps)))
        console.print(f"\n{purpose_of(name)}\n")
        console.print(_options(name) if recipes.options_of(name) else "no options")


def payload_note(workers: int, group_size: int) -> str:
    """Returns a sentence on what payload counts, with a space after it; empty if that is what each worker sends."""
    if group_size == 1 or group_size == workers:
        return ""
    return f"Payload is what a group of {group_size} workers sends to the other groups. "


def ratio_in_words(ratio: float) -> str:
    """Formats a ratio of payloads in percent, and also as a fraction if it is small."""
    short = ratio_in_short(ratio)
    return f"{ratio:.2%} ({short})" if _NEXT_TO_NOTHING <= ratio < _SMALL else short


def ratio_in_short(ratio: float) -> str:
    """Formats a ratio of payloads in percent, or as a fraction if it is small."""
    if ratio < _NEXT_TO_NOTHING:
        return "nothing"
    return f"{ratio:.1%}" if ratio >= _SMALL else f"1/{1 / ratio:,.0f}"


def _table(config: RecipesConfig) -> Table:
    table = narrow_table()
    table.add_column("recipe", no_wrap=True)
    table.add_column("purpose and phases")
    table.add_column("of ddp's payload", justify="right", no_wrap=True)
    for name in chosen(config):
        try:
            recipe = recipes.build(name, config.steps)
        except ConfigurationError as error:
            table.add_row(name, "\n".join(error.problems), "-", end_section=True, style="dim")
            continue
        _, ratio, _ = _predicted(config, recipe)
        phases = "".join(f"\n- {line}" for line in phases_in_words(recipe))
        words = Text.assemble((purpose_of(name), "bold"), phases)
        table.add_row(name, words, ratio_in_words(ratio), end_section=True)
    return table


def _phases(config: RecipesConfig, recipe: Recipe) -> Table:
    total, ratio, by_phase = _predicted(config, recipe)
    table = narrow_table()
    table.add_column("phase")
    table.add_column("payload", justify="right", no_wrap=True)
    table.add_column("of all", justify="right", no_wrap=True)
    words = {"setup": "setup: recipe and initial weights compared"} if "setup" in by_phase else {}
    words |= dict(zip((phase.name for phase in recipe.phases), phases_in_words(recipe), strict=False))
    for phase, line in words.items():
        sent = by_phase.get(phase, 0)
        table.add_row(line, human_bytes(sent), f"{sent / max(total, 1):.1%}")
    table.add_section()
    table.add_row("all phases", human_bytes(total), "")
    table.add_row("of ddp in fp32", ratio_in_words(ratio), "")
    return table


def _options(name: str) -> Table:
    """Returns a table of the options of a recipe."""
    table = narrow_table()
    table.add_column("option", no_wrap=True)
    table.add_column("default", overflow="fold")
    table.add_column("meaning")
    for option in options_in_words(name):
        table.add_row(option.name, option.default, Text(option.meaning))
    return table


def _predicted(config: RecipesConfig, recipe: Recipe) -> tuple[int, float, dict[str, int]]:
    """Returns the payload of `over_links` in bytes, its ratio to DDP's in float32, and the payload of each phase."""
    model = shapes_for(config)(recipe.factoring)
    topology = Topology(config.workers, config.group_size)
    ranks = ranks_for(model, config.compression) if recipe.factored else {}
    sent = payload(predict(recipe, model, topology, ranks), topology)
    by_phase = over_links(sent, topology)
    total = sum(by_phase.values())
    return total, payload_ratio(total, model.numel, config.steps), by_phase
