"""The contract between workers, and its form for one worker alone.

Everything else in abtrain talks to other workers through a `Communicator`, so the same engine runs on Gloo
and NCCL (`torch_distributed.py`), on threads of one process (`in_process.py`), and alone (`SingleProcess`,
here). Every collective is counted in the communicator's `meter`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from abtrain.comm.meter import Meter, Spans
from abtrain.comm.topology import Topology
from abtrain.recipes.sync import GradientSync, Sync

Scope = Literal["world", "group"]
Reduction = Literal["sum", "max"]
PLAIN = GradientSync()
Module = TypeVar("Module", bound=nn.Module)
T = TypeVar("T")


class Pending(Generic[T]):
    """A collective under way. Until `wait` has returned, what was handed over must not change."""

    def __init__(self, finish: Callable[[], T]) -> None:
        self._finish = finish

    def wait(self) -> T:
        """Its outcome, once it is there. To be called once, on all ranks in the order of the launches."""
        return self._finish()


class DataParallel(Protocol):
    """A model whose gradients are averaged over a scope while `backward` runs.

    With gradients disabled, a call is the model's own and talks to nobody: one rank may make it alone. Eval mode
    changes nothing by itself: models are fine-tuned in it, with their norms frozen.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def no_sync(self) -> AbstractContextManager[None]:
        """Gradients made by forward passes inside this context accumulate locally."""
        ...

    def arrivals(self) -> list[int]:
        """The order in which the first shared backward pass completed gradients, by the places of trained parameters.

        Buckets follow it from then on, and with them the order in which three or more ranks add up numbers. Empty
        before that pass, and where there are no buckets.
        """
        ...

    def follow(self, arrivals: Sequence[int]) -> None:
        """Lays out buckets as a wrapper that had these `arrivals` did. Sends nothing, and leaves no gradients.

        Raises:
            ValueError: arrivals of another number of parameters.
        """
        ...

    def spoiled(self) -> bool:
        """Whether what this worker brought to the last average held NaN or infinity."""
        ...

    def close(self) -> None:
        """Lets go of the model: no gradient is averaged from now on, and a call is an error."""
        ...


class Communicator(Protocol):
    """The operations that connect one worker with the others.

    Every call is collective over its scope: all of its ranks make it, in the same order. A scope of one rank does
    nothing and counts nothing. What `launch_...` starts goes on while the caller computes. `device` is where tensors
    must live for the backend to carry them; they are contiguous.

    Raises:
        ValueError: a tensor that is not contiguous.
        TypeError: a reduction of a dtype that not every backend can reduce (see `check_reducible`).
        PeerLostError: another worker died or did not answer in time.
    """

    rank: int
    topology: Topology
    device: torch.device
    meter: Meter

    def all_reduce(self, tensor: Tensor, op: Reduction = "sum", scope: Scope = "world") -> None:
        """Reduces in place; every rank of the scope ends with the same bits."""
        ...

    def all_gather(self, tensor: Tensor, scope: Scope = "world") -> Tensor:
        """Returns (ranks in scope, *tensor.shape), in rank order, for any dtype."""
        ...

    def cannot_carry(self, sync: Sync) -> str:
        """Why this way of agreeing is out of reach of the backend; empty if it is not. Talks to nobody."""
        ...

    def launch_all_reduce(self, tensor: Tensor, op: Reduction = "sum") -> Pending[None]:
        """Starts an `all_reduce` over the world."""
        ...

    def launch_all_gather(self, tensor: Tensor) -> Pending[Tensor]:
        """Starts an `all_gather` over the world."""
        ...

    def launch_exchange(self, rows: Tensor) -> Pending[Tensor]:
        """Sends row i of (world size, ...) to rank i; the outcome is the rows that came, in rank order. For any dtype.

        The own row stays where it is, and is not counted.
        """
        ...

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Overwrites `tensor` everywhere with that of world rank `source`, bit by bit, for any dtype."""
        ...

    def barrier(self) -> None:
        """Returns once every worker is here."""
        ...

    def begin_run(self) -> None:
        """Drops the state that gradient compression kept from an earlier run, such as PowerSGD's errors."""
        ...

    def data_parallel(
        self, module: nn.Module, scope: Scope, find_unused_parameters: bool = False, sync: GradientSync = PLAIN
    ) -> DataParallel:
        """Wraps `module` so that `backward` averages its gradients over the scope.

        Of the parameters, those that require a gradient at the time of the call take part. In training, buffers follow
        the scope's first rank at each forward pass, as in DDP. What the module tells DDP to ignore is left out of both
        (see `abtrain.own`). A scope of one rank needs no synchronization.

        Args:
            module: the model, on one device, with the same parameters on every rank of the scope.
            scope: over whom to average.
            find_unused_parameters: allow a backward pass that leaves some parameters without a gradient. Otherwise
                the forward pass after it raises UsageError.
        """
        ...


def nothing() -> None:
    """Does nothing when a wrapper closes that has changed nothing."""


class Unsynchronized:
    """The `DataParallel` of a scope of one rank, or of a model with nothing to train: the model as it is."""

    def __init__(self, module: nn.Module, at_close: Callable[[], None] = nothing) -> None:
        self._module: nn.Module | None = module
        self._at_close = at_close

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return still_open(self._module)(*args, **kwargs)

    def no_sync(self) -> AbstractContextManager[None]:
        return nullcontext()

    def arrivals(self) -> list[int]:
        return []

    def follow(self, arrivals: Sequence[int]) -> None:
        pass

    def spoiled(self) -> bool:
        return False

    def close(self) -> None:
        self._module = None
        self._at_close()


class SingleProcess:
    """The `Communicator` of a worker that is alone: no `init_process_group`, no communication."""

    def __init__(self, meter: Meter | None = None) -> None:
        self.rank = 0
        self.topology = Topology(world_size=1)
        self.device = torch.device("cpu")
        self.meter = meter or Meter()

    def all_reduce(self, tensor: Tensor, op: Reduction = "sum", scope: Scope = "world") -> None:
        check_reducible(tensor, op)

    def all_gather(self, tensor: Tensor, scope: Scope = "world") -> Tensor:
        check_contiguous(tensor)
        return tensor.detach()[None].clone()

    def launch_all_reduce(self, tensor: Tensor, op: Reduction = "sum") -> Pending[None]:
        check_reducible(tensor, op)
        return Pending(lambda: None)

    def launch_all_gather(self, tensor: Tensor) -> Pending[Tensor]:
        gathered = self.all_gather(tensor)
        return Pending(lambda: gathered)

    def launch_exchange(self, rows: Tensor) -> Pending[Tensor]:
        check_rows(rows, self.topology)
        received = rows.detach().clone()
        return Pending(lambda: received)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        check_source(source, self.topology)
        check_contiguous(tensor)

    def barrier(self) -> None:
        pass

    def cannot_carry(self, sync: Sync) -> str:
        return ""

    def begin_run(self) -> None: ...

    def data_parallel(
        self, module: nn.Module, scope: Scope, find_unused_parameters: bool = False, sync: GradientSync = PLAIN
    ) -> DataParallel:
        return Unsynchronized(module)


def scope_ranks(topology: Topology, rank: int, scope: Scope) -> tuple[int, ...]:
    """The world ranks of the scope that `rank` is in, in order."""
    return topology.groups[topology.group_of(rank)] if scope == "group" else tuple(range(topology.world_size))


def scope_spans(topology: Topology, scope: Scope) -> Spans:
    """Whether payload of this scope is meant for other groups: only if the scope holds more than one."""
    return "between_groups" if scope == "world" and topology.n_groups > 1 else "within_groups"


def check_contiguous(tensor: Tensor) -> None:
    """Refuses what no backend can carry as it lies in memory."""
    if not tensor.is_contiguous():
        raise ValueError(
            f"a collective needs a contiguous tensor, not one of shape {list(tensor.shape)} with strides "
            f"{list(tensor.stride())}: pass a copy made by .contiguous()"
        )


# What Gloo and NCCL can both reduce. Gloo finds out about the rest in the middle of a collective, where it
# looks as if a peer had gone; bool it "sums" without a warning.
_REDUCIBLE = frozenset(
    {torch.float16, torch.bfloat16, torch.float32, torch.float64} | {torch.int8, torch.uint8, torch.int32, torch.int64}
)


def check_reducible(tensor: Tensor, op: Reduction) -> None:
    """Refuses what some backend cannot reduce, or not without a surprise."""
    check_contiguous(tensor)
    if tensor.dtype not in _REDUCIBLE and not (tensor.dtype.is_complex and op == "sum"):
        raise TypeError(
            f"all_reduce({op}) cannot take {tensor.dtype}: convert it to float32 or int32, or all_gather it"
        )


def check_rows(rows: Tensor, topology: Topology) -> None:
    """Refuses what does not have one row for each rank of the world."""
    check_contiguous(rows)
    if rows.ndim == 0 or rows.shape[0] != topology.world_size:
        raise ValueError(
            f"exchange of a tensor of shape {list(rows.shape)}: it needs {topology.world_size} rows, one for each rank"
        )


def check_source(source: int, topology: Topology) -> None:
    """Refuses a source that is no rank of the world."""
    if not 0 <= source < topology.world_size:
        raise ValueError(f"broadcast from rank {source}: ranks go from 0 to {topology.world_size - 1} in this world")


def still_open(module: Module | None) -> Module:
    """Returns the wrapped module; raises RuntimeError after `close`."""
    if module is None:
        raise RuntimeError("this data-parallel wrapper was closed: make a new one with data_parallel()")
    return module
