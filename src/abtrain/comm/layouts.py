"""Shapes and dtypes of buffers, which may change while gradients are averaged."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import Tensor

log = logging.getLogger("abtrain")

REMEDY = "Change buffers on all workers at the same step"


def layouts_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns the shape and dtype of named tensors, in words."""
    return {name: f"{tuple(tensor.shape)} of {tensor.dtype}" for name, tensor in tensors.items()}


class Layouts:
    """The layouts of a module's buffers (`known`), from one forward pass to the next."""

    def __init__(self, buffers: Mapping[str, Tensor]) -> None:
        self.known = layouts_of(buffers)
        self._logged: set[str] = set()

    def changes(self, buffers: Mapping[str, Tensor]) -> str:
        """Describes the changes since the last call; empty if there are none. Each buffer is logged once."""
        before, self.known = self.known, layouts_of(buffers)
        names = [name for name in before | self.known if before.get(name) != self.known.get(name)]
        changed = ", ".join(f"{name} is {self.known.get(name, 'gone')}" for name in names)
        if not self._logged.issuperset(names):
            self._logged.update(names)
            log.warning("buffers have changed while gradients are averaged: %s. %s", changed, REMEDY)
        return changed
