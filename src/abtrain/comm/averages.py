"""Exact averages over all workers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from abtrain.comm.buckets import pack, unpack
from abtrain.comm.communicator import Communicator
from abtrain.comm.stages import Stages, finish
from abtrain.comm.traffic import Calls, Traffic


def exact_average(tensors: Sequence[Tensor], comm: Communicator) -> list[Tensor]:
    """Runs all stages of `average_exactly` at once."""
    return finish(average_exactly(tensors, comm))


def average_exactly(tensors: Sequence[Tensor], comm: Communicator) -> Stages[list[Tensor]]:
    """Returns the average of each tensor over all workers, to the same bits on all of them.

    Shapes and dtypes are the same on all workers, and those of the averages. Half precision is summed in float32.
    """
    buckets = pack(tensors)
    launched = [comm.launch_all_reduce(bucket.flat) for bucket in buckets]
    yield
    for bucket, pending in zip(buckets, launched, strict=True):
        pending.wait()
        bucket.flat.div_(comm.topology.world_size)
    return unpack(buckets, tensors)


def sent_by_average(tensors: Sequence[Tensor]) -> Calls:
    """Returns the calls of `average_exactly` and `exact_average` of these tensors."""
    return tuple(Traffic("all_reduce", "world", bucket.flat.nbytes) for bucket in pack(tensors))
