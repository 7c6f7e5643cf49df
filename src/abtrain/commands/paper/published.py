"""Lists the numbers that the paper reports: Tables I and II of arXiv 2405.01067, and the inputs of its formulas."""

from __future__ import annotations

from typing import NamedTuple

AB, NO_GROUPS, DDP = "AB", "AB - No Groups", "Traditional DDP"
VIT, RESNET, VGG = "ViT B/16", "ResNet-50", "VGG16"


class PublishedMethod(NamedTuple):
    """A row of Table I.

    Attributes:
        model: the model, RESNET (on ImageNet-2012) or VGG (on CIFAR-10).
        name: the name of the method.
        difference: the top-1 accuracy minus that of the full-rank model of the same study, in percentage points.
        compression: the parameters of the full model divided by those of the compressed model.
        ecr: the estimated communication reduction in percent.
    """

    model: str
    name: str
    difference: float
    compression: float
    ecr: float


TABLE1 = (
    PublishedMethod(RESNET, AB, 1.55, 1.39, 73.29),
    PublishedMethod(RESNET, NO_GROUPS, -0.02, 1.27, 15.94),
    PublishedMethod(RESNET, "OIALR", -1.72, 1.21, 63.64),
    PublishedMethod(RESNET, "DLRT", -0.56, 1.85, 64.35),
    PublishedMethod(RESNET, "PP-1", -0.20, 2.26, 41.81),
    PublishedMethod(RESNET, "CP", -1.40, 2.00, 37.5),
    PublishedMethod(RESNET, "SFP", -0.20, 2.39, 43.62),
    PublishedMethod(RESNET, "ThiNet", -1.50, 2.71, 47.32),
    PublishedMethod(RESNET, "ABCPrune", -2.15, 1.84, 34.24),
    PublishedMethod(VGG, AB, -0.23, 44.14, 65.60),
    PublishedMethod(VGG, NO_GROUPS, -0.89, 36.63, 72.95),
    PublishedMethod(VGG, "OIALR", 0.10, 3.70, 64.59),
    PublishedMethod(VGG, "DLRT", -1.89, 1.79, 16.88),
    PublishedMethod(VGG, "ABCPrune", 0.06, 8.83, 66.51),
    PublishedMethod(VGG, "ICP", -0.31, 27.25, 72.25),
)


class Value(NamedTuple):
    """A quantity's mean and standard deviation, over the paper's three runs or over the seeds of abtrain's runs."""

    mean: float
    std: float


class PaperCell(NamedTuple):
    """A cell of Table II. A value is None if it is not legible in our copy of the paper.

    Attributes:
        traffic: the scaled traffic in GB/s.
        compression: the parameters of the full model divided by those of the factored model, at the end of the run.
        minutes: the wall-clock time of the job in minutes.
        top1: the validation accuracy in percent.
    """

    traffic: Value | None
    compression: float | None
    minutes: Value | None
    top1: Value | None


def _cell(*numbers: float) -> PaperCell:
    """Builds a cell from numbers in the paper's order. A deviation follows each mean except the compression."""
    traffic, traffic_std, compression, minutes, minutes_std, top1, top1_std = numbers
    return PaperCell(Value(traffic, traffic_std), compression, Value(minutes, minutes_std), Value(top1, top1_std))


_UNREADABLE = PaperCell(None, None, None, None)

TABLE2_LOCAL: dict[tuple[str, str, int], PaperCell] = {
    (VIT, AB, 2): _cell(2.81, 0.08, 2.52, 435.80, 7.36, 70.24, 0.36),
    (VIT, NO_GROUPS, 2): _cell(5.14, 0.19, 2.83, 442.94, 8.52, 68.31, 0.07),
    (VIT, DDP, 2): _cell(8.87, 0.00, 1, 436.38, 0.35, 70.73, 0.44),
    (RESNET, AB, 2): _UNREADABLE,
    (RESNET, NO_GROUPS, 2): _cell(2.87, 0.01, 1.27, 364.91, 0.53, 74.42, 0.04),
    (RESNET, DDP, 2): _cell(3.83, 0.01, 1, 367.36, 0.36, 74.43, 0.06),
    (VIT, AB, 4): _cell(2.83, 0.06, 2.09, 220.85, 0.88, 70.90, 0.44),
    (VIT, NO_GROUPS, 4): _cell(5.72, 0.08, 2.22, 224.35, 1.22, 67.81, 0.49),
    (VIT, DDP, 4): _cell(8.87, 0.10, 1, 249.03, 31.01, 69.15, 0.00),
    (RESNET, AB, 4): _cell(1.04, 0.05, 1.39, 200.69, 10.30, 74.61, 0.06),
    (RESNET, NO_GROUPS, 4): _cell(2.67, 0.04, 1.27, 195.46, 1.30, 73.68, 0.12),
    (RESNET, DDP, 4): _cell(3.85, 0.01, 1, 195.19, 0.59, 73.67, 0.05),
    (VIT, AB, 8): _cell(2.65, 0.04, 2.02, 115.65, 1.37, 68.92, 0.10),
    (VIT, NO_GROUPS, 8): _cell(5.93, 0.13, 1.98, 121.95, 1.95, 65.70, 0.14),
    (VIT, DDP, 8): _cell(8.51, 0.00, 1, 121.78, 1.02, 67.20, 0.07),
    (RESNET, AB, 8): _UNREADABLE,
    (RESNET, NO_GROUPS, 8): _cell(2.71, 0.02, 1.16, 104.70, 0.52, 73.04, 0.15),
    (RESNET, DDP, 8): _cell(3.71, 0.09, 1, 105.77, 1.69, 73.02, 0.10),
    (VIT, AB, 16): _cell(2.54, 0.03, 1.86, 64.83, 1.96, 64.20, 0.01),
    (VIT, NO_GROUPS, 16): _cell(4.91, 0.67, 1.86, 79.15, 9.31, 61.17, 0.33),
    (VIT, DDP, 16): _cell(8.25, 0.18, 1, 63.53, 1.10, 63.68, 0.09),
    (RESNET, AB, 16): _cell(0.87, 0.01, 1.19, 58.61, 0.07, 72.66, 0.04),
    (RESNET, NO_GROUPS, 16): _cell(2.56, 0.04, 1.10, 59.54, 0.68, 72.60, 0.10),
    (RESNET, DDP, 16): _cell(3.63, 0.23, 1, 59.27, 0.10, 72.32, 0.03),
    (VIT, AB, 32): _cell(2.27, 0.41, 1.80, 39.53, 5.29, 55.54, 0.34),
    (VIT, NO_GROUPS, 32): _cell(4.63, 0.51, 1.84, 43.36, 3.90, 53.89, 0.15),
    (VIT, DDP, 32): _cell(7.52, 0.36, 1, 36.56, 0.19, 58.00, 0.17),
    (RESNET, AB, 32): _cell(0.78, 0.01, 1.20, 36.91, 0.07, 70.49, 0.05),
    (RESNET, NO_GROUPS, 32): _cell(2.17, 0.04, 1.12, 37.48, 0.15, 71.38, 0.07),
    (RESNET, DDP, 32): _cell(3.00, 0.06, 1, 37.91, 0.73, 71.47, 0.08),
}
"""Constant local batch (256 per GPU), by model, method and number of nodes with four GPUs each."""

TABLE2_GLOBAL: dict[tuple[str, str, int], PaperCell] = {
    (VIT, AB, 4): _cell(2.49, 0.49, 2.09, 259.44, 49.68, 70.68, 0.56),
    (VIT, NO_GROUPS, 4): _cell(5.61, 0.16, 2.21, 227.99, 5.29, 68.66, 0.22),
    (VIT, DDP, 4): _cell(8.93, 0.09, 1, 224.97, 1.79, 69.26, 0.18),
    (RESNET, AB, 4): _cell(1.07, 0.01, 1.38, 194.64, 0.91, 74.75, 0.09),
    (RESNET, NO_GROUPS, 4): _cell(2.69, 0.03, 1.27, 195.76, 3.49, 73.65, 0.13),
    (RESNET, DDP, 4): _cell(3.83, 0.01, 1, 195.03, 0.74, 73.74, 0.13),
    (VIT, AB, 8): _cell(4.89, 0.44, 2.27, 123.35, 5.81, 69.66, 0.44),
    (VIT, NO_GROUPS, 8): _cell(10.31, 0.32, 2.19, 124.85, 1.92, 68.37, 0.15),
    (VIT, DDP, 8): _cell(13.09, 1.92, 1, 153.03, 17.77, 69.38, 0.14),
    (RESNET, AB, 8): _cell(1.46, 0.18, 1.54, 135.98, 12.43, 73.76, 0.19),
    (RESNET, NO_GROUPS, 8): _cell(3.98, 0.41, 1.27, 131.76, 12.52, 73.60, 0.02),
    (RESNET, DDP, 8): _cell(4.96, 0.09, 1, 139.82, 2.00, 73.64, 0.09),
    (VIT, AB, 16): _cell(8.17, 0.17, 2.54, 77.68, 9.18, 69.19, 0.68),
    (VIT, NO_GROUPS, 16): _cell(17.14, 0.28, 2.20, 74.26, 0.76, 68.67, 0.34),
    (VIT, DDP, 16): _cell(25.00, 0.31, 1, 76.95, 0.87, 68.79, 0.40),
    (RESNET, AB, 16): _cell(1.91, 0.27, 1.72, 111.46, 12.41, 72.41, 0.04),
    (RESNET, NO_GROUPS, 16): _cell(5.57, 0.09, 1.27, 92.52, 1.78, 73.54, 0.04),
    (RESNET, DDP, 16): _cell(6.09, 0.46, 1, 113.00, 7.23, 73.72, 0.03),
    (VIT, AB, 32): _cell(9.84, 0.07, 2.91, 51.10, 0.29, 66.13, 0.22),
    (VIT, NO_GROUPS, 32): _cell(21.81, 2.66, 2.20, 81.41, 19.36, 68.58, 0.57),
    (VIT, DDP, 32): _cell(25.00, 2.55, 1, 77.99, 18.29, 68.99, 0.10),
    (RESNET, AB, 32): _cell(1.84, 0.42, 1.91, 110.09, 28.61, 70.59, 0.08),
    (RESNET, NO_GROUPS, 32): _cell(5.70, 0.03, 1.27, 92.37, 3.35, 73.73, 0.10),
    (RESNET, DDP, 32): _cell(6.49, 1.85, 1, 121.55, 31.04, 73.71, 0.04),
}
"""Constant global batch (4,096), by model, method and number of nodes with four GPUs each."""

TABLE2: dict[str, dict[tuple[str, str, int], PaperCell]] = {"local": TABLE2_LOCAL, "global": TABLE2_GLOBAL}
"""Both halves of Table II, by the batch that is constant."""

BACKWARD_SHARE = 0.5384
"""The backward pass as a share of a step's time, measured by the authors on four nodes (Section V)."""
PORT = 25.0
"""The rate of a node's InfiniBand port in GB/s, which limits the scaled traffic (Table II)."""
GPUS = 4
"""The number of GPUs of a node (Section IV.A)."""
EPOCHS = 150
"""The number of epochs in every ImageNet run, according to the authors' configurations."""
ITERATIONS_4K = 300
"""The number of steps in an ImageNet epoch at a global batch of 4,096. At 2,048 it is 600 (Section IV.D)."""


class PublishedSchedule(NamedTuple):
    """The numbers of steps in the authors' published configurations.

    A run begins with a warm-up and then repeats a cycle, which ends with a rebound. `cycle` includes `rebound`.
    """

    total: int
    warmup: int
    cycle: int
    rebound: int


SCHEDULES = {
    VIT: PublishedSchedule(EPOCHS * ITERATIONS_4K, 12_300, 2_180, 300),
    RESNET: PublishedSchedule(EPOCHS * ITERATIONS_4K, 9_300, 3_000, 300),
}
"""Schedules at a global batch of 4,096, by model."""
