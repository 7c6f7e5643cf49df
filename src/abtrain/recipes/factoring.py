"""Which weights are factored, and how. Pure: the factoring itself is in `abtrain.lowrank`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from abtrain.recipes.numbers import whole_number_problems

OptimizerState = Literal["reset", "project", "auto"]
SVDMode = Literal["each", "shared"]


class RankRule(Protocol):
    """How many singular values to keep. The rules themselves are in `abtrain.recipes.rank_rules`."""

    def __call__(self, singular_values: Sequence[float], m: int, n: int) -> int:
        """Returns k >= 1, given min(m, n) singular values in descending order of an m x n matrix."""
        ...

    def problems(self) -> list[str]:
        """Returns the problems of the rule's settings; empty if there are none."""
        ...


@dataclass(frozen=True)
class Factoring:
    """Which weights are factored, and how.

    Args:
        rank_rule: how many singular values each weight keeps.
        keep_dense_if_larger: leave a weight dense where its factors would be no smaller, k (m + n) >= m n.
        min_dim: leave a weight dense whose smaller matrix dimension is below this.
        exclude: globs of parameter names that stay dense, such as `head.*`.
        optimizer_state: at a change of shape, `reset` the optimizer's state of the weight, or `project` it; `auto`:
            project it where the optimizer is known, and reset it elsewhere.
        svd: `each` worker decomposes every weight, or the work is `shared`: one owner a weight sends its factors.
    """

    rank_rule: RankRule
    keep_dense_if_larger: bool = False
    min_dim: int = 2
    exclude: tuple[str, ...] = ()
    optimizer_state: OptimizerState = "reset"
    svd: SVDMode = "each"

    def problems(self) -> list[str]:
        """Returns the problems of these settings; empty if there are none."""
        rule = self.rank_rule
        known = hasattr(rule, "problems")
        found = rule.problems() if known else [f"rank_rule={rule!r} is no rank rule: use SigmaCutoff(0.15), for one"]
        found += whole_number_problems("min_dim", self.min_dim, least=1)
        if not isinstance(self.exclude, tuple | list) or not all(isinstance(glob, str) for glob in self.exclude):
            found.append(f"exclude={self.exclude!r} is not a list of globs: use one, such as ('head.*',)")
        if self.optimizer_state not in get_args(OptimizerState):
            found.append(f"optimizer_state={self.optimizer_state!r} is unknown: use 'reset', 'project' or 'auto'")
        if self.svd not in ("each", "shared"):
            found.append(f"svd={self.svd!r} is unknown: use 'each' or 'shared'")
        return found
