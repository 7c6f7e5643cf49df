"""Shows the progress of a run as a bar on a terminal and as lines elsewhere, and a table of results at its end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from abtrain.commands.output import Output
from abtrain.commands.train.config import TrainConfig, group_size_of
from abtrain.commands.units import human_bytes

_PHASE_WIDTH = 8
_LEAST_BAR = 10
_REMAINING_WIDTH = len("0:00:00")


class Display:
    """Shows the progress of a run. Use it as a context manager.

    Args:
        steps: the total number of steps of the run.
        console: the console to write to; by default standard output.
    """

    def __init__(self, steps: int, console: Output | None = None) -> None:
        self.console = console or Output()
        self._steps = steps
        self._bar = Progress(
            TextColumn(f"{{task.description:>{_PHASE_WIDTH}}}"),
            BarColumn(bar_width=None),  # takes what the other columns leave
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=steps, figures="")

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def heading(self, config: TrainConfig, parameters: int) -> None:
        """Prints the task, the recipe and the size of the run."""
        groups = config.workers // group_size_of(config)
        self.console.plain(f"{config.recipe} on {config.task}, {parameters:,} parameters, {config.device}")
        self.console.plain(
            f"{config.steps:,} steps of {config.workers} x {config.batch_size} samples, "
            f"{_counted(config.workers, 'worker')} in {_counted(groups, 'group')}"
        )

    def show(self, record: Mapping[str, Any], merges: Sequence[Mapping[str, Any]] = ()) -> None:
        """Shows the metrics of a logged step and of the merges before it, as many as fit into one line."""
        step, phase, width = record["step"], record["phase"], self.console.width
        if self.console.is_terminal:
            counter = f"{self._steps}/{self._steps}"
            others = max(len(phase), _PHASE_WIDTH), _LEAST_BAR, len(counter), _REMAINING_WIDTH
            figures = _fitting(_figures(record, merges), width - sum(others) - len(others))
            self._bar.update(self._task, completed=step, description=phase, figures=figures)
        else:
            start = f"step {step:>5}/{self._steps}  {phase:<{_PHASE_WIDTH}} "
            self.console.plain(start + _fitting(_figures(record, merges), width - len(start)))

    def validated(self, step: int, quality: Mapping[str, Any], is_best: bool) -> None:
        """Prints the metrics of a validation."""
        top1 = "" if quality["top1"] is None else f"top-1 {quality['top1']:.2f} %, "
        best = " (best)" if is_best else ""
        self.console.plain(f"step {step:>5}/{self._steps}  validation: {top1}loss {quality['loss']:.4f}{best}")

    def summary(self, result: Mapping[str, Any], folder: Path) -> None:
        """Prints the table of results at the end of a run."""
        seconds, payload = result["seconds"], result["payload_bytes"]
        parts = ", ".join(f"{name} {seconds[name]:.1f}" for name in ("compute", "sync", "svd"))
        table = Table(title=f"{result['recipe']} on {result['task']}, seed {result['seed']}", show_header=False)
        table.add_column()
        table.add_column(overflow="fold")  # a shortened path would be useless
        if result["top1"] is not None:
            table.add_row("top-1", f"{result['top1']:.2f} %")
        table.add_row("validation loss", f"{result['loss']:.4f}")
        table.add_row("sent per worker", human_bytes(payload["total"]))
        if result["group_size"] > 1 and payload["between_groups"]:
            table.add_row("sent to other groups", f"{human_bytes(sum(payload['of_group'].values()))} per group")
        table.add_row("relative to DDP", f"{100 * result['payload_ratio']:.1f} %")
        table.add_row("compression", f"{result['compression']:.2f} : 1")
        table.add_row("seconds", f"{seconds['total']:.1f} ({parts})")
        table.add_row("weights digest", result["weights_digest"][:16])
        table.add_row("run folder", str(folder))
        self.console.print(table)


def _figures(record: Mapping[str, Any], merges: Sequence[Mapping[str, Any]]) -> list[str]:
    """Formats the metrics of a logged step, and of the merges before it, with the most important first."""
    loss = f"loss {record['loss']:.4f}"
    known = [merge for merge in merges if merge["loss_mean"] is not None]
    if known:
        mean = math.fsum(merge["loss_mean"] for merge in known) / len(known)
        loss = f"loss {mean:.4f} (max {max(merge['loss_max'] for merge in known):.4f})"
    figures = [
        loss,
        f"lr {record['lr']:.2e}",
        f"{human_bytes(record['payload_bytes'])} sent",
        f"{record['samples_per_second']:,.0f} samples/s",
        f"grad {record['grad_norm']:.3g}",
    ]
    if merges:
        seconds, waited = (sum(merge[name] for merge in merges) for name in ("seconds", "wait_seconds"))
        workers = _counted(len(merges[-1]["ranks"]), "worker")
        figures.append(f"{_counted(len(merges), 'merge')} of {workers}: {seconds:.2f} s, {waited:.2f} s waiting")
    return figures


def _fitting(figures: Sequence[str], width: int) -> str:
    """Joins the first of `figures`: as many as fit into `width` characters, but at least one."""
    count = len(figures)
    while count > 1 and len("  ".join(figures[:count])) > width:
        count -= 1
    return "  ".join(figures[:count])


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
