"""The contract for threads of one process: tests, notebooks, the reference.

Nothing is sent, but every byte is counted as if it were. Results do not depend on the order in which threads arrive:
sums are taken in rank order. Threads share the random generators of the process, so each worker needs its own
generator.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from abtrain.comm.communicator import Communicator, Pending, Reduction, Scope, scope_spans
from abtrain.comm.data_parallel import DataParallel
from abtrain.comm.in_process_ddp import InProcessDataParallel
from abtrain.comm.rendezvous import Combine, Rendezvous, add, copied
from abtrain.comm.topology import Topology
from abtrain.errors import ConfigurationError
from abtrain.recipes.sync import GradientSync, Sync

T = TypeVar("T")


def run_in_process(
    world_size: int,
    worker: Callable[[Communicator], T],
    group_size: int = 1,
    timeout: float = 60.0,
) -> list[T]:
    """Runs `worker` once for each rank of a world of threads.

    Args:
        world_size: how many ranks.
        worker: called in a separate thread with the rank's communicator.
        group_size: ranks in a group.
        timeout: seconds that a collective waits for the last rank to arrive.

    Returns:
        The workers' results, in rank order.

    Raises:
        The first error of any worker. The others are freed at once: the collective in which they wait, or the next one
        with the dead rank, raises a PeerLostError.
    """
    topology = Topology(world_size, group_size)
    rendezvous = Rendezvous(timeout)
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = worker(InProcessCommunicator(rank, topology, rendezvous))
        except BaseException as error:
            # Listed before the others notice that this rank is gone, so that their errors come after it.
            errors.append(error)
            rendezvous.leave(rank, f"died of {type(error).__name__}: {error}")
        else:
            rendezvous.leave(rank, "has finished its work")

    threads = [threading.Thread(target=run, args=(r,), name=f"rank {r}", daemon=True) for r in range(world_size)]
    try:
        _run_threads(threads)
    except BaseException:
        for rank in range(world_size):
            rendezvous.leave(rank, "was interrupted")
        raise
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(world_size)]


def _run_threads(threads: Sequence[threading.Thread]) -> None:
    """Runs all threads to their end, each with one intra-op thread: the ranks are the parallelism."""
    intra_op = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        torch.set_num_threads(intra_op)


class InProcessCommunicator(Communicator):
    """The `Communicator` of one thread among the ranks of a `Rendezvous`."""

    def __init__(self, rank: int, topology: Topology, rendezvous: Rendezvous) -> None:
        super().__init__(rank, topology, torch.device("cpu"))
        self._rendezvous = rendezvous

    # Threads meet when they wait: nothing happens between a launch and its wait.

    def _start_all_reduce(self, tensor: Tensor, op: Reduction, scope: Scope) -> Pending[None]:
        combine = add if op == "sum" else _largest

        def finish() -> None:
            tensor.copy_(self._meet(f"all_reduce({op})", [tensor], scope, combine)[0])

        return Pending(finish)

    def _start_all_gather(self, tensor: Tensor, scope: Scope) -> Pending[Tensor]:
        return Pending(lambda: self._meet("all_gather", [tensor], scope, _stacked)[0].clone())

    def _start_exchange(self, rows: Tensor, nbytes: int) -> Pending[Tensor]:
        return Pending(lambda: self._meet("exchange", [rows], "world", _stacked, nbytes)[0][:, self.rank].clone())

    def _broadcast(self, tensor: Tensor, source: int) -> None:
        call = f"broadcast(from {source})"
        tensor.copy_(self._meet(call, [tensor], "world", lambda of_ranks: copied(of_ranks[source]))[0])

    def _barrier(self) -> None:
        self._meet("barrier", [], "world", lambda of_ranks: [])

    def cannot_carry(self, sync: Sync) -> str:
        if not isinstance(sync, GradientSync) or sync.wire == "fp32":
            return ""
        return f"threads cannot send gradients as {sync.wire!r}: PyTorch's hooks need torch.distributed. Use 'fp32'"

    def _wrap(self, module: nn.Module, scope: Scope, find_unused_parameters: bool, sync: GradientSync) -> DataParallel:
        refused = self.cannot_carry(sync)
        if refused:
            raise ConfigurationError(refused)
        meet = partial(self._meet, scope=scope)
        return InProcessDataParallel(module, meet, len(self.ranks(scope)), find_unused_parameters)

    def _meet(
        self, call: str, tensors: Sequence[Tensor], scope: Scope, combine: Combine, nbytes: int | None = None
    ) -> list[Tensor]:
        """Brings `tensors` to the other ranks of the scope; see `Rendezvous.meet`. Counts `nbytes` (None: all)."""
        counted = sum(t.nbytes for t in tensors) if nbytes is None else nbytes
        self.meter.count(counted, scope_spans(self.topology, scope))
        with self.meter.waiting():
            return self._rendezvous.meet(self.rank, self.ranks(scope), call, tensors, combine, self.meter.where)


def _largest(of_ranks: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [stacked.amax(dim=0) for stacked in _stacked(of_ranks)]


def _stacked(of_ranks: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.stack(same) for same in zip(*of_ranks, strict=True)]
