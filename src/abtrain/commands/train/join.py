"""Lets the workers of one attempt at a run find each other in a store that may have entries of earlier attempts.

torchrun keeps its store when it restarts workers, so the store still has the addresses of ended workers. A worker that
read such an address would wait for a process that no longer exists. Each attempt therefore uses a new prefix in the
store.
"""

from __future__ import annotations

import contextlib
import platform
import time
import uuid
from collections.abc import Iterator

import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from abtrain.comm.peers import host_key
from abtrain.errors import PeerLostError

_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.02, 0.5


def meet(store: Store, rank: int, world_size: int, seconds: float) -> Store:
    """Waits for all workers, and returns a part of the store that only this attempt uses. All workers call it.

    Each worker writes a new identifier. Rank 0 answers every identifier that it reads, including those of earlier
    attempts, with the prefix of this attempt, until all workers have arrived. Workers poll the store, because a worker
    that waited in native code could not react to a request to stop.

    Args:
        store: a store that all workers can reach.
        rank: the rank of this worker.
        world_size: the number of workers.
        seconds: the longest time in seconds to wait for the other workers.

    Raises:
        PeerLostError: not all workers connected in time (rank 0 names the missing ones), or the store cannot be
            reached.
    """
    with _in_reach(rank, world_size):
        return _host_meeting(store, world_size, seconds) if rank == 0 else _arrive(store, rank, seconds)


def launch_of(store: Store, rank: int, world_size: int) -> str:
    """Returns a name for this start of the command: the same on all workers, and again after restarts by torchrun.

    The first worker that calls the function writes the name to the store, and the others read it.

    Args:
        store: the launcher's store itself, not the part that `meet` returns.
        rank: the rank of this worker.
        world_size: the number of workers.

    Raises:
        PeerLostError: the store cannot be reached.
    """
    with _in_reach(rank, world_size):
        return str(store.compare_set("launch", "", uuid.uuid4().hex).decode())


@contextlib.contextmanager
def _in_reach(rank: int, world_size: int) -> Iterator[None]:
    try:
        yield
    except dist.DistError as error:
        raise PeerLostError(
            f"rank {rank} of {world_size} cannot connect to the other workers: it cannot reach the store that they "
            "connect through. The worker or launcher that hosts the store has ended, or the network connection to it "
            "is lost. Look at the output of that worker or launcher"
        ) from error


def _arrive(store: Store, rank: int, seconds: float) -> Store:
    identifier = uuid.uuid4().hex
    store.set(f"hello/{rank}", identifier)
    pause, deadline = _PAUSE_SECONDS, time.monotonic() + seconds
    while not store.check([f"welcome/{identifier}"]):
        if time.monotonic() > deadline:
            raise PeerLostError(
                f"rank {rank} waited {seconds:g} s at the start, and rank 0 did not connect: look at the output of "
                "rank 0, or allow more time with --timeout"
            )
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
    meeting = PrefixStore(store.get(f"welcome/{identifier}").decode(), store)
    meeting.set(host_key(rank), platform.node())
    return meeting


def _host_meeting(store: Store, world_size: int, seconds: float) -> Store:
    name = uuid.uuid4().hex
    meeting = PrefixStore(name, store)
    meeting.set(host_key(0), platform.node())
    missing, welcomed, deadline = set(range(1, world_size)), set(), time.monotonic() + seconds
    while missing:
        for rank in sorted(missing):
            if meeting.check([host_key(rank)]):
                missing.remove(rank)
            elif store.check([f"hello/{rank}"]):
                identifier = store.get(f"hello/{rank}").decode()
                if identifier not in welcomed:
                    store.set(f"welcome/{identifier}", name)
                    welcomed.add(identifier)
        if missing and time.monotonic() > deadline:
            raise PeerLostError(
                f"{len(missing)} of {world_size} workers did not connect within {seconds:g} s (ranks: "
                f"{', '.join(map(str, sorted(missing)))}): look at their output, or allow more time with --timeout"
            )
        time.sleep(_PAUSE_SECONDS if missing else 0)
    return meeting
