"""Buffers that change their shape while gradients are shared."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import Tensor

log = logging.getLogger("abtrain")


def layouts_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Shape and dtype of named tensors, in words."""
    return {name: f"{tuple(tensor.shape)} of {tensor.dtype}" for name, tensor in tensors.items()}


class Layouts:
    """The layouts of a model's buffers, from one forward pass to the next.

    At each pass buffers follow the first rank. Where one has changed its shape on that rank alone, a backend may end
    the process for it, without a word of what was wrong. So whoever sees a change says so before.
    """

    def __init__(self) -> None:
        self._known: dict[str, str] = {}
        self._told: set[str] = set()

    def changes(self, buffers: Mapping[str, Tensor]) -> str:
        """What has changed since the last call, in words; empty if nothing has. Of each buffer the log tells once."""
        before, self._known = self._known, layouts_of(buffers)
        if not before or before == self._known:
            return ""
        names = [name for name in before | self._known if before.get(name) != self._known.get(name)]
        changed = ", ".join(f"{name} is {self._known.get(name, 'gone')}" for name in names)
        if not self._told.issuperset(names):
            self._told.update(names)
            log.warning(
                "buffers have changed while gradients are shared, where they follow one worker: %s. "
                "All workers have to change them at the same step",
                changed,
            )
        return changed
