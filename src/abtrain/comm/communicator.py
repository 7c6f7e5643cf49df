"""Defines the interface for communication between workers, and implements it for a single worker.

The rest of abtrain communicates only through a `Communicator`, so the same engine runs on Gloo and NCCL
(`torch_distributed.py`), on threads of one process (`in_process.py`), and on a single worker (`SingleProcess`). Every
collective is counted in the communicator's `meter`.

A function named `sent_by_...`, next to the code that sends, predicts the bytes from shapes alone, as `Calls`. It also
accepts tensors on PyTorch's meta device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from abtrain.comm.data_parallel import DataParallel, Unsynchronized
from abtrain.comm.meter import Meter, Spans
from abtrain.comm.peers import Peers
from abtrain.comm.topology import Topology
from abtrain.own import trained_parameters
from abtrain.recipes.sync import GradientSync, Sync

Scope = Literal["world", "group", "counterparts", "firsts"]
"""All workers; the workers of one group; the workers with the same place in all groups; or those with place 0."""
Reduction = Literal["sum", "max"]
Call = Literal["all_reduce", "all_gather", "exchange", "broadcast", "gradients"]
PLAIN = GradientSync()
SMALL = 4096
"""The largest number of bytes of a small sum, whose time depends on the latency of links."""
T = TypeVar("T")


@dataclass(frozen=True)
class Pending(Generic[T]):
    """A collective in progress. Its tensors must not change until `wait` has returned the result.

    Every rank calls `wait` once for each collective, in the order of the launches.
    """

    wait: Callable[[], T]


@dataclass(frozen=True)
class Traffic:
    """The size of one collective, or of one bucket of DDP's gradients.

    Attributes:
        call: the kind of collective; `gradients` is an all-reduce that overlaps with backward.
        scope: the ranks that take part.
        nbytes: the payload of one worker, in bytes.
        rounds: the number of successive collectives that share `nbytes` evenly; 3 for PowerSGD's buckets.
        ready: for `gradients`, the share of the backward pass after which the bucket can be sent.
    """

    call: Call
    scope: Scope
    nbytes: int
    rounds: int = 1
    ready: float = 1.0


Calls = tuple[Traffic, ...]


class Communicator:
    """Defines the operations by which one worker communicates with the others.

    Every operation is collective over its scope: all its ranks call it, in the same order. With a scope of one rank,
    nothing is sent or counted. The caller may compute between `launch_...` and `wait`. Tensors must
    be contiguous and on `device`, where the backend can send them.

    A backend implements the methods that raise NotImplementedError here. It receives tensors that are detached and
    checked, and scopes of several ranks.

    Raises:
        ValueError: a tensor is not contiguous.
        TypeError: some backend cannot reduce the tensor's dtype (see `check_reducible`).
        PeerLostError: another worker died or did not answer in time.
    """

    def __init__(self, rank: int, topology: Topology, device: torch.device) -> None:
        self.rank = rank
        self.topology = topology
        self.device = device
        self.meter = Meter()
        self.peers: Peers | None = None

    def ranks(self, scope: Scope) -> tuple[int, ...]:
        """Returns the world ranks of all workers in this worker's scope, in ascending order."""
        topology = self.topology
        if scope in ("counterparts", "firsts"):
            return topology.counterparts(0 if scope == "firsts" else self.rank)
        return topology.groups[topology.group_of(self.rank)] if scope == "group" else tuple(range(topology.world_size))

    def all_reduce(self, tensor: Tensor, op: Reduction = "sum", scope: Scope = "world") -> None:
        """Replaces a tensor by its sum or maximum over a scope. The result is bitwise equal on all of its ranks."""
        self.launch_all_reduce(tensor, op, scope).wait()

    def launch_all_reduce(self, tensor: Tensor, op: Reduction = "sum", scope: Scope = "world") -> Pending[None]:
        """Starts an `all_reduce` and returns at once. The tensor contains the result after `wait`."""
        check_reducible(tensor, op)
        if len(self.ranks(scope)) == 1:
            return Pending(lambda: None)
        held = tensor.detach()
        if not goes_by_firsts(self.topology, scope, "all_reduce", held.nbytes):
            return self._start_all_reduce(held, op, scope)
        self._start_all_reduce(held, op, "group").wait()
        under_way = self._start_all_reduce(held, op, "firsts") if self._is_first else None
        passed_on = self._passed_on(held, under_way)

        def finish() -> None:
            passed_on.wait()

        return Pending(finish)

    def all_gather(self, tensor: Tensor, scope: Scope = "world") -> Tensor:
        """Returns all ranks' tensors, stacked in rank order: (ranks in scope, *tensor.shape), for any dtype."""
        return self.launch_all_gather(tensor, scope).wait()

    def launch_all_gather(self, tensor: Tensor, scope: Scope = "world") -> Pending[Tensor]:
        """Starts an `all_gather` and returns at once. Its `wait` returns the result."""
        check_contiguous(tensor)
        if len(self.ranks(scope)) == 1:
            gathered = tensor.detach()[None].clone()
            return Pending(lambda: gathered)
        if not goes_by_firsts(self.topology, scope, "all_gather"):
            return self._start_all_gather(tensor.detach(), scope)
        rows = self._start_all_gather(tensor.detach(), "group").wait()
        under_way = self._start_all_gather(rows, "firsts") if self._is_first else None
        received = self._passed_on(rows.new_empty(self.topology.n_groups, *rows.shape), under_way)
        return Pending(lambda: received.wait().flatten(0, 1))

    def launch_exchange(self, rows: Tensor, scope: Scope = "world") -> Pending[Tensor]:
        """Starts to send row i of a tensor (ranks in scope, ...) of any dtype to the scope's i-th rank.

        Its `wait` returns the received rows, in rank order. A rank's own row is neither sent nor counted.
        """
        check_contiguous(rows)
        workers = len(self.ranks(scope))
        if rows.ndim == 0 or rows.shape[0] != workers:
            raise ValueError(f"cannot exchange shape {list(rows.shape)}: pass a tensor of {workers} rows, one per rank")
        if workers == 1:
            received = rows.detach().clone()
            return Pending(lambda: received)
        return self._start_exchange(rows.detach(), scope, nbytes=rows.nbytes - rows.nbytes // workers)

    def broadcast(self, tensor: Tensor, source: int, scope: Scope = "world") -> None:
        """Overwrites `tensor` on all ranks of a scope with that of world rank `source`, bit by bit, for any dtype."""
        check_contiguous(tensor)
        ranks = self.ranks(scope)
        if source not in ranks:
            raise ValueError(
                f"there is no rank {source} to broadcast from: give one of the ranks {ranks[0]} to {ranks[-1]}"
            )
        if len(ranks) > 1:
            self._broadcast(tensor.detach(), source, scope)

    @property
    def _is_first(self) -> bool:
        return self.topology.place_of(self.rank) == 0

    def _passed_on(self, outcome: Tensor, under_way: Pending[Tensor] | Pending[None] | None) -> Pending[Tensor]:
        """Gives the whole group the outcome of a collective that its first worker, and no other, has under way."""

        def finish() -> Tensor:
            received = None if under_way is None else under_way.wait()
            if received is not None:
                outcome.copy_(received)
            self._broadcast(outcome, self.ranks("group")[0], "group")
            return outcome

        return Pending(finish)

    def barrier(self) -> None:
        """Returns once every worker has called it."""
        if self.topology.world_size > 1:
            self._barrier()

    def cannot_carry(self, sync: Sync) -> str:
        """Returns the reason why the backend does not support `sync`; empty if it does. Communicates nothing."""
        return ""

    def begin_run(self) -> None:
        """Drops the state of gradient compression from an earlier run, such as PowerSGD's errors."""

    def data_parallel(
        self, module: nn.Module, scope: Scope, find_unused_parameters: bool = False, sync: GradientSync = PLAIN
    ) -> DataParallel:
        """Wraps `module` so that `backward` averages its gradients over the scope.

        The gradients of all parameters that require one at the time of this call are averaged. In training mode, each
        forward pass first copies the buffers of the scope's first rank, as in DDP. Tensors that the module tells DDP
        to ignore are neither averaged nor copied (see `abtrain.own`).

        Args:
            module: the model, on one device, with the same parameters on every rank of the scope.
            scope: the ranks to average over; one rank needs no synchronization.
            find_unused_parameters: whether a backward pass may leave some parameters without a gradient. If not, the
                next forward pass after it raises UsageError.
            sync: the settings of synchronization, such as the format in which gradients are sent.

        Raises:
            ConfigurationError: the backend does not support this wire format, or the model has SyncBatchNorm layers but
                its scope is one rank of a larger world.
        """
        if len(self.ranks(scope)) == 1 or not trained_parameters(module):
            return Unsynchronized(module)
        return self._wrap(module, scope, find_unused_parameters, sync)

    def _start_all_reduce(self, tensor: Tensor, op: Reduction, scope: Scope) -> Pending[None]:
        raise NotImplementedError

    def _start_all_gather(self, tensor: Tensor, scope: Scope) -> Pending[Tensor]:
        raise NotImplementedError

    def _start_exchange(self, rows: Tensor, scope: Scope, nbytes: int) -> Pending[Tensor]:
        raise NotImplementedError

    def _broadcast(self, tensor: Tensor, source: int, scope: Scope) -> None:
        raise NotImplementedError

    def _barrier(self) -> None:
        raise NotImplementedError

    def _wrap(self, module: nn.Module, scope: Scope, find_unused_parameters: bool, sync: GradientSync) -> DataParallel:
        raise NotImplementedError


class SingleProcess(Communicator):
    """A `Communicator` for a single worker. It sends nothing, and needs no `init_process_group`."""

    def __init__(self) -> None:
        super().__init__(0, Topology(world_size=1), torch.device("cpu"))


def goes_by_firsts(topology: Topology, scope: Scope, call: Call, nbytes: int = 0) -> bool:
    """Returns whether the first workers of the groups make a call over the world for all workers.

    Then a group collects the numbers of its workers, its first worker exchanges them with those of the other groups,
    and passes the outcome on. So the messages between groups are those of one worker for each group. Large sums are
    divided among the workers of a group instead, see `average_over_world`.
    """
    if scope != "world" or 1 in (topology.group_size, topology.n_groups):
        return False
    return call == "all_gather" or (call == "all_reduce" and nbytes <= SMALL)


def sent_by_call(call: Traffic, topology: Topology, rank: int = 0) -> Calls:
    """Returns the collectives that a worker makes for a call of its communicator."""
    if not goes_by_firsts(topology, call.scope, call.call, call.nbytes):
        return (call,)
    between, outcome = call.nbytes, call.nbytes
    if call.call == "all_gather":
        between, outcome = call.nbytes * topology.group_size, call.nbytes * topology.world_size
    inside, passed_on = replace(call, scope="group"), replace(call, call="broadcast", scope="group", nbytes=outcome)
    if topology.place_of(rank):
        return inside, passed_on
    return inside, replace(call, scope="firsts", nbytes=between), passed_on


def scope_spans(topology: Topology, scope: Scope) -> Spans:
    """Returns `between_groups` for a scope of several groups, otherwise `within_groups`."""
    return "between_groups" if scope != "group" and topology.n_groups > 1 else "within_groups"


def senders(topology: Topology, scope: Scope) -> int:
    """Returns how many workers of a group send payload of their own in a scope: all of them send to counterparts."""
    return topology.group_size if scope == "counterparts" else 1


def check_contiguous(tensor: Tensor) -> None:
    """Raises a ValueError for a tensor that is not contiguous: no backend can send it without a copy."""
    if not tensor.is_contiguous():
        raise ValueError(
            f"a collective needs a contiguous tensor, not one of shape {list(tensor.shape)} with strides "
            f"{list(tensor.stride())}: pass a copy made by .contiguous()"
        )


# The dtypes that both Gloo and NCCL reduce. For others, Gloo fails within a collective, with an error that looks as if
# a worker had died; it "sums" bool without a warning.
_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_REDUCIBLE = _FLOATS | {torch.int8, torch.uint8, torch.int32, torch.int64}


def check_reducible(tensor: Tensor, op: Reduction) -> None:
    """Raises a TypeError for a tensor that some backend cannot reduce, or reduces to wrong numbers."""
    check_contiguous(tensor)
    if tensor.dtype not in _REDUCIBLE and not (tensor.dtype.is_complex and op == "sum"):
        raise TypeError(
            f"all_reduce({op}) does not support {tensor.dtype}: convert it to float32 or int32, or use all_gather"
        )
