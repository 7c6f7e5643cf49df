"""Computes the rows of a comparison's table: means over seeds, and ratios to the reference recipes."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from abtrain.commands.compare.contestants import DDP, DDP_BF16, SOLO
from abtrain.commands.compare.runs import ComparisonOutcome


@dataclass(frozen=True)
class ComparisonRow:
    """The means over the seeds of one recipe, at the link rate of the comparison.

    Attributes:
        label: the recipe with its options as a string.
        seeds: the number of runs.
        top1, top1_std: the top-1 accuracy in percent and its standard deviation; None if the task has no accuracy. The
            deviation is also None for a single seed.
        loss, loss_std: the validation loss in nats and its standard deviation, which is None for a single seed. Both
            are None if the loss of a run is NaN or infinite.
        wire_bytes: the bytes that each host sent, start-up included.
        wire_ratio: `wire_bytes` divided by those of ddp in fp32.
        seconds: the seconds of the training loop.
        sync_seconds: the part of `seconds` in which worker 0 waited for other workers.
        seconds_ratio: the seconds divided by those of ddp in bf16.
        utilisation: the share of time spent computing: the seconds of `solo`, which trains without communication,
            divided by `seconds`.
        compression: the parameters of the full model divided by those of the factored model.
        payload: the bytes that a worker passes to collectives.
        ring_bytes: the bytes that a worker would send in a ring all-reduce of the payload.
        start_bytes: the bytes that a host sent with `solo`: start-up data, and a comparison of initial weights.
        payload_by_phase: the payload in bytes of each phase of the recipe.
    """

    label: str
    seeds: int
    top1: float | None
    top1_std: float | None
    loss: float | None
    loss_std: float | None
    wire_bytes: float
    wire_ratio: float
    seconds: float
    sync_seconds: float
    seconds_ratio: float
    utilisation: float
    compression: float
    payload: float
    ring_bytes: float
    start_bytes: float
    payload_by_phase: dict[str, float]


def rows(outcomes: Sequence[ComparisonOutcome], workers: int) -> list[ComparisonRow]:
    """Returns one row for each recipe, in the order in which the recipes first appear in `outcomes`.

    Args:
        outcomes: the outcomes of runs at one link rate. They include runs of the reference recipes.
        workers: the number of workers in each run.
    """
    by_label: dict[str, list[ComparisonOutcome]] = {}
    for outcome in outcomes:
        by_label.setdefault(outcome.label, []).append(outcome)
    wire = {label: _mean(run.wire_bytes for run in runs) for label, runs in by_label.items()}
    seconds = {label: _mean(run.seconds for run in runs) for label, runs in by_label.items()}
    found = []
    for label, runs in by_label.items():
        top1 = [run.top1 for run in runs if run.top1 is not None]
        losses = [run.loss for run in runs if run.loss is not None]
        if len(losses) < len(runs):
            losses = []
        payload = _mean(run.payload for run in runs)
        found.append(
            ComparisonRow(
                label=label,
                seeds=len(runs),
                top1=_mean(top1) if top1 else None,
                top1_std=_deviation(top1),
                loss=_mean(losses) if losses else None,
                loss_std=_deviation(losses),
                wire_bytes=wire[label],
                wire_ratio=wire[label] / wire[DDP],
                seconds=seconds[label],
                sync_seconds=_mean(run.sync_seconds for run in runs),
                seconds_ratio=seconds[label] / seconds[DDP_BF16],
                utilisation=seconds[SOLO] / seconds[label],
                compression=_mean(run.compression for run in runs),
                payload=payload,
                ring_bytes=2 * (workers - 1) / workers * payload,
                start_bytes=wire[SOLO],
                payload_by_phase=_mean_by_phase(runs),
            )
        )
    return found


def utilisations(outcomes: Sequence[ComparisonOutcome]) -> dict[str, list[tuple[int, float]]]:
    """Returns pairs (link rate in bits per second, utilisation) for each recipe, beginning with the slowest link."""
    found: dict[str, list[tuple[int, float]]] = {}
    for rate in sorted({outcome.rate for outcome in outcomes}):
        here = [outcome for outcome in outcomes if outcome.rate == rate]
        solo = _mean(outcome.seconds for outcome in here if outcome.label == SOLO)
        for label in dict.fromkeys(outcome.label for outcome in here):
            own = _mean(outcome.seconds for outcome in here if outcome.label == label)
            found.setdefault(label, []).append((rate, solo / own))
    return found


def expected_utilisation(row: ComparisonRow, measured_rate: int, rate: float, wire_share: float) -> float:
    """Predicts the utilisation of a recipe at another link rate.

    On a slower link, the measured seconds grow by the additional transfer time of the recipe's bytes. On a faster link,
    the seconds shrink by the saved transfer time. They shrink at most by the time that a worker waited, because all
    other transfers overlap with computation.

    Args:
        row: the measured results of the recipe.
        measured_rate: the link rate at which the row was measured, in bits per second.
        rate: the other link rate, in bits per second.
        wire_share: the TCP payload divided by the bytes that a link's shaper counts, headers included.
    """
    on_link = 8 * row.wire_bytes / wire_share / measured_rate
    slower = measured_rate / rate
    more = (slower - 1) * (on_link if slower > 1 else min(row.sync_seconds, on_link))
    return min(1.0, row.utilisation * row.seconds / (row.seconds + more))


def _mean_by_phase(runs: Sequence[ComparisonOutcome]) -> dict[str, float]:
    phases = dict.fromkeys(phase for run in runs for phase in run.payload_by_phase)
    return {phase: _mean(run.payload_by_phase.get(phase, 0) for run in runs) for phase in phases}


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def _deviation(values: Sequence[float]) -> float | None:
    """Returns the sample standard deviation, or None for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None
