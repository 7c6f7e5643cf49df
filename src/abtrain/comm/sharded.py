"""Runs a model that FSDP2 has sharded over the workers of a group, and averages its gradients there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from abtrain.comm.data_parallel import DataParallel
from abtrain.shards import fsdp_modules


class ShardedDataParallel(DataParallel):
    """A `DataParallel` for a model under `fully_shard`, which averages gradients itself.

    Each forward and backward pass gathers weights in the group, also with gradients disabled: all workers of the group
    make it. Buffers are not copied from the first rank. FSDP2's messages are not counted.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._synchronizing = True

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        before = self._synchronizing
        self._synchronize(False)
        try:
            yield
        finally:
            self._synchronize(before)

    def _synchronize(self, value: bool) -> None:
        self._synchronizing = value
        for _, module in fsdp_modules(self.module):
            module.set_requires_gradient_sync(value, recurse=False)
