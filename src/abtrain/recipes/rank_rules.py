"""Defines rank rules, which choose how many singular values of a weight are kept.

A rule is called with the singular values in descending order, as floats, and returns k from 1 to min(m, n). It rounds k
up to a multiple of `rank_multiple`, since hardware is fastest with multiples of 8 or 16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from abtrain.errors import ConfigurationError
from abtrain.recipes.factoring import RankRule
from abtrain.recipes.numbers import number_problems, share_problems, whole_number_problems


def _bounded(k: int, multiple: int, m: int, n: int) -> int:
    rounded = -(-max(k, 1) // multiple) * multiple
    return min(rounded, m, n)


def _multiple_problems(rank_multiple: int) -> list[str]:
    return whole_number_problems("rank_multiple", rank_multiple, least=1)


@dataclass(frozen=True)
class SigmaCutoff:
    """Keeps the singular values of at least `cutoff` times the largest (Section III of the paper, `sigmaCutoff`).

    With `outliers`, one dominant singular value may cut off most others, as in the paper. The output layer of a
    language model has one, due to word frequencies, and would keep only two or three others. Without `outliers`, a
    weight keeps full rank if the largest value has more than 1/4 of the energy (the sum of all squares), the rest has
    more than 1/100, and the cutoff would keep less than 1/3 of that rest.
    """

    cutoff: float = 0.15
    rank_multiple: int = 1
    outliers: bool = True

    def problems(self) -> list[str]:
        return share_problems("sigma_cutoff", self.cutoff) + _multiple_problems(self.rank_multiple)

    def __call__(self, singular_values: Sequence[float], m: int, n: int) -> int:
        threshold = self.cutoff * singular_values[0]
        k = sum(s >= threshold for s in singular_values)
        if not self.outliers and self._outlier_decides(singular_values, k):
            k = len(singular_values)
        return _bounded(k, self.rank_multiple, m, n)

    @staticmethod
    def _outlier_decides(singular_values: Sequence[float], k: int) -> bool:
        largest, *others = (s * s for s in singular_values)
        rest = sum(others)
        total = largest + rest
        return largest > total / 4 and rest > total / 100 and sum(others[: k - 1]) < rest / 3


@dataclass(frozen=True)
class Energy:
    """Keeps the fewest singular values whose squares add up to at least `share` times the sum of all squares."""

    share: float = 0.95
    rank_multiple: int = 1

    def problems(self) -> list[str]:
        return share_problems("energy", self.share) + _multiple_problems(self.rank_multiple)

    def __call__(self, singular_values: Sequence[float], m: int, n: int) -> int:
        energies = list(accumulate(s * s for s in singular_values))
        wanted = self.share * energies[-1]
        return _bounded(1 + sum(energy < wanted for energy in energies), self.rank_multiple, m, n)


@dataclass(frozen=True)
class FixedRank:
    """Keeps `k` singular values, or all if there are fewer."""

    k: int
    rank_multiple: int = 1

    def problems(self) -> list[str]:
        return whole_number_problems("rank", self.k, least=1) + _multiple_problems(self.rank_multiple)

    def __call__(self, singular_values: Sequence[float], m: int, n: int) -> int:
        return _bounded(self.k, self.rank_multiple, m, n)


@dataclass(frozen=True)
class StableRank:
    """Keeps `factor` times the stable rank, rounded up.

    The stable rank is the sum of the squared singular values divided by the largest square. It changes little if the
    matrix changes little (Rudelson and Vershynin, arXiv math/0503442).
    """

    factor: float = 4.0
    rank_multiple: int = 1

    def problems(self) -> list[str]:
        return number_problems("stable rank factor", self.factor, above=0) + _multiple_problems(self.rank_multiple)

    def __call__(self, singular_values: Sequence[float], m: int, n: int) -> int:
        stable = sum(s * s for s in singular_values) / singular_values[0] ** 2
        return _bounded(math.ceil(self.factor * stable), self.rank_multiple, m, n)


@dataclass(frozen=True)
class ParameterShare:
    """Keeps the largest rank at which factors have at most `share` of the weight's parameters, whatever its spectrum.

    Muon trains all directions alike, so spectra stay flat, and rules that look at them keep all of them or too few.
    """

    share: float = 0.5
    rank_multiple: int = 1

    def problems(self) -> list[str]:
        return share_problems("parameter share", self.share) + _multiple_problems(self.rank_multiple)

    def __call__(self, singular_values: Sequence[float], m: int, n: int) -> int:
        k = int(self.share * m * n / (m + n))
        return _bounded(k - k % self.rank_multiple, self.rank_multiple, m, n)


_RULES: dict[str, Callable[[str], RankRule]] = {
    "sigma": lambda text: SigmaCutoff(float(text)),
    "energy": lambda text: Energy(float(text)),
    "stable": lambda text: StableRank(float(text)),
    "fixed": lambda text: FixedRank(int(text)),
    "share": lambda text: ParameterShare(float(text)),
}


def parse_rule(text: str) -> RankRule:
    """Returns the rank rule for a string `KIND:NUMBER`, such as `energy:0.95`.

    Raises:
        ConfigurationError: KIND is unknown, or NUMBER is invalid.
    """
    kind, _, number = text.partition(":")
    try:
        return _RULES[kind](number)
    except (KeyError, ValueError):
        problem = f"has {number!r} in place of its number" if kind in _RULES else "is unknown"
        raise ConfigurationError(
            f"rank rule {text!r} {problem}: use sigma:CUTOFF, energy:SHARE, stable:FACTOR, share:SHARE, or fixed:K "
            "with a whole K"
        ) from None
