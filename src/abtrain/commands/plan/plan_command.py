"""`abtrain plan`: predicts the bytes and seconds of recipes on a cluster's links, and recommends a recipe."""

from __future__ import annotations

from functools import partial

from rich.table import Table

from abtrain import recipes
from abtrain.comm.topology import topology_problems
from abtrain.commands.output import Output, breakable, narrow_table
from abtrain.commands.plan.advice import Offer, Recommendation, Setting, recommend
from abtrain.commands.plan.bench import Bench, measure_decompositions
from abtrain.commands.plan.collectives import ALL_REDUCES, Cluster, NodeLink
from abtrain.commands.plan.forecast import PhaseForecast, WorkerSeconds
from abtrain.commands.plan.memory_command import plan_memory
from abtrain.commands.plan.merge_bench import seconds_of_merge
from abtrain.commands.plan.recipes_command import payload_note, ratio_in_short, ratio_in_words
from abtrain.commands.plan.settings import (
    ALL,
    PLAN_EXAMPLE,
    PlanConfig,
    chosen,
    compression_in_words,
    model_in_words,
    model_problems,
    problem_of,
    shapes_for,
)
from abtrain.commands.plan.shapes import ranks_for
from abtrain.commands.plan.stragglers import Speeds
from abtrain.commands.tasks.choices import OptimizerName
from abtrain.commands.tasks.task import TASKS
from abtrain.commands.units import TimeUnit, human_bytes, parse_all, parse_rate, parse_seconds, unit_of
from abtrain.engine.shared_steps import are_shared
from abtrain.errors import ConfigurationError, nearest
from abtrain.recipes import automatic
from abtrain.recipes.factoring import Factoring
from abtrain.recipes.numbers import whole_number_problems
from abtrain.recipes.phase import SHORT_RUN
from abtrain.recipes.rank_rules import FixedRank

_MOST_WORKERS = 10**6
_NOTE = (
    "Bytes and times are forecasts. They assume that a step takes the same time in every recipe, except for the cost "
    "of factors, of averaging gradients and of computing merges if a step was measured. Accuracy is not predicted: "
    "every recipe but ddp loses some, and more with rarer and hidden merges."
)


def plan(config: PlanConfig, console: Output | None = None) -> None:
    """Prints the recommended recipe, and the forecasts of recipes; with `--memory`, the predicted memory of recipes.

    Raises:
        ConfigurationError: settings are invalid. The error lists all problems.
        DataError: a step is to be measured, and the task's data is not available.
    """
    if config.memory:
        plan_memory(config, console)
        return
    problems = _problems(config)
    if problems:
        raise ConfigurationError(problems)
    console = console or Output()
    setting = _setting(config)
    name, options = ("", {}) if config.recipe == ALL else recipes.parse(config.recipe)
    by_itself = name == "auto"
    advice = recommend(setting, name if name and not by_itself and "every" in recipes.options_of(name) else "")
    unit = unit_of(advice.choice.forecast.seconds)
    if not by_itself:
        _advise(advice, unit, console)
    _heading(config, setting, console)
    if name:
        offer = setting.offer(name, **options)
        if by_itself and "every" not in options:
            here = setting.circumstances()
            console.print(f"{automatic.in_words(automatic.choose(here, options.get('budget')), here)}\n")
        console.print(f"{offer}: {ratio_in_words(offer.ratio)} of the payload of ddp, times in {unit.name}\n")
        console.print(_by_phase(offer, unit))
    else:
        offers = [advice.ddp, advice.choice, advice.fastest, *map(setting.offer, recipes.RECIPES)]
        console.print(_comparison(list({str(offer): offer for offer in offers}.values()), advice.ddp, unit))
    console.print("\n" + payload_note(config.nodes * config.workers_per_node, config.workers_a_group) + _NOTE)


def _advise(advice: Recommendation, unit: TimeUnit, console: Output) -> None:
    """Prints the recommended recipe with the time that it takes, and a table of recipes for other models."""
    choice, ddp, fastest = advice.choice, advice.ddp, advice.fastest
    took = unit.text(choice.forecast.seconds)
    if choice is not ddp:
        reason = f"It takes {took}; {ddp} takes {unit.text(ddp.forecast.seconds)}."
    elif choice.recipe.total_steps < SHORT_RUN:
        reason = f"It takes {took}. Runs below {SHORT_RUN} steps are too short for rare merges."
    else:
        reason = f"It takes {took}, and no recipe is much faster."
    more = "" if fastest is choice else f" The fastest is {fastest}: {unit.text(fastest.forecast.seconds)}."
    console.print(f"Recommended: {choice}. {reason}{more}\n")
    if advice.cases:
        table = narrow_table()
        table.add_column("if you train")
        table.add_column("take")
        table.add_column(unit.name, justify="right")
        for case, offer in advice.cases.items():
            table.add_row(case, str(offer), unit.figure(offer.forecast.seconds))
        console.print(table)
        console.print()


def _problems(config: PlanConfig) -> list[str]:
    found = model_problems(config)
    parse_all(_rates(config), parse_rate, found)
    for attempt in (
        lambda: parse_seconds(config.latency),
        lambda: config.step_time is None or parse_seconds(config.step_time),
    ):
        found += problem_of(attempt)
    if not found and config.step_time is not None and parse_seconds(config.step_time) == 0:
        found.append(f"--step-time {config.step_time} is too short: use a time above 0")
    if config.batch_size is not None:
        found += whole_number_problems("--batch-size", config.batch_size, least=1)
    if config.algorithm not in ALL_REDUCES:
        found.append(f"unknown algorithm {config.algorithm!r}: {nearest(config.algorithm, ALL_REDUCES)}")
    if config.task is None and config.step_time is None:
        found.append(f"the time of a step is not known: name a --task to measure it, or set it as in `{PLAN_EXAMPLE}`")
    if config.rates is not None and len(_rates(config)) != config.nodes:
        found.append(f"--rates has {len(_rates(config))} rates for {config.nodes} nodes: give one rate for each node")
    # The next two checks need valid settings.
    if not found:
        found += problem_of(lambda: _cluster(config))
        found += problem_of(lambda: ranks_for(shapes_for(config)(Factoring(FixedRank(1))), config.compression))
    workers = config.nodes * config.workers_per_node
    found += topology_problems(workers, config.workers_a_group)
    if workers > _MOST_WORKERS:
        found.append(f"{workers:,} workers are too many to simulate: use at most {_MOST_WORKERS:,}")
    elif workers >= 1:
        found += problem_of(lambda: _speeds(config))
    if config.steps >= 1 and (config.recipe == ALL or config.recipe.partition(":")[0] in recipes.RECIPES):
        for text in chosen(config):
            found += problem_of(partial(recipes.from_text, text, config.steps))
    return found


def _rates(config: PlanConfig) -> list[str]:
    return [config.rate] if config.rates is None else config.rates.split(",")


def _cluster(config: PlanConfig) -> Cluster:
    slowest = min(parse_rate(rate) for rate in _rates(config))
    return Cluster(config.nodes, NodeLink(slowest, parse_seconds(config.latency)), config.workers_per_node)


def _speeds(config: PlanConfig) -> Speeds:
    workers = config.nodes * config.workers_per_node
    return Speeds(workers, config.jitter, config.slow_share, config.slow_factor, config.seed)


def _setting(config: PlanConfig) -> Setting:
    shapes, measure_factors = shapes_for(config), None
    if config.step_time is not None:
        # Without a measurement, the forecast ignores the costs of averaging gradients, of factors and of merges.
        alone = WorkerSeconds(parse_seconds(config.step_time))
    else:
        assert config.task is not None
        optimizer: OptimizerName = "muon" if config.optimizer == "muon" else "adamw"
        bench = Bench(TASKS[config.task], config.data, config.batch_size, optimizer)
        decompositions = measure_decompositions(shapes(Factoring(FixedRank(1))))
        step, muon = bench.step()
        alone = WorkerSeconds(step, bench.averaging(), decompositions, merge=seconds_of_merge, muon=muon)
        if are_shared(shapes(None).hidden_numel, config.workers_a_group):
            alone = alone.shared_by(config.workers_a_group)
        measure_factors = bench.factors
    return Setting(
        shapes,
        config.compression,
        config.steps,
        alone,
        _cluster(config),
        config.workers_a_group,
        _speeds(config),
        config.algorithm,
        measure_factors,
    )


def _heading(config: PlanConfig, setting: Setting, console: Output) -> None:
    link, slowest = setting.cluster.link, "" if config.rates is None else " (the slowest link)"
    workers, source = config.workers_per_node, "measured here" if config.step_time is None else "by --step-time"
    if setting.alone.muon:
        source += f", {setting.alone.muon / setting.alone.step:.0%} of it by Muon"
    for line in (
        model_in_words(config, setting.shapes(None)),
        f"{setting.steps:,} steps of {_exactly(setting.alone.step)} ({source}), {compression_in_words(config)}",
        f"{config.nodes:,} nodes at {link.rate / 1e6:g} Mbit/s{slowest}, latency {1000 * link.latency:g} ms, "
        f"{config.algorithm} all-reduce",
        f"{workers} worker{'s' if workers > 1 else ''} on each node, groups of {config.workers_a_group}\n",
    ):
        console.print(line)


def _comparison(offers: list[Offer], ddp: Offer, unit: TimeUnit) -> Table:
    table = narrow_table()
    table.add_column("recipe")
    for heading in ("payload", "of ddp", "wire", unit.name, "computing", "x ddp bf16"):
        table.add_column(heading, justify="right", no_wrap=True)
    for offer in offers:
        expected = offer.forecast
        table.add_row(
            breakable(str(offer)),
            human_bytes(expected.payload),
            ratio_in_short(offer.ratio),
            human_bytes(expected.wire),
            unit.figure(expected.seconds),
            f"{expected.utilisation:.0%}",
            f"{ddp.forecast.seconds / expected.seconds:.1f}",
        )
    return table


def _by_phase(offer: Offer, unit: TimeUnit) -> Table:
    expected = offer.forecast
    table = narrow_table()
    table.add_column("phase", no_wrap=True)
    for heading in ("steps", "payload", "wire", "compute", "wait", "send", "factor", "total"):
        table.add_column(heading, justify="right", no_wrap=True)
    # The last row sums all phases.
    totals = [sum(column) for column in zip(*map(_figures, expected.phases), strict=True)]
    lines = [(part.phase, part.steps, _figures(part)) for part in expected.phases]
    for name, steps, (payload, wire, *seconds) in [*lines, ("all", offer.recipe.total_steps, totals)]:
        times = [unit.figure(part) for part in (*seconds, sum(seconds))]
        table.add_row(name, f"{steps:,}", human_bytes(payload), human_bytes(wire), *times)
    return table


def _figures(part: PhaseForecast) -> list[float]:
    return [part.payload, part.wire, part.compute, part.waiting, part.communication, part.decomposing]


def _exactly(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:,.2f} s"
