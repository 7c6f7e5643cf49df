"""The paper's own formulas: the estimated communication reduction (eq. 4) and scaled traffic (Table II). Pure."""

from __future__ import annotations

from dataclasses import dataclass

from abtrain.commands.paper.published import (
    AB,
    BACKWARD_SHARE,
    EPOCHS,
    GPUS,
    ITERATIONS_4K,
    PORT,
    SCHEDULES,
    TABLE1,
    VGG,
    PublishedMethod,
    PublishedSchedule,
)
from abtrain.recipes.paper import AB_SHARE, REBOUND_SHARE
from abtrain.recipes.shared import WARMUP_SHARE

NEAR_FULL, NEAR_COMPRESSED = 25.0, 75.0
"""F and L of methods that shrink step by step, in per cent: the paper's assumption (Section V)."""
CLOSE = 0.1
"""Points up to which a computed ECR counts as the paper's."""
_SIGMA_ONLY = ("OIALR", "DLRT")


def ecr(full: float, compressed: float, compression: float) -> float:
    """Estimated communication reduction in per cent, 100 - F - L c (eq. 4).

    Args:
        full: F, per cent of training near full rank.
        compressed: L, per cent of training near the final size in which something is sent.
        compression: 1 / c, full parameters over compressed ones.
    """
    return 100 - full - compressed / compression


def guideline_share() -> float:
    """Share of a run's steps in full-rank data parallel training by the paper's guideline (Section IV.C)."""
    cycle = AB_SHARE * (1 + REBOUND_SHARE)
    return WARMUP_SHARE + (1 - WARMUP_SHARE) * AB_SHARE * REBOUND_SHARE / cycle


def full_share(schedule: PublishedSchedule) -> float:
    """Share of a run's steps in full-rank data parallel training, the last cycle cut off where the steps are spent."""
    cycles, rest = divmod(schedule.total - schedule.warmup, schedule.cycle)
    group = schedule.cycle - schedule.rebound
    return (schedule.warmup + cycles * schedule.rebound + max(rest - group, 0)) / schedule.total


@dataclass(frozen=True)
class ECRRow:
    """One method of Table I.

    Attributes:
        method: with the paper's values.
        computed: by eq. 4; None where the paper does not give what it takes.
        remark: why the two differ, or what is assumed.
    """

    method: PublishedMethod
    computed: float | None
    remark: str = ""

    @property
    def difference(self) -> float | None:
        return None if self.computed is None else self.computed - self.method.ecr

    @property
    def reached(self) -> bool:
        return self.difference is not None and abs(self.difference) <= CLOSE


def ecr_rows() -> list[ECRRow]:
    """Eq. 4 for each row of Table I."""
    return [_ecr_row(method) for method in TABLE1]


def _ecr_row(method: PublishedMethod) -> ECRRow:
    if method.name == AB:
        return _ecr_of_ab(method)
    computed = ecr(NEAR_FULL, NEAR_COMPRESSED, method.compression)
    if method.name not in _SIGMA_ONLY:
        return ECRRow(method, computed)
    trained = (100 - NEAR_FULL - method.ecr) / NEAR_COMPRESSED
    said = f"trains the matrix Sigma alone; the paper's value takes c = {100 * trained:.1f} %, which it does not give"
    return ECRRow(method, computed, said)


def _ecr_of_ab(method: PublishedMethod) -> ECRRow:
    """Groups send nothing while they train alone, so that L is 0 and F, the schedule's, decides."""
    implied = f"the paper's value implies F = {100 - method.ecr:.1f} %"
    if method.model == VGG:
        return ECRRow(method, None, f"the run's length is not given; {implied}, the guideline's is {_guideline()}")
    computed = ecr(100 * full_share(SCHEDULES[method.model]), 0, method.compression)
    return ECRRow(method, computed, f"F from the authors' configuration; {implied}, the guideline's is {_guideline()}")


def _guideline() -> str:
    return f"{100 * guideline_share():.0f} %"


def iterations(nodes: int, epoch_batch: int = 4096 * ITERATIONS_4K, local_batch: int = 256) -> float:
    """Steps of an ImageNet epoch at a constant local batch, by the paper's numbers: 600 on two nodes, 300 on four."""
    return epoch_batch / (nodes * GPUS * local_batch)


def scaled_traffic(parameters: float, syncs_per_epoch: float, epoch_seconds: float, share: float = 1.0) -> float:
    """Scaled traffic of a node in GB/s, by the caption of Table II, not above what its port carries.

    Every GPU of a node hands over all parameters in float32 at every sync: without these four, no row of the table
    comes out.

    Args:
        parameters: of the full model.
        syncs_per_epoch: steps of an epoch.
        epoch_seconds: that an epoch takes.
        share: of DDP's bytes that is sent.
    """
    gigabytes = 4 * parameters / 1e9
    return min(share * GPUS * gigabytes * syncs_per_epoch / (BACKWARD_SHARE * epoch_seconds), PORT)


def epoch_seconds(minutes: float) -> float:
    """Seconds of an epoch of a run that took so many minutes."""
    return 60 * minutes / EPOCHS
