"""Exact averages over all workers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from abtrain.comm.buckets import pack, unpack
from abtrain.comm.communicator import Communicator
from abtrain.comm.stages import Stages, finish
from abtrain.comm.traffic import Calls, Traffic


def exact_average(tensors: Sequence[Tensor], comm: Communicator) -> list[Tensor]:
    """The average of each tensor over all workers, at once; see `average_exactly`."""
    return finish(average_exactly(tensors, comm))


def average_exactly(tensors: Sequence[Tensor], comm: Communicator) -> Stages[list[Tensor]]:
    """The average of each tensor over all workers, the same bits on all of them. Halves are summed in float32.

    Args:
        tensors: of the same shapes and dtypes on all workers; not changed.
        comm: of this worker.

    Returns:
        New tensors of the same shapes and dtypes.
    """
    buckets = pack(tensors)
    launched = [comm.launch_all_reduce(bucket.flat) for bucket in buckets]
    yield
    for bucket, pending in zip(buckets, launched, strict=True):
        pending.wait()
        bucket.flat.div_(comm.topology.world_size)
    return unpack(buckets, tensors)


def sent_by_average(tensors: Sequence[Tensor]) -> Calls:
    """The calls of `average_exactly` and `exact_average` of these tensors."""
    return tuple(Traffic("all_reduce", "world", bucket.flat.nbytes) for bucket in pack(tensors))


def extremes(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Returns the least and the greatest number of each tensor, on its device: NaN or infinity if it holds any."""
    real = (torch.view_as_real(t) if t.is_complex() else t for t in tensors if t.numel())
    return [torch.stack(torch.aminmax(tensor.detach())) for tensor in real]
