"""Implements the communication interfaces on torch.distributed: Gloo on CPU, NCCL on GPU.

On NCCL a collective is queued on the current CUDA stream, as always in PyTorch. The meter then measures only the time
that queueing takes, and NCCL's watchdog ends the process if a peer is lost.
"""

from __future__ import annotations

import os
import platform
import zlib
from collections.abc import Sequence
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from abtrain.comm.checksums import as_bytes
from abtrain.comm.communicator import (
    PLAIN,
    Communicator,
    Pending,
    Reduction,
    Scope,
    SingleProcess,
    scope_spans,
    senders,
)
from abtrain.comm.data_parallel import DataParallel
from abtrain.comm.ddp import TorchDataParallel
from abtrain.comm.hooks import GradientHook, make_hook
from abtrain.comm.link import Link
from abtrain.comm.peers import peers_of_world
from abtrain.comm.sharded import ShardedDataParallel
from abtrain.comm.sync_batch_norm import point_sync_batch_norm
from abtrain.comm.topology import Topology, default_group_size
from abtrain.errors import ConfigurationError
from abtrain.own import trained_parameters
from abtrain.recipes.sync import GradientSync, Sync
from abtrain.shards import fsdp_modules

# "undefined": init_process_group was given no backend, and uses NCCL for CUDA tensors and Gloo for the rest.
_NARROW_BACKENDS = ("gloo", "nccl", "undefined")
_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


def default_communicator(group_size: int | None = None) -> Communicator:
    """Returns a `TorchCommunicator` if torch.distributed is initialized, and otherwise a `SingleProcess`.

    Args:
        group_size: the number of workers in a group, the same on all workers. None: see `default_group_size`.

    Raises:
        ConfigurationError: the group size does not divide the number of workers, or differs between workers; machines
            have different numbers of workers, and no group size is given; or the environment variable WORLD_SIZE
            announces workers that this process has not joined.
    """
    if dist.is_initialized():
        return TorchCommunicator(Topology(dist.get_world_size(), _agreed_group_size(group_size)))
    announced = os.environ.get("WORLD_SIZE", "1")
    if announced.isdecimal() and int(announced) > 1:
        raise ConfigurationError(
            f"WORLD_SIZE is {announced}, but this process has not joined the other workers: call "
            "torch.distributed.init_process_group() first, or unset WORLD_SIZE to train alone"
        )
    Topology(world_size=1, group_size=1 if group_size is None else group_size)  # refuses other sizes
    return SingleProcess()


class TorchCommunicator(Communicator):
    """A `Communicator` for one process of an initialized torch.distributed world.

    The constructor is collective, since it creates the groups. All ranks pass the same topology.

    Raises:
        ConfigurationError: torch.distributed is not initialized, or its world size differs from the topology's.
    """

    def __init__(self, topology: Topology) -> None:
        if not dist.is_initialized():
            raise ConfigurationError(
                "torch.distributed is not initialized: call torch.distributed.init_process_group() first, and start "
                "the workers with torchrun"
            )
        world_size = dist.get_world_size()
        if world_size != topology.world_size:
            raise ConfigurationError(
                f"the topology is for {topology.world_size} workers, but torch.distributed has {world_size}: make it "
                f"Topology({world_size}, group_size)"
            )
        super().__init__(dist.get_rank(), topology, _device_of_backend())
        self.peers = peers_of_world()
        self._groups = self._make_groups()
        for scope in self._groups:
            # Finds an unreachable rank now, and not in the first phase that uses the group.
            self._link(scope).launch("all_reduce", dist.all_reduce, torch.zeros(1, device=self.device)).wait()
        self._hooks: dict[tuple[GradientSync, Scope, tuple[torch.Size, ...]], GradientHook] = {}

    def _start_all_reduce(self, tensor: Tensor, op: Reduction, scope: Scope) -> Pending[None]:
        return self._link(scope).start(f"all_reduce({op})", tensor.nbytes, dist.all_reduce, tensor, op=_OPS[op])

    def _start_all_gather(self, tensor: Tensor, scope: Scope) -> Pending[Tensor]:
        link = self._link(scope)
        gathered = tensor.new_empty(len(link.ranks), *tensor.shape)
        rows = list(as_bytes(gathered).view(len(link.ranks), tensor.nbytes))
        return link.start("all_gather", tensor.nbytes, dist.all_gather, rows, as_bytes(tensor), outcome=gathered)

    def _start_exchange(self, rows: Tensor, scope: Scope, nbytes: int) -> Pending[Tensor]:
        received = torch.empty_like(rows)
        tensors = as_bytes(received), as_bytes(rows)
        return self._link(scope).start("exchange", nbytes, dist.all_to_all_single, *tensors, outcome=received)

    def _broadcast(self, tensor: Tensor, source: int, scope: Scope) -> None:
        self._link(scope).broadcast(tensor, source)

    def _barrier(self) -> None:
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        with self.meter.waiting():
            self._link("world").launch("barrier", dist.barrier, device_ids=device_ids).wait()

    def cannot_carry(self, sync: Sync) -> str:
        backend = str(dist.get_backend())
        if sync is None or sync.wire == "fp32" or any(known in backend for known in _NARROW_BACKENDS):
            return ""
        return (
            f"the wire format {sync.wire!r} works only on the backends gloo and nccl, not on {backend!r}: use the wire "
            "format fp32, or one of these backends"
        )

    def begin_run(self) -> None:
        self._hooks.clear()

    def data_parallel(
        self, module: nn.Module, scope: Scope, find_unused_parameters: bool = False, sync: GradientSync = PLAIN
    ) -> DataParallel:
        with point_sync_batch_norm(module, self._link(scope), alone=self.topology.world_size == 1) as pointed:
            parallel = super().data_parallel(module, scope, find_unused_parameters, sync)
            parallel.at_close.callback(pointed.pop_all().close)
        return parallel

    def _wrap(self, module: nn.Module, scope: Scope, find_unused_parameters: bool, sync: GradientSync) -> DataParallel:
        if any(fsdp_modules(module)):
            return ShardedDataParallel(module)
        link = self._link(scope)
        # The same shapes get the same hook, since its state outlives phases.
        key = (sync, scope, tuple(p.shape for p in trained_parameters(module).values()))
        if key not in self._hooks:
            self._hooks[key] = make_hook(sync, link.group)
        return TorchDataParallel(module, link, find_unused_parameters, self._hooks[key])

    def _link(self, scope: Scope) -> Link:
        return Link(
            rank=self.rank,
            ranks=self.ranks(scope),
            group=self._groups.get("counterparts" if scope == "firsts" else scope),
            spans=scope_spans(self.topology, scope),
            meter=self.meter,
            peers=self.peers,
            senders=senders(self.topology, scope),
        )

    def _make_groups(self) -> dict[Scope, dist.ProcessGroup]:
        """Creates this rank's process groups, by scope; none if each scope is a single rank or the world."""
        topology = self.topology
        if topology.group_size in (1, topology.world_size):
            return {}
        rows = {"group": topology.groups, "counterparts": tuple(map(topology.counterparts, topology.groups[0]))}
        return {cast(Scope, scope): self._make_group(ranks) for scope, ranks in rows.items()}

    def _make_group(self, scopes: Sequence[Sequence[int]]) -> dist.ProcessGroup:
        """Creates a process group for each of several lists of ranks, and returns the one with this rank."""
        mine, _ = dist.new_subgroups_by_enumeration(list(map(list, scopes)), timeout=_world_timeout(self.device))
        return cast(dist.ProcessGroup, mine)


def _device_of_backend() -> torch.device:
    backend = str(dist.get_backend())
    if "nccl" in backend or (backend == "undefined" and torch.cuda.is_available()):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _world_timeout(device: torch.device) -> timedelta | None:
    """Returns the timeout of init_process_group, for new groups, which would otherwise use PyTorch's default."""
    options = getattr(dist.group.WORLD._get_backend(device), "options", None)  # type: ignore[union-attr]
    timeout: timedelta | None = getattr(options, "_timeout", None)
    return timeout


def _agreed_group_size(group_size: int | None) -> int:
    """Returns the group size that all workers ask for, or the default. Collective over the world."""
    # Numbers are limited to fit into the tensor; `Topology` refuses impossible sizes.
    asked = -1 if group_size is None else max(-1, min(int(group_size), 2**62))
    comm = TorchCommunicator(Topology(dist.get_world_size()))
    row = torch.tensor([asked, _machine(comm.rank)], dtype=torch.int64, device=comm.device)
    sizes, machines = comm.all_gather(row).T.tolist()
    if len(set(sizes)) > 1:
        given = ", ".join(f"{'none' if size < 0 else size} on rank {rank}" for rank, size in enumerate(sizes))
        raise ConfigurationError(f"group_size differs between workers ({given}): give all workers the same value")
    return default_group_size(machines) if group_size is None else group_size


def _machine(rank: int) -> int:
    """Returns an identifier of this machine: its first rank if the launcher gives it, otherwise a hash of its name."""
    local_rank, local_size = (os.environ.get(name, "") for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    # Hosts in containers and network namespaces may share a name, so the launcher's variables come first.
    if local_size.isdecimal() and int(local_size) and local_rank.isdecimal() and int(local_rank) <= rank:
        return rank - int(local_rank)
    return 2**32 + zlib.crc32(platform.node().encode())
