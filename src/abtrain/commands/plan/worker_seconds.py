"""The seconds of one worker's own work, which a forecast needs beside traffic and links."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from abtrain.recipes.sync import GradientWire


@dataclass(frozen=True)
class FactorSeconds:
    """The seconds that factors add to training.

    Args:
        step: to every step.
        reshaping: once for each time that they take the weights' place, until the weights are back; without
            decompositions.
    """

    step: float = 0.0
    reshaping: float = 0.0

    def times(self, slower: float) -> FactorSeconds:
        """Returns the seconds of a worker that is `slower` times as slow."""
        return FactorSeconds(slower * self.step, slower * self.reshaping)


@dataclass(frozen=True)
class WorkerSeconds:
    """Seconds of one worker alone.

    Args:
        step: of a training step without any communication.
        averaging: that averaging gradients adds to a step beside sending them, by their wire; PowerSGD's of any rank.
        decompositions: of all weights that are factored.
        factors: what else factors add.
    """

    step: float
    averaging: Mapping[GradientWire, float] = field(default_factory=dict)
    decompositions: float = 0.0
    factors: FactorSeconds = FactorSeconds()

    def times(self, slower: float) -> WorkerSeconds:
        """Returns the seconds of a worker that is `slower` times as slow, such as one that shares its core."""
        return replace(
            self,
            step=slower * self.step,
            averaging={wire: slower * seconds for wire, seconds in self.averaging.items()},
            decompositions=slower * self.decompositions,
            factors=self.factors.times(slower),
        )
