"""torch.distributed with one worker: DDP goes through all its motions there, and nothing is sent."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import nn

from abtrain.comm.communicator import DataParallel
from abtrain.comm.ddp import TorchDataParallel
from abtrain.comm.hooks import make_hook
from abtrain.comm.link import Link
from abtrain.comm.meter import Meter
from abtrain.errors import UsageError
from abtrain.recipes.sync import GradientSync


@contextmanager
def world_of_one() -> Iterator[Callable[[GradientSync, nn.Module], DataParallel]]:
    """Inside it, a model can be wrapped as in a phase that shares gradients in this way.

    Raises:
        UsageError: this process has joined other workers.
    """
    if dist.is_initialized():
        raise UsageError("this process has joined other workers already: use a process of its own for a world of one")
    # Joining makes uncaught errors begin with the rank; leaving does not undo that.
    shown = sys.excepthook
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        world = dist.group.WORLD
        assert world is not None  # it was initialized just now
        link = Link(rank=0, ranks=(0,), group=None, spans="between_groups", meter=Meter())

        def wrap(sync: GradientSync, module: nn.Module) -> DataParallel:
            hook = None if sync.wire == "fp32" else make_hook(sync, world)
            return TorchDataParallel(module, link, find_unused_parameters=False, hook=hook)

        yield wrap
    finally:
        dist.destroy_process_group()
        sys.excepthook = shown
