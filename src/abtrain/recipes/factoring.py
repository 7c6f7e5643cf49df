"""Defines the settings that determine which weights are factored, and how. `abtrain.lowrank` factors them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol, get_args

from abtrain.recipes.numbers import whole_number_problems

OptimizerState = Literal["reset", "project", "auto"]

_OptimizerState = Annotated[
    OptimizerState,
    "When a weight is factored, or its factors are multiplied out, reset the optimizer's state for it, or project it, "
    "which converts it; auto: project for known optimizers, and reset for others.",
]
SVD = Literal["auto", "each", "shared"]
_SVD = Annotated[
    SVD,
    "each: all workers decompose every weight; shared: one worker decomposes each weight and sends its factors; auto: "
    "shared inside each group, from 10 million parameters on.",
]


class RankRule(Protocol):
    """Chooses how many singular values of a weight are kept. `abtrain.recipes.rank_rules` defines the rules."""

    def __call__(self, singular_values: Sequence[float], m: int, n: int) -> int:
        """Returns the rank k >= 1 for an m x n matrix, given its min(m, n) singular values in descending order."""
        ...

    def problems(self) -> list[str]:
        """Returns one message for each problem with the rule's settings."""
        ...


@dataclass(frozen=True)
class Factoring:
    """Contains the settings that determine which weights are factored, and how."""

    rank_rule: Annotated[RankRule, "Chooses how many singular values of a weight are kept."]
    keep_dense_if_larger: Annotated[
        bool, "Leave a weight dense unless its factors are at least 10 % smaller, k (m + n) <= 0.9 m n."
    ] = False
    min_dim: Annotated[int, "Leave a weight dense if its smaller matrix dimension is below this."] = 2
    exclude: Annotated[tuple[str, ...], "Globs for names of parameters that stay dense, such as `head.*`."] = ()
    optimizer_state: _OptimizerState = "reset"
    svd: _SVD = "auto"

    def stays_dense(self, k: int, m: int, n: int) -> bool:
        """Returns whether an m x n weight stays dense because factors of rank k would be too large."""
        # Nearer to full size, a step with factors takes about 5 % longer than a dense one.
        return self.keep_dense_if_larger and 10 * k * (m + n) > 9 * m * n

    def problems(self) -> list[str]:
        """Returns one message for each problem with these settings."""
        rule = self.rank_rule
        known = hasattr(rule, "problems") and not isinstance(rule, type)
        found = (
            rule.problems()
            if known
            else [f"rank_rule={rule!r} is not a rank rule: use one, such as abtrain.Energy(0.95)"]
        )
        found += whole_number_problems("min_dim", self.min_dim, least=1)
        if not isinstance(self.exclude, tuple | list) or not all(isinstance(glob, str) for glob in self.exclude):
            found.append(f"exclude={self.exclude!r} is not a list of globs: use one, such as ('head.*',)")
        if self.optimizer_state not in get_args(OptimizerState):
            found.append(f"optimizer_state={self.optimizer_state!r} is unknown: use 'reset', 'project' or 'auto'")
        if self.svd not in get_args(SVD):
            found.append(f"svd={self.svd!r} is unknown: use 'auto', 'each' or 'shared'")
        return found
