"""Merge rules: turn the workers' changes of a round into the next weights of all workers. Pure: no torch.

A merge averages the workers' changes of a round, D = sum_i s_i (W_i - W_0). A rule gives each worker's share s_i, and
the step for D. All workers start the round from weights W_0, and worker i ends it with W_i:

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


class Part(NamedTuple):
    """A worker's report on its part of a merge.

    Attributes:
        buffers: the fingerprint of its buffers (see `abtrain.merging.buffers`); -1 if its weights are not finite.
        loss: its mean training loss in the round; NaN if it has none, infinite if the loss is not finite.
    """

    buffers: int
    loss: float

    @property
    def finite(self) -> bool:
        return self.buffers >= 0 and not math.isinf(self.loss)


@dataclass(frozen=True)
class MergeRule:
    """A merge rule: a frozen dataclass of its settings. This base is the plain mean over all workers.

    Attributes:
        words: its name for people.
        needs_losses: whether shares depend on training losses, so that `ab.step(loss)` needs them.
    """

    words: ClassVar[str]
    needs_losses: ClassVar[bool] = False

    def problems(self) -> list[str]:
        """One message for each problem of these settings."""
        return []

    def shares(self, alive: Sequence[bool], trained: Sequence[bool], parts: Sequence[Part]) -> list[float]:
        """Each worker's share of the average of one tensor. Equal inputs give equal shares on all workers.

        Args:
            alive: for each worker, whether its part is finite; at least one is.
            trained: for each worker, whether its part is finite and it trained the tensor.
            parts: the workers' reports.

        Returns:
            One number for each worker, 0 where `alive` is False. They sum to 1, or to 0 if nobody trained the tensor.
        """
        return [well / sum(alive) for well in alive]

    def step(self, change: Tensor, momentum: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The step from the weights that the round started from.

        Args:
            change: D, of any shape; never modified.
            momentum: the momentum that the last merge returned for this tensor; None at first.

        Returns:
            The step and the new momentum, both of the shape of `change`; a rule without momentum returns None for it.
        """
        return change, None


@dataclass(frozen=True)
class Mean(MergeRule):
    """The average over all workers, of trained and frozen parts: the paper's merge (Algorithm 1)."""

    words = "mean"


@dataclass(frozen=True)
class TrainedOnly(MergeRule):
    """The average over the workers that trained the tensor: others may have frozen it."""

    words = "mean over those that trained it"

    def shares(self, alive: Sequence[bool], trained: Sequence[bool], parts: Sequence[Part]) -> list[float]:
        return [did / max(sum(trained), 1) for did in trained]


@dataclass(frozen=True)
class Weighted(TrainedOnly):
    """The average over the workers that trained a tensor, each weighted by exp(-mean loss of the round / temperature).

    `temperature` has the units of the loss; a larger one makes the weights more equal.
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
    """The average change of a round is the gradient of an outer Nesterov optimizer (DiLoCo, arXiv 2311.08105).

    With `lr` 1 and `momentum` 0 it is `Mean`.
    """

    lr: float = 0.7
    momentum: float = 0.9

    words = "outer Nesterov"

    def problems(self) -> list[str]:
        found = number_problems("outer_lr", self.lr, above=0)
        return found + share_problems("outer_momentum", self.momentum, below=1)

    def step(self, change: Tensor, momentum: Tensor | None) -> tuple[Tensor, Tensor | None]:
        M = change if momentum is None else self.momentum * momentum + change
        return self.lr * (change + self.momentum * M), M


BY_NAME: dict[str, type[MergeRule]] = {"mean": Mean, "trained_only": TrainedOnly, "weighted": Weighted}
"""The rules that recipes take by name."""
