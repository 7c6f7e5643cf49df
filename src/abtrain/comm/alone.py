"""torch.distributed with one worker: DDP does all its work there, and nothing is sent."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import nn

from abtrain.comm.data_parallel import DataParallel
from abtrain.comm.ddp import TorchDataParallel
from abtrain.comm.hooks import make_hook
from abtrain.comm.link import Link
from abtrain.comm.meter import Meter
from abtrain.errors import UsageError
from abtrain.recipes.sync import GradientSync


@contextmanager
def world_of_one() -> Iterator[Callable[[GradientSync, nn.Module], DataParallel]]:
    """Yields a function that wraps a model as a phase with this gradient synchronization does.

    Raises:
        UsageError: this process has joined other workers.
    """
    if dist.is_initialized():
        raise UsageError("this process has already joined other workers: use a separate process for a world of one")
    # Joining makes messages of uncaught errors start with the rank; leaving does not undo that.
    shown = sys.excepthook
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        link = Link(rank=0, ranks=(0,), group=None, spans="between_groups", meter=Meter())
        yield lambda sync, module: TorchDataParallel(module, link, False, make_hook(sync, link.group))
    finally:
        dist.destroy_process_group()
        sys.excepthook = shown
