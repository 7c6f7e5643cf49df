"""`abtrain plan`: predicts bytes and seconds of recipes on given links, and recommends a recipe."""

from __future__ import annotations

from functools import partial

from rich import box
from rich.console import Console
from rich.table import Table

from abtrain import recipes
from abtrain.comm.topology import topology_problems
from abtrain.commands.plan.advice import RARE, Offer, Setting, recommend
from abtrain.commands.plan.bench import Bench, measure_decompositions
from abtrain.commands.plan.collectives import ALL_REDUCES, Cluster, NodeLink
from abtrain.commands.plan.forecast import PhaseForecast, WorkerSeconds
from abtrain.commands.plan.recipes_command import ratio_in_short, ratio_in_words
from abtrain.commands.plan.settings import (
    ALL,
    PlanConfig,
    chosen,
    model_in_words,
    model_problems,
    problem_of,
    shapes_for,
)
from abtrain.commands.plan.shapes import ranks_for
from abtrain.commands.plan.stragglers import Speeds
from abtrain.commands.tasks.task import TASKS
from abtrain.commands.units import human_bytes, parse_all, parse_rate, parse_seconds
from abtrain.errors import ConfigurationError, nearest
from abtrain.recipes.factoring import Factoring
from abtrain.recipes.numbers import whole_number_problems
from abtrain.recipes.rank_rules import FixedRank

_MOST_WORKERS = 10**6


def plan(config: PlanConfig, console: Console | None = None) -> None:
    """Prints the forecasts of recipes and the recommended recipe.

    Raises:
        ConfigurationError: lists everything that is wrong with the settings.
        DataError: the data of the task is not available, and the measurement of a step needs it.
    """
    problems = _problems(config)
    if problems:
        raise ConfigurationError(problems)
    console = console or Console()
    setting = _setting(config)
    _heading(config, setting, console)
    if config.recipe == ALL:
        ddp = setting.offer("ddp", wire="bf16")
        offers = [setting.offer(name) for name in chosen(config)]
        console.print(_comparison([ddp, *offers], ddp))
        advice = recommend(setting)
    else:
        name, options = recipes.parse(config.recipe)
        console.print(_by_phase(setting.offer(name, **options)))
        advice = recommend(setting, [name] if "every" in recipes.options_of(name) else RARE)
    console.print(f"Recommended: {advice}", highlight=False)
    console.print(
        "Bytes and seconds are forecasts. They assume that a step takes the same time in every recipe, except for the "
        "cost of factors and of averaging gradients if a step was measured. The accuracy of a recipe is not predicted: "
        "training differs more from data parallel training with rarer, narrower and hidden merges.",
        highlight=False,
    )


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
        found.append("the time of a step is not known: give --step-time, such as 80ms, or a --task, which is measured")
    if config.rates is not None and len(_rates(config)) != config.nodes:
        found.append(f"--rates has {len(_rates(config))} links for {config.nodes} nodes: give one for each node")
    # These checks need valid settings.
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
        # The costs of averaging and of factors are unknown there, and neglected.
        alone = WorkerSeconds(parse_seconds(config.step_time))
    else:
        assert config.task is not None
        bench = Bench(TASKS[config.task], config.data, config.batch_size)
        decompositions = measure_decompositions(shapes(Factoring(FixedRank(1))))
        alone, measure_factors = WorkerSeconds(bench.step(), bench.averaging(), decompositions), bench.factors
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


def _heading(config: PlanConfig, setting: Setting, console: Console) -> None:
    link, slowest = setting.cluster.link, "" if config.rates is None else " (the slowest link)"
    source = "measured here" if config.step_time is None else "by --step-time"
    for line in (
        f"{model_in_words(config, setting.shapes(None))}; {setting.steps:,} steps of "
        f"{_exactly(setting.alone.step)} ({source})",
        f"{config.nodes:,} nodes, workers on each: {config.workers_per_node}, groups of {config.workers_a_group}, "
        f"{link.rate / 1e6:g} Mbit/s{slowest}, latency {1000 * link.latency:g} ms, all-reduce by {config.algorithm}",
    ):
        console.print(line, highlight=False)


def _narrow_table(title: str | None = None) -> Table:
    """Returns a table with little padding. Its first column needs a minimum width, or other columns squeeze it out."""
    return Table(box=box.SIMPLE_HEAD, title=title, show_edge=False, pad_edge=False, collapse_padding=True)


def _comparison(offers: list[Offer], ddp: Offer) -> Table:
    table = _narrow_table()
    table.add_column("recipe", overflow="fold", min_width=max(map(len, recipes.RECIPES)) + 1)
    for heading in ("payload", "of ddp", "wire", "time", "computing", "x ddp bf16"):
        table.add_column(heading, justify="right", no_wrap=True)
    for offer in offers:
        expected = offer.forecast
        table.add_row(
            str(offer),
            human_bytes(expected.payload),
            ratio_in_short(offer.ratio),
            human_bytes(expected.wire),
            duration(expected.seconds),
            f"{expected.utilisation:.0%}",
            f"{ddp.forecast.seconds / expected.seconds:.1f}",
        )
    return table


def _by_phase(offer: Offer) -> Table:
    expected = offer.forecast
    table = _narrow_table(title=f"{offer}: {ratio_in_words(offer.ratio)} of ddp's payload")
    table.add_column("phase", min_width=max(len(part.phase) for part in expected.phases) + 1)
    for heading in ("steps", "payload", "wire", "compute", "wait", "send", "factor", "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    # The last line is the whole run.
    totals = [sum(column) for column in zip(*map(_figures, expected.phases), strict=True)]
    lines = [(part.phase, part.steps, _figures(part)) for part in expected.phases]
    for name, steps, (payload, wire, *seconds) in [*lines, ("all", offer.recipe.total_steps, totals)]:
        times = [duration(part) for part in (*seconds, sum(seconds))]
        table.add_row(name, f"{steps:,}", human_bytes(payload), human_bytes(wire), *times)
    return table


def _figures(part: PhaseForecast) -> list[float]:
    return [part.payload, part.wire, part.compute, part.waiting, part.communication, part.decomposing]


def _exactly(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:,.2f} s"


def duration(seconds: float) -> str:
    """Formats a time in days, hours, minutes or seconds."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.2f} s" if seconds else "0 s"
