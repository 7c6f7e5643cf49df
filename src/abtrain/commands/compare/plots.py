"""The figures of a comparison, as PNG files. What is to be read off is written beside the marks, not in a legend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abtrain.commands.compare.contestants import REFERENCES
from abtrain.commands.compare.runs import ComparisonOutcome
from abtrain.commands.compare.summary import ComparisonRow, expected_utilisation, utilisations
from abtrain.commands.lab.measure import WIRE_SHARE
from abtrain.commands.train.never_fatal import Aside
from abtrain.commands.units import format_rate
from abtrain.commands.units import human_bytes as size_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

_INK, _GREY = "#1f2933", "#8a94a0"
# Told apart by people who see colours differently, too (Okabe and Ito).
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6a3d9a", "#7f4f24")
_SHADES = ("#123f5a", "#2f7ea8", "#8cc5e3", "#f0b46c", "#d55e00", "#7a3b69", "#9aa5b1", "#4b8b3b", "#e3d26f", "#e58fb1")
_STYLE: Any = {
    "figure.dpi": 200,
    "font.size": 11,
    "font.family": "DejaVu Sans",
    "text.color": _INK,
    "axes.edgecolor": "#c3cad1",
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e9edf0",
    "xtick.color": _INK,
    "ytick.color": _INK,
}


@dataclass(frozen=True)
class Figure:
    """One figure of the report.

    Attributes:
        file: its name, in the comparison's folder.
        title: what it is about.
        caption: what is to be seen, and how it was made.
    """

    file: str
    title: str
    caption: str


def draw_all(
    rows: Sequence[ComparisonRow], outcomes: Sequence[ComparisonOutcome], rate: int, folder: Path
) -> list[Figure]:
    """Draws all figures, and returns those that could be: the numbers are not to be lost over a picture.

    Args:
        rows: of the table.
        outcomes: of all runs, at all rates.
        rate: bits per second of the table's runs.
        folder: that gets the files.
    """
    colours = _colours([row.label for row in rows])
    here = [outcome for outcome in outcomes if outcome.rate == rate]

    def over_bytes(axes: Axes) -> None:
        axes.set_xlabel("MB sent by each host, at its interface")
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
    aside = Aside()
    return [figure for figure, height, draw in drawings if aside(figure.file, save, folder / figure.file, height, draw)]


_WIRE = Figure(
    "accuracy-over-bytes.png",
    "Accuracy over wire bytes",
    "Up and to the left is better. Dots are means over seeds, bars one standard deviation; bytes are on a logarithmic "
    "scale, counted at the hosts' interfaces, start-up included. solo sends nothing but its start-up.",
)
_SECONDS = Figure(
    "accuracy-over-seconds.png",
    "Accuracy over seconds",
    "Up and to the left is better. Seconds are those of the training loop; solo is how fast it could be without any "
    "communication.",
)
_LOSS = Figure(
    "loss-over-seconds.png",
    "Training loss over seconds",
    "Worker 0 of the first seed; of recipes with groups it is the loss of that worker's own group, not of the average.",
)
_PHASES = Figure(
    "bytes-by-phase.png",
    "Bytes by phase",
    "What share of a worker's payload each phase of the recipe takes; the number on the right is all of it.",
)
_UTILISATION = Figure(
    "utilisation-over-rate.png",
    "Utilisation over link rate",
    "Share of the time that is not spent on others: seconds of solo over the recipe's own. Dots are measured; lines "
    "reckon from the dot at the table's rate, by the time that the bytes take on the link.",
)


def save(path: Path, height: float, draw: Callable[[Axes], None]) -> None:
    """Draws one figure into a PNG file, `height` inches high."""
    # A figure of its own, without pyplot: that would keep it, and want a display.
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    with rc_context(_STYLE):
        canvas = Canvas(figsize=(5.8, height), layout="constrained")
        draw(canvas.add_subplot())
        FigureCanvasAgg(canvas).print_png(str(path))


def _colours(labels: Sequence[str]) -> dict[str, str]:
    """A colour for each contestant; the references are grey, as they are there to be compared with."""
    greys = dict(zip(REFERENCES, ("#8a94a0", "#1f2933", "#616e7c"), strict=True))
    others = [label for label in labels if label not in greys]
    return greys | {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(others)}


def _score(row: ComparisonRow) -> tuple[float, float]:
    """Mean and deviation of what says how good a contestant is."""
    if row.top1 is not None:
        return row.top1, row.top1_std or 0.0
    return row.loss, row.loss_std or 0.0


def _points(
    axes: Axes, rows: Sequence[ComparisonRow], colours: Mapping[str, str], value: Callable[[ComparisonRow], float]
) -> None:
    for row in rows:
        mean, deviation = _score(row)
        axes.errorbar(value(row), mean, deviation, fmt="o", color=colours[row.label], capsize=3, markersize=7)
    axes.set_ylabel("validation loss in nats" if rows[0].top1 is None else "top-1 in %")
    axes.margins(x=0.18, y=0.2)
    if rows[0].top1 is None:
        axes.invert_yaxis()
    _name_points(axes, [(row.label, value(row), _score(row)[0]) for row in rows], colours)


def _name_points(axes: Axes, points: Sequence[tuple[str, float, float]], colours: Mapping[str, str]) -> None:
    """Writes names beside points, each on the side and at the height where it is least in the way of others."""
    axes.get_xlim(), axes.get_ylim()  # settles the scales, which the places of names depend on
    placed: list[tuple[float, float]] = []
    dots = [tuple(axes.transData.transform((x, y))) for _, x, y in points]
    for label, x, y in sorted(points, key=lambda point: -point[2]):
        at = axes.transData.transform((x, y))
        offsets = [(0, 9), (0, -15), (0, 21), (0, -27), (0, 33), (0, -39)]
        across, up = max(
            offsets, key=lambda offset: (_room((at[0], at[1] + 2.8 * offset[1]), placed, dots), -abs(offset[1]))
        )
        placed.append((at[0], at[1] + 2.8 * up))
        axes.annotate(
            label, (x, y), (across, up), textcoords="offset points", ha="center", color=colours[label], fontsize=9.5
        )


def _room(
    place: tuple[float, float], placed: Sequence[tuple[float, float]], dots: Sequence[tuple[float, float]]
) -> bool:
    """Whether a name here would stand clear of those that are there, and of the points; in pixels."""
    middle = place[1] + 13
    off_names = all(abs(place[0] - x) > 190 or abs(place[1] - y) > 28 for x, y in placed)
    return off_names and all(abs(place[0] - x) > 110 or abs(middle - y) > 24 for x, y in dots)


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
    axes.set_yticks(list(places), [row.label for row in rows])
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the payload in %")
    for place, row in zip(places, rows, strict=True):
        axes.text(102, place, size_text(row.payload), va="center")
    axes.legend(frameon=False, ncols=min(len(phases), 4), loc="lower left", bbox_to_anchor=(-0.02, 1.0), fontsize=9.5)


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
    """The references are told apart by their dashes."""
    return dict(zip(REFERENCES, (":", "-", "--"), strict=True)).get(label, "-")


def legend_below(axes: Axes) -> None:
    """The legend, under the axes."""
    # Beside the axes it would leave them little room on a phone.
    axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.46, -0.16), fontsize=9.5)


def plain_numbers(axis: Axis, decades: bool = False) -> None:
    """Ticks of a logarithmic axis, as people write numbers: 1, 2, 5, 10; only 1, 10, 100 where it spans decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0,) if decades else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())
