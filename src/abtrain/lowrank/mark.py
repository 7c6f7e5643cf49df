"""The placeholder of a factored weight among a module's parameters.

Averages of weights such as torch's AveragedModel pair the `parameters()` of a model with those of a copy. They would
pair a weight of the copy with a factor, and broadcasting might hide the mistake. The mark precedes the factors and fits
no tensor, so such a loop fails with an explanation. Loops that sum norms or count parameters may read the mark.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from abtrain.errors import UsageError
from abtrain.lowrank.nested import tensors_in

SHAPE = (1,) * 8
"""The shape of a mark: more dimensions than any weight has, so that the mark broadcasts to no tensor in place."""


class FactoredMark(nn.Parameter):
    """A single zero that cannot be combined with other tensors, and never trains."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(other.ndim for other in tensors_in((args, kwargs)) if not isinstance(other, FactoredMark)):
            raise UsageError(
                "parameters of a model whose weights are currently factored were paired with other tensors: the model "
                "holds A and B in the place of each factored weight. Pair `state_dict()`, which is always dense, or "
                "use ABTraining.ema for a running average"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        # A view of the base would have a base again, without end.
        is_base = getattr(getattr(func, "__self__", None), "__name__", "") == "_base"
        whole = isinstance(result, Tensor) and result.shape == SHAPE and not is_base
        return result.as_subclass(FactoredMark) if whole and not isinstance(result, FactoredMark) else result

    @property
    def requires_grad(self) -> bool:
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        """Ignores the value: a loop that lets all parameters of a model train does not mean the mark."""

    def requires_grad_(self, requires_grad: bool = True) -> FactoredMark:
        return self
