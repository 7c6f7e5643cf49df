"""Shapes and dtypes of buffers, which may change while gradients are shared."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import Tensor

log = logging.getLogger("abtrain")

REMEDY = "All workers have to change their buffers at the same step"


def layouts_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Shape and dtype of named tensors, in words."""
    return {name: f"{tuple(tensor.shape)} of {tensor.dtype}" for name, tensor in tensors.items()}


class Layouts:
    """The layouts of a module's buffers, from one forward pass to the next.

    Args:
        buffers: by name, as they are at first.

    Attributes:
        known: as they were last.
    """

    def __init__(self, buffers: Mapping[str, Tensor]) -> None:
        self.known = layouts_of(buffers)
        self._told: set[str] = set()

    def changes(self, buffers: Mapping[str, Tensor]) -> str:
        """Describes the changes since the last call; empty if there are none. Each buffer is logged once."""
        before, self.known = self.known, layouts_of(buffers)
        names = [name for name in before | self.known if before.get(name) != self.known.get(name)]
        changed = ", ".join(f"{name} is {self.known.get(name, 'gone')}" for name in names)
        if not self._told.issuperset(names):
            self._told.update(names)
            log.warning("buffers have changed while gradients are shared: %s. %s", changed, REMEDY)
        return changed
