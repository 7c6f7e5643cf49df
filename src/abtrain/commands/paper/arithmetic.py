"""Evaluates the paper's formulas: the estimated communication reduction (equation 4) and scaled traffic (Table II)."""

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
"""F and L in percent (see `ecr`), as the paper assumes them for methods that shrink the model gradually (Section V)."""
CLOSE = 0.1
"""The largest difference in percentage points at which a computed ECR counts as equal to the paper's."""
_SIGMA_ONLY = ("OIALR", "DLRT")


def ecr(full: float, compressed: float, compression: float) -> float:
    """Returns the estimated communication reduction in percent, 100 - F - L c (eq. 4).

    Args:
        full: F, the percentage of training near full rank.
        compressed: L, the percentage of training near the final size in which workers communicate.
        compression: 1 / c, the parameters of the full model divided by those of the compressed model.
    """
    return 100 - full - compressed / compression


def guideline_share() -> float:
    """Returns the share of full-rank data parallel steps in a run that follows the paper's guideline (Section IV.C)."""
    cycle = AB_SHARE * (1 + REBOUND_SHARE)
    return WARMUP_SHARE + (1 - WARMUP_SHARE) * AB_SHARE * REBOUND_SHARE / cycle


def full_share(schedule: PublishedSchedule) -> float:
    """Returns the share of a run's steps that are data parallel at full rank. The run may end within a cycle."""
    cycles, rest = divmod(schedule.total - schedule.warmup, schedule.cycle)
    group = schedule.cycle - schedule.rebound
    return (schedule.warmup + cycles * schedule.rebound + max(rest - group, 0)) / schedule.total


@dataclass(frozen=True)
class ECRRow:
    """The estimated communication reduction (ECR) of one method of Table I.

    Attributes:
        method: the method with the paper's values.
        computed: the ECR in percent by eq. 4; None if the paper does not give the inputs.
        remark: the reason why the value differs from the paper's, or the assumptions of the computation.
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
    """Returns the value of eq. 4 for each row of Table I."""
    return [_ecr_row(method) for method in TABLE1]


def _ecr_row(method: PublishedMethod) -> ECRRow:
    if method.name == AB:
        return _ecr_of_ab(method)
    computed = ecr(NEAR_FULL, NEAR_COMPRESSED, method.compression)
    if method.name not in _SIGMA_ONLY:
        return ECRRow(method, computed)
    trained = (100 - NEAR_FULL - method.ecr) / NEAR_COMPRESSED
    remark = f"trains only the matrix Sigma; the paper gives no c, but its value implies c = {100 * trained:.1f} %"
    return ECRRow(method, computed, remark)


def _ecr_of_ab(method: PublishedMethod) -> ECRRow:
    """Returns the value of eq. 4 for AB. L is 0: groups send nothing to each other while they train separately."""
    implied = f"the paper's value implies F = {100 - method.ecr:.1f} %"
    if method.model == VGG:
        return ECRRow(method, None, f"the run's length is not given; {implied}, the guideline's is {_guideline()}")
    computed = ecr(100 * full_share(SCHEDULES[method.model]), 0, method.compression)
    return ECRRow(method, computed, f"F from the authors' configuration; {implied}, the guideline's is {_guideline()}")


def _guideline() -> str:
    return f"{100 * guideline_share():.0f} %"


def iterations(nodes: int, epoch_batch: int = 4096 * ITERATIONS_4K, local_batch: int = 256) -> float:
    """Returns the number of steps in an ImageNet epoch at a constant local batch: 600 with two nodes, 300 with four."""
    return epoch_batch / (nodes * GPUS * local_batch)


def scaled_traffic(parameters: float, syncs_per_epoch: float, epoch_seconds: float, share: float = 1.0) -> float:
    """Returns the scaled traffic of a node in GB/s by the formula in the caption of Table II.

    The rate of a node's port limits the result. All four GPUs of a node send all parameters in float32 at every sync.
    The caption does not state this, but without the factor of four no row of the table can be reproduced.

    Args:
        parameters: the number of parameters of the full model.
        syncs_per_epoch: the number of gradient syncs in an epoch, which is the number of steps.
        epoch_seconds: the seconds of an epoch.
        share: the bytes sent divided by those of DDP.
    """
    gigabytes = 4 * parameters / 1e9
    return min(share * GPUS * gigabytes * syncs_per_epoch / (BACKWARD_SHARE * epoch_seconds), PORT)


def epoch_seconds(minutes: float) -> float:
    """Returns the seconds that one epoch takes in a run of this many minutes."""
    return 60 * minutes / EPOCHS
