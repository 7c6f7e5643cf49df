"""The placeholder of a factored weight among a module's parameters.

Loops that pair `parameters()` of a model with those of a copy of it (averages of weights, such as AveragedModel of
torch) would pair a weight of the copy with a factor, and broadcasting may hide it. They meet the mark first: it fits no
tensor. Whoever adds up norms or counts parameters may read it: it is one zero, which is not trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from abtrain.errors import UsageError

_SHAPE = (1,) * 8
"""Of more dimensions than a weight has, so that nothing in place broadcasts to it."""


class FactoredMark(nn.Parameter):
    """One zero that cannot be combined with other tensors, and that nobody can let train."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        others = [tensor for tensor in _tensors((args, kwargs)) if not isinstance(tensor, FactoredMark)]
        if any(other.ndim for other in others):
            raise UsageError(
                "parameters of a model whose weights are factored at present were paired with other tensors, one by "
                "one: the model holds A and B in the place of such a weight. Pair `state_dict()`, which is dense at "
                "all times, or use ABTraining.ema for a running average"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        # A view of the base would have a base again, without end.
        is_base = getattr(getattr(func, "__self__", None), "__name__", "") == "_base"
        whole = isinstance(result, Tensor) and result.shape == _SHAPE and not is_base
        return result.as_subclass(FactoredMark) if whole and not isinstance(result, FactoredMark) else result

    @property
    def requires_grad(self) -> bool:
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        """Who lets all parameters of a model train does not mean this one."""

    def requires_grad_(self, requires_grad: bool = True) -> FactoredMark:
        return self


def mark_like(tensor: Tensor) -> FactoredMark:
    """A mark of the tensor's dtype and device."""
    zero = torch.zeros(_SHAPE, dtype=tensor.dtype, device=tensor.device)
    return zero.as_subclass(FactoredMark)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return []
