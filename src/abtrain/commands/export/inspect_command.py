"""`abtrain inspect`: prints tables that show what factors save, and plots their singular values."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from abtrain.commands.export.export import new_file_problems
from abtrain.commands.export.finished import find_run
from abtrain.commands.export.inspection import Gains, InspectedWeight, gains, inspect_file
from abtrain.commands.export.settings import InspectConfig
from abtrain.commands.export.why_dense import why_dense
from abtrain.commands.figures import COLOURS, legend_below, save
from abtrain.commands.output import Output, narrow_table
from abtrain.commands.train.folder_content import model_files
from abtrain.errors import ConfigurationError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def inspect_model(config: InspectConfig) -> None:
    """Runs `abtrain inspect`.

    Raises:
        ConfigurationError: the folder contains no run or no model, or the plot cannot be drawn or written.
        CheckpointError: the model file does not exist or cannot be read.
        DataError: the task's data is missing.
    """
    problems = [] if config.plot is None else _plot_problems(config.plot)
    if problems:
        raise ConfigurationError(problems)
    run = find_run(config.model, config.best) if config.model.is_dir() else None
    file = config.model if run is None else run.folder / model_files(run.name)["factored"]
    weights = inspect_file(file)
    console = Output()
    show_weights(weights, console)
    if not any(weight.rank for weight in weights):
        console.print(f"no weight is factored: {why_dense(file, run)}")
    if run is not None:
        show_gains(gains(run, config.data), console)
    if config.plot is not None:
        try:
            _plot([weight for weight in weights if weight.rank], config.plot)
        except OSError as error:
            raise ConfigurationError(f"--plot {config.plot} cannot be written: {error}. Name another file") from error
        console.plain(f"written to {config.plot}")


def _plot_problems(path: Path) -> list[str]:
    problems = new_file_problems("--plot", path)
    if importlib.util.find_spec("matplotlib") is None:
        problems.append("--plot needs matplotlib: pip install 'abtrain[report]'")
    return problems


def show_weights(weights: Sequence[InspectedWeight], console: Output) -> None:
    """Prints a table of the weights."""
    table = narrow_table()
    table.add_column("weight", overflow="fold")
    for name in ("matrix", "rank", "99 %", "parameters", "saved"):
        table.add_column(name, justify="right", no_wrap=True)
    for weight in weights:
        rank, needed = (str(weight.rank), str(weight.needed)) if weight.rank else ("dense", "")
        saved = f"{1 - weight.parameters / (weight.m * weight.n):.0%}" if weight.rank else ""
        table.add_row(weight.name, f"{weight.m} x {weight.n}", rank, needed, f"{weight.parameters:,}", saved)
    before, after = sum(w.m * w.n for w in weights), sum(w.parameters for w in weights)
    table.add_section()
    table.add_row("all matrices", "", "", "", f"{after:,}", f"{1 - after / before:.0%}" if before else "")
    console.print(table)
    console.print("\n99 %: the number of largest singular values with 99 % of the sum of squares")


def show_gains(found: Gains, console: Output) -> None:
    """Prints a table that compares the dense and the factored model."""
    table = narrow_table()
    for name in ("", "dense", "factored", "ratio"):
        table.add_column(name, justify="right" if name else "left")
    before, after = found.parameters
    table.add_row("parameters", f"{before:,}", f"{after:,}", f"{after / before:.2f}")
    before_flops, after_flops = found.flops
    table.add_row(
        "MFLOPs a sample", f"{before_flops / 1e6:.2f}", f"{after_flops / 1e6:.2f}", f"{after_flops / before_flops:.2f}"
    )
    if found.top1[0] is not None and found.top1[1] is not None:
        table.add_row("top-1", f"{found.top1[0]:.2f} %", f"{found.top1[1]:.2f} %", "")
    table.add_row("validation loss", *(f"{loss:.4f}" for loss in found.loss), "")
    for size, (dense, factored) in found.latency.items():
        table.add_row(f"ms at batch {size}", f"{dense:.3f}", f"{factored:.3f}", f"{found.ratio[size]:.2f}")
    console.print()
    console.print(table)
    console.print(
        f"\none thread; outputs of the factored model are within {found.difference:.0e} of those of the trained model"
    )


def _plot(weights: Sequence[InspectedWeight], path: Path) -> None:
    def draw(axes: Axes) -> None:
        for i, weight in enumerate(weights):
            shares = [value / weight.singular_values[0] for value in weight.singular_values]
            axes.plot(range(1, weight.rank + 1), shares, color=COLOURS[i % len(COLOURS)], label=weight.name)
        axes.set(xlabel="singular value", ylabel="share of the largest", ylim=(0, 1.05))
        if weights:
            legend_below(axes)

    save(path, 4.2, draw)
