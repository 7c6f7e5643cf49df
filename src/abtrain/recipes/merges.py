"""Merge rules: how the changes of a round become what all workers hold next. Pure: tensors are handed in, no torch.

A merge averages the workers' changes of a round, D = sum_i s_i (W_i - W_0). A rule says which share s_i each worker
has, and which step it takes for D. W_0 are the weights that all workers started the round from, W_i those of worker i
at its end:

    mean            s_i = 1 / workers                                 W = W_0 + D
    trained_only    s_i = 1 / (workers that trained it)               W = W_0 + D
    weighted        s_i ~ exp(-loss_i / T) of those that trained it   W = W_0 + D
    outer           s_i = 1 / workers      M = mu M + D ;  W = W_0 + lr (D + mu M)      (DiLoCo, arXiv 2311.08105)

A new rule is a subclass of `MergeRule`, and a line in `BY_NAME` where recipes are to take it by name.
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
        buffers: its fingerprint of its buffers (see `abtrain.merging.buffers`); -1 if what it has trained is not
            finite.
        loss: its mean training loss in the round; NaN where none is known, infinite where it is not finite.
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
        needs_losses: whether shares depend on training losses, so that `ab.step(loss)` has to be called with them.
    """

    words: ClassVar[str]
    needs_losses: ClassVar[bool] = False

    def problems(self) -> list[str]:
        """One message for each setting that cannot be; empty if all can."""
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
            change: D, of any shape; not to be written to.
            momentum: what the rule has kept of this tensor; None at first.

        Returns:
            The step, and what the rule keeps of the tensor, both of the shape of `change`; None: it keeps nothing.
        """
        return change, None


@dataclass(frozen=True)
class Mean(MergeRule):
    """All workers take the average over all, of trained and frozen parts: the paper's merge (Algorithm 1)."""

    words = "mean"


@dataclass(frozen=True)
class TrainedOnly(MergeRule):
    """All workers take the average over those workers that trained the tensor, such as one of two factors."""

    words = "mean over those that trained it"

    def shares(self, alive: Sequence[bool], trained: Sequence[bool], parts: Sequence[Part]) -> list[float]:
        return [did / max(sum(trained), 1) for did in trained]


@dataclass(frozen=True)
class Weighted(TrainedOnly):
    """The average over the workers that trained a tensor, each weighted by exp(-mean loss of the round / temperature).

    Args:
        temperature: in the units of the loss; the larger it is, the nearer the weights are to equal.
    """

    temperature: float = 0.1

    words = "mean weighted by training loss"
    needs_losses = True

    def problems(self) -> list[str]:
        return number_problems("temperature", self.temperature, above=0)

    def shares(self, alive: Sequence[bool], trained: Sequence[bool], parts: Sequence[Part]) -> list[float]:
        # A worker that skipped all steps of a round has no loss, and no change.
        known = [did and not math.isnan(part.loss) for part, did in zip(parts, trained, strict=True)]
        if not any(known):
            return super().shares(alive, trained, parts)
        best = min(part.loss for part, has in zip(parts, known, strict=True) if has)
        weights = [
            math.exp((best - part.loss) / self.temperature) if has else 0.0
            for part, has in zip(parts, known, strict=True)
        ]
        return [weight / max(sum(weights), 1e-300) for weight in weights]


@dataclass(frozen=True)
class Outer(MergeRule):
    """The average change of a round is the gradient of an outer Nesterov optimizer (DiLoCo, arXiv 2311.08105).

    Args:
        lr: of the outer optimizer; 1 with no momentum is `Mean`.
        momentum: of the outer optimizer.
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
