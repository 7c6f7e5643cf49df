"""Rules of merges: the share that every worker has in an average, alike on all workers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from abtrain.recipes.sync import Mean, Outer, TrainedOnly, Weighted


class Part(NamedTuple):
    """What one worker tells of its part of a merge.

    Attributes:
        buffers: what it tells of its buffers (see `abtrain.merging.buffers`); -1 if what it has trained is not finite.
        loss: its mean training loss in the round; NaN where none is known, infinite where it is not finite.
    """

    buffers: int
    loss: float

    @property
    def finite(self) -> bool:
        return self.buffers >= 0 and not math.isinf(self.loss)


def _equal(rule: Mean | Outer, alive: Sequence[bool], trained: Sequence[bool], parts: Sequence[Part]) -> list[float]:
    return [well / sum(alive) for well in alive]


def _of_trained(
    rule: TrainedOnly, alive: Sequence[bool], trained: Sequence[bool], parts: Sequence[Part]
) -> list[float]:
    return [did / max(sum(trained), 1) for did in trained]


def _by_loss(rule: Weighted, alive: Sequence[bool], trained: Sequence[bool], parts: Sequence[Part]) -> list[float]:
    # Who left out all steps of a round has no loss, and nothing to bring.
    known = [did and not math.isnan(part.loss) for part, did in zip(parts, trained, strict=True)]
    if not any(known):
        return _of_trained(TrainedOnly(), alive, trained, parts)
    best = min(part.loss for part, has in zip(parts, known, strict=True) if has)
    weights = [
        math.exp((best - part.loss) / rule.temperature) if has else 0.0 for part, has in zip(parts, known, strict=True)
    ]
    return [weight / max(sum(weights), 1e-300) for weight in weights]


Shares = Callable[[Any, Sequence[bool], Sequence[bool], Sequence[Part]], list[float]]
SHARES: dict[type, Shares] = {Mean: _equal, TrainedOnly: _of_trained, Weighted: _by_loss, Outer: _equal}
"""By rule: from who is alive, who trained the tensor, and what each tells, the share of every worker."""
