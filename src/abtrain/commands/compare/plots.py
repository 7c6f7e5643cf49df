"""Draws the figures of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from abtrain.commands.compare.contestants import REFERENCES
from abtrain.commands.compare.runs import ComparisonOutcome
from abtrain.commands.compare.summary import ComparisonRow, expected_utilisation, utilisations
from abtrain.commands.figures import COLOURS, Figure, legend_below, plain_numbers, save, wrapped
from abtrain.commands.lab.measure import WIRE_SHARE
from abtrain.commands.never_fatal import NeverFatal
from abtrain.commands.units import format_rate, human_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHADES = ("#123f5a", "#2f7ea8", "#8cc5e3", "#f0b46c", "#d55e00", "#7a3b69", "#9aa5b1", "#4b8b3b", "#e3d26f", "#e58fb1")


def draw_all(
    rows: Sequence[ComparisonRow], outcomes: Sequence[ComparisonOutcome], rate: int, folder: Path
) -> list[Figure]:
    """Draws all figures, and returns those that were drawn. If one fails, the error is logged and not raised.

    Args:
        rows: the rows of the table.
        outcomes: the outcomes of all runs at all link rates.
        rate: the link rate of the runs in the table, in bits per second.
        folder: the folder for the files.
    """
    colours = _colours([row.label for row in rows])
    here = [outcome for outcome in outcomes if outcome.rate == rate]

    def over_bytes(axes: Axes) -> None:
        axes.set_xlabel("MB sent by each host, counted at its interface")
        axes.set_xscale("log")
        plain_numbers(axes.xaxis, decades=True)
        _points(axes, rows, colours, lambda row: row.wire_bytes / 1e6)

    def over_seconds(axes: Axes) -> None:
        axes.set_xlabel(f"seconds of training at {format_rate(rate)}")
        axes.set_xlim(0, 1.2 * max(row.seconds for row in rows))
        _points(axes, rows, colours, lambda row: row.seconds)

    drawings: list[tuple[Figure, float, Callable[[Axes], None]]] = [
        (_WIRE, 4.0, over_bytes),
        (_SECONDS, 4.0, over_seconds),
        (_LOSS, 4.4, lambda axes: _curves(axes, here, colours)),
        (_PHASES, 1.7 + 0.34 * len(rows), lambda axes: _phases(axes, rows)),
        (_UTILISATION, 4.4, lambda axes: _utilisation(axes, rows, outcomes, colours, rate)),
    ]
    draws = NeverFatal()
    return [figure for figure, height, draw in drawings if draws(figure.file, save, folder / figure.file, height, draw)]


_WIRE = Figure(
    "accuracy-over-bytes.png",
    "Accuracy over wire bytes",
    "Up and to the left is better. Dots are means over seeds, bars one standard deviation. Bytes are on a logarithmic "
    "scale. They are counted at the hosts' interfaces and include the start-up. solo sends only its start-up.",
)
_SECONDS = Figure(
    "accuracy-over-seconds.png",
    "Accuracy over seconds",
    "Up and to the left is better. Seconds are those of the training loop. solo shows how fast training is without "
    "communication.",
)
_LOSS = Figure(
    "loss-over-seconds.png",
    "Training loss over seconds",
    "The loss on the batches of worker 0, for the first seed. Between merges it is the loss of that worker's group, "
    "not that of the average model.",
)
_PHASES = Figure(
    "bytes-by-phase.png",
    "Bytes by phase",
    "The share of each phase in the payload of a worker. The number on the right is the total payload.",
)
_UTILISATION = Figure(
    "utilisation-over-rate.png",
    "Utilisation over link rate",
    "The share of the time that is spent computing: seconds of solo over seconds of the recipe. Dots are measured. "
    "Lines are estimates: they start from the dot at the table's rate, and add the transfer time of the bytes on a "
    "slower link or subtract it on a faster one.",
)


def _colours(labels: Sequence[str]) -> dict[str, str]:
    """Returns a colour for each recipe. Reference recipes are grey."""
    greys = dict(zip(REFERENCES, ("#8a94a0", "#1f2933", "#616e7c"), strict=True))
    others = [label for label in labels if label not in greys]
    return greys | {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(others)}


def _score(row: ComparisonRow) -> tuple[float, float]:
    """Returns mean and standard deviation of the top-1 accuracy, or of the loss if the task has no accuracy."""
    if row.top1 is not None:
        return row.top1, row.top1_std or 0.0
    assert row.loss is not None
    return row.loss, row.loss_std or 0.0


def _points(
    axes: Axes, rows: Sequence[ComparisonRow], colours: Mapping[str, str], value: Callable[[ComparisonRow], float]
) -> None:
    shown = [row for row in rows if row.top1 is not None or row.loss is not None]
    for row in shown:
        mean, deviation = _score(row)
        axes.errorbar(value(row), mean, deviation, fmt="o", color=colours[row.label], capsize=3, label=row.label)
    axes.set_ylabel("validation loss in nats" if rows[0].top1 is None else "top-1 in %")
    axes.margins(x=0.18, y=0.2)
    if rows[0].top1 is None:
        axes.invert_yaxis()
    legend_below(axes)


def _curves(axes: Axes, outcomes: Sequence[ComparisonOutcome], colours: Mapping[str, str]) -> None:
    first = min(outcome.seed for outcome in outcomes)
    for outcome in outcomes:
        if outcome.seed == first and outcome.curve:
            seconds, losses = zip(*outcome.curve, strict=True)
            axes.plot(
                seconds, losses, color=colours[outcome.label], linestyle=_line(outcome.label), label=outcome.label
            )
    axes.set_yscale("log")
    plain_numbers(axes.yaxis)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("training loss")
    legend_below(axes)


def _phases(axes: Axes, rows: Sequence[ComparisonRow]) -> None:
    phases = list(dict.fromkeys(phase for row in rows for phase in row.payload_by_phase))
    places = range(len(rows), 0, -1)
    left = [0.0] * len(rows)
    for index, phase in enumerate(phases):
        shares = [100 * row.payload_by_phase.get(phase, 0) / max(row.payload, 1) for row in rows]
        axes.barh(places, shares, left=left, height=0.62, color=_SHADES[index % len(_SHADES)], label=phase)
        left = [start + share for start, share in zip(left, shares, strict=True)]
    axes.set_yticks(list(places), [wrapped(row.label) for row in rows], fontsize=9.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the payload in %")
    for place, row in zip(places, rows, strict=True):
        axes.text(102, place, human_bytes(row.payload), va="center")
    axes.legend(frameon=False, ncols=min(len(phases), 3), loc="lower right", bbox_to_anchor=(1.1, 1.0))


def _utilisation(
    axes: Axes,
    rows: Sequence[ComparisonRow],
    outcomes: Sequence[ComparisonOutcome],
    colours: Mapping[str, str],
    rate: int,
) -> None:
    measured = utilisations(outcomes)
    lowest, highest = min(rate, 5 * 10**6), max(rate, 10**10)
    grid = [lowest * (highest / lowest) ** (i / 120) for i in range(121)]
    for row in rows:
        colour = colours[row.label]
        line = [100 * expected_utilisation(row, rate, other, WIRE_SHARE) for other in grid]
        axes.plot(grid, line, color=colour, linestyle=_line(row.label), label=row.label)
        rates, values = zip(*measured[row.label], strict=True)
        axes.plot(rates, [100 * value for value in values], "o", color=colour, markersize=6)
    axes.set_xscale("log")
    ticks = [tick for tick in (5e6, 2e7, 1e8, 1e9, 1e10) if lowest <= tick <= highest]
    axes.set_xticks(ticks, [format_rate(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("rate of every link")
    axes.set_ylabel("utilisation in %")
    legend_below(axes)


def _line(label: str) -> str:
    """Returns the line style of a recipe: dotted for solo, dashed for ddp in bf16, solid for others."""
    return dict(zip(REFERENCES, (":", "-", "--"), strict=True)).get(label, "-")
