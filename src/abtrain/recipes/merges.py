"""Defines merge rules, which compute new common weights from the workers' changes in a round. Imports no torch.

A round is the steps between two merges. All workers start it with weights W_0, and worker i ends it with W_i. A merge
computes the weighted mean of the changes, D = sum_i s_i (W_i - W_0). A rule gives the shares s_i and new weights W:

    mean            s_i = 1 / workers                                 W = W_0 + D
    trained_only    s_i = 1 / (workers that trained it)               W = W_0 + D
    weighted        s_i ~ exp(-loss_i / T) of those that trained it   W = W_0 + D
    outer           s_i = 1 / workers      M = mu M + D ;  W = W_0 + lr (D + mu M)      (DiLoCo, arXiv 2311.08105)

A new rule is a subclass of `MergeRule`. A line in `BY_NAME` gives it a name for recipes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from abtrain.recipes.numbers import number_problems, share_problems

if TYPE_CHECKING:
    from torch import Tensor


NOT_FINITE, TOO_LARGE = -1, -2
"""Reported by a worker whose weights are not finite, or whose changes are too large to be averaged in float32."""


class Part(NamedTuple):
    """Describes what one worker contributes to a merge.

    Attributes:
        buffers: a hash of the worker's buffers (see `abtrain.merging.buffers`), or NOT_FINITE or TOO_LARGE.
        loss: the worker's mean training loss in the round; NaN if it has none, infinity if it is not finite.
    """

    buffers: int
    loss: float

    @property
    def finite(self) -> bool:
        return self.buffers >= 0 and not math.isinf(self.loss)


@dataclass(frozen=True)
class MergeRule:
    """Is the base class of merge rules, which are frozen dataclasses of settings. It computes the plain mean.

    Attributes:
        words: the rule's name in output for users.
        needs_losses: True if shares depend on training losses, which must then be passed to `ab.step(loss)`.
    """

    words: ClassVar[str]
    needs_losses: ClassVar[bool] = False

    def problems(self) -> list[str]:
        """Returns one message for each problem with these settings."""
        return []

    def shares(self, alive: Sequence[bool], trained: Sequence[bool], parts: Sequence[Part]) -> list[float]:
        """Returns each worker's share s_i for one tensor. Equal inputs give equal shares on all workers.

        Args:
            alive: one flag per worker, True if its weights and loss are finite; at least one is True.
            trained: one flag per worker, True if it is alive and trained the tensor.
            parts: one `Part` per worker.

        Returns:
            One number per worker, 0 where `alive` is False. The sum is 1, or 0 if no worker trained the tensor.
        """
        return [well / sum(alive) for well in alive]

    def step(self, change: Tensor, momentum: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns the step from the weights W_0 to the new weights. It treats each number alike.

        Args:
            change: the mean change D of a part of the weights, of any shape; it is not modified.
            momentum: the momentum that the last merge returned for these weights; None before the first merge.

        Returns:
            The step W - W_0 and the new momentum, both of the shape of `change`. Without momentum, the latter is None.
        """
        return change, None


@dataclass(frozen=True)
class Mean(MergeRule):
    """Averages each tensor over all workers, whether or not they trained it, as Algorithm 1 of the paper does."""

    words = "mean"


@dataclass(frozen=True)
class TrainedOnly(MergeRule):
    """Averages each tensor over the workers that trained it, and ignores workers on which it was frozen."""

    words = "mean over workers that trained the weight"

    def shares(self, alive: Sequence[bool], trained: Sequence[bool], parts: Sequence[Part]) -> list[float]:
        return [did / max(sum(trained), 1) for did in trained]


@dataclass(frozen=True)
class Weighted(TrainedOnly):
    """Averages each tensor over the workers that trained it, weighted by exp(-mean loss of the round / temperature).

    `temperature` has the units of the loss. A higher temperature makes the workers' shares more equal.
    """

    temperature: float = 0.1

    words = "mean weighted by training loss"
    needs_losses = True

    def problems(self) -> list[str]:
        return number_problems("temperature", self.temperature, above=0)

    def shares(self, alive: Sequence[bool], trained: Sequence[bool], parts: Sequence[Part]) -> list[float]:
        # A worker that skipped all steps of a round has no loss, and no change.
        losses = [part.loss if did else math.nan for part, did in zip(parts, trained, strict=True)]
        known = [loss for loss in losses if not math.isnan(loss)]
        if not known:
            return super().shares(alive, trained, parts)
        best = min(known)
        weights = [0.0 if math.isnan(loss) else math.exp((best - loss) / self.temperature) for loss in losses]
        return [weight / sum(weights) for weight in weights]


@dataclass(frozen=True)
class Outer(MergeRule):
    """Applies an outer Nesterov optimizer to the average change of a round (DiLoCo, arXiv 2311.08105).

    With `lr` 1 and `momentum` 0, the result is that of `Mean`.
    """

    lr: float = 0.7
    momentum: float = 0.9

    words = "outer Nesterov"

    def problems(self) -> list[str]:
        found = number_problems("outer_lr", self.lr, above=0)
        return found + share_problems("outer_momentum", self.momentum, below=1)

    def step(self, change: Tensor, momentum: Tensor | None) -> tuple[Tensor, Tensor | None]:
        # Sums and products in place, since a new tensor takes as long as computing it.
        M = change if momentum is None else (self.momentum * momentum).add_(change)
        return (self.momentum * M).add_(change).mul_(self.lr), M


BY_NAME: dict[str, type[MergeRule]] = {"mean": Mean, "trained_only": TrainedOnly, "weighted": Weighted}
"""The merge rules that a recipe's options can select by name."""
