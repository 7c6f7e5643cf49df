"""Defines the interface of a model whose gradients are averaged, and implements it for a single worker."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from abtrain.comm.checksums import layouts_of
from abtrain.errors import UsageError

log = logging.getLogger("abtrain")

REMEDY = "Change buffers on all workers at the same step"


class DataParallel:
    """A model whose gradients are averaged over a scope while `backward` runs.

    With gradients disabled, a call runs the model and communicates nothing, so one rank may call it alone. Eval mode
    also averages gradients, since models with frozen normalization layers are fine-tuned in it.

    Attributes:
        at_close: the functions that `close` calls.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module: nn.Module | None = module
        self._sent_extremes: list[Tensor] = []
        self.at_close = ExitStack()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        return self._differentiable(*args, **kwargs) if torch.is_grad_enabled() else module(*args, **kwargs)

    def _differentiable(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    @property
    def module(self) -> nn.Module:
        """The model. Raises a RuntimeError after `close`."""
        if self._module is None:
            raise RuntimeError("this data-parallel wrapper was closed: make a new one with data_parallel()")
        return self._module

    def no_sync(self) -> AbstractContextManager[None]:
        """Returns a context in which gradients of forward passes accumulate locally, and are not averaged."""
        return nullcontext()

    def arrivals(self) -> list[int]:
        """Returns indices of trained parameters, in the order in which the first averaged backward pass reached them.

        DDP rebuilds its buckets in this order, which decides the order of sums over three or more ranks. The list is
        empty before that pass, and for wrappers without buckets.
        """
        return []

    def follow(self, arrivals: Sequence[int]) -> None:
        """Arranges the buckets as in a wrapper that returned these `arrivals`. Sends nothing, but may drop gradients.

        Raises:
            ValueError: `arrivals` does not contain each trained parameter exactly once.
        """

    def spoiled(self) -> bool:
        """Returns whether this worker's gradients in the last average contained NaN or infinity."""
        return not all(bool(numbers.isfinite().all()) for numbers in self._sent_extremes)

    def close(self) -> None:
        """Releases the model, and no longer averages its gradients. Calling this wrapper is then an error."""
        self._module = None
        self.at_close.close()


class Unsynchronized(DataParallel):
    """A `DataParallel` that does not average gradients, for a single rank or a model without trainable parameters."""


class Layouts:
    """Tracks the shapes and dtypes of a module's buffers (`known`) from one forward pass to the next."""

    def __init__(self, buffers: Mapping[str, Tensor]) -> None:
        self.known = layouts_of(buffers)
        self._logged: set[str] = set()

    def changes(self, buffers: Mapping[str, Tensor]) -> str:
        """Returns the changes since the last call as text, or an empty string. Logs a warning once for each buffer."""
        before, self.known = self.known, layouts_of(buffers)
        names = [name for name in before | self.known if before.get(name) != self.known.get(name)]
        changed = ", ".join(f"{name} is {self.known.get(name, 'gone')}" for name in names)
        if not self._logged.issuperset(names):
            self._logged.update(names)
            log.warning("buffers have changed their shape or dtype: %s. %s", changed, REMEDY)
        return changed


def unused_error(missing: str) -> UsageError:
    """Returns the error for a backward pass that left parameters without a gradient."""
    return UsageError(
        f"the last backward pass left {missing} without a gradient: freeze them (requires_grad_(False)), or set "
        "find_unused_parameters=True"
    )


_PIECE = 131_072
"""The most elements that two operations in a row find in the cache of one core."""


def scale_(flat: Tensor, factor: float) -> list[Tensor]:
    """Multiplies a vector in place. Returns numbers, on its device, that reveal NaN and infinity in it."""
    if flat.device.type != "cpu":
        return extremes([flat.mul_(factor)])
    # In pieces, so that the sum reads from the cache. A sum in float16 would overflow.
    wide = torch.promote_types(flat.dtype, torch.float32)
    sums = [piece.mul_(factor).sum(dtype=wide) for piece in flat.split(_PIECE)]
    if not sums or bool(torch.stack(sums).isfinite().all()):
        return []
    return extremes([flat])


def extremes(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Returns each tensor's minimum and maximum, on its device. They reveal NaN and infinity."""
    real = (torch.view_as_real(t) if t.is_complex() else t for t in tensors if t.numel())
    return [torch.stack(torch.aminmax(tensor.detach())) for tensor in real]
