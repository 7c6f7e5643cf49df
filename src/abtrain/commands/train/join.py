"""How the workers of one attempt at a run find each other in a store that may hold what earlier attempts left.

torchrun keeps its store when it starts workers again, and with it the addresses of workers that are gone. Whoever reads
those before they are replaced waits for nobody. So every attempt meets under a name of its own.
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
    """The part of a store that belongs to this attempt alone. All workers call it.

    Each worker says hello by a number that nobody had before. Rank 0 answers every number that it sees, old ones in
    vain, with the name of the meeting, until all have been there. Nobody waits in native code, where a request to stop
    would not be seen.

    Args:
        store: that all workers reach.
        rank: of this worker.
        world_size: how many there are.
        seconds: how long to wait for the others.

    Raises:
        PeerLostError: not all came in time; on rank 0 it names those who did not. Or the store is out of reach.
    """
    with _in_reach(rank, world_size):
        return _welcome(store, world_size, seconds) if rank == 0 else _arrive(store, rank, seconds)


def launch_of(store: Store, rank: int, world_size: int) -> str:
    """Identifies one launch with all its attempts: the launcher's store outlives them.

    Args:
        store: the launcher's, and not the part of it that belongs to an attempt.
        rank: of this worker.
        world_size: how many there are.

    Raises:
        PeerLostError: the store is out of reach.
    """
    with _in_reach(rank, world_size):
        return str(store.compare_set("launch", "", uuid.uuid4().hex).decode())


@contextlib.contextmanager
def _in_reach(rank: int, world_size: int) -> Iterator[None]:
    try:
        yield
    except dist.DistError as error:
        raise PeerLostError(
            f"rank {rank} cannot meet the others of {world_size}: the store where workers meet is out of reach. The "
            "worker or launcher that held it has ended, or the link to it is cut: look at their output"
        ) from error


def _arrive(store: Store, rank: int, seconds: float) -> Store:
    number = uuid.uuid4().hex
    store.set(f"hello/{rank}", number)
    pause, deadline = _PAUSE_SECONDS, time.monotonic() + seconds
    while not store.check([f"welcome/{number}"]):
        if time.monotonic() > deadline:
            raise PeerLostError(
                f"rank {rank} was alone for {seconds:g} s at the start: rank 0 did not come. Look at its output, or "
                "give more time with --timeout"
            )
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
    meeting = PrefixStore(store.get(f"welcome/{number}").decode(), store)
    meeting.set(host_key(rank), platform.node())
    return meeting


def _welcome(store: Store, world_size: int, seconds: float) -> Store:
    name = uuid.uuid4().hex
    meeting = PrefixStore(name, store)
    meeting.set(host_key(0), platform.node())
    missing, welcomed, deadline = set(range(1, world_size)), set(), time.monotonic() + seconds
    while missing:
        for rank in sorted(missing):
            if meeting.check([host_key(rank)]):
                missing.remove(rank)
            elif store.check([f"hello/{rank}"]):
                number = store.get(f"hello/{rank}").decode()
                if number not in welcomed:
                    store.set(f"welcome/{number}", name)
                    welcomed.add(number)
        if missing and time.monotonic() > deadline:
            raise PeerLostError(
                f"rank {', '.join(map(str, sorted(missing)))} of {world_size} did not come within {seconds:g} s: look "
                "at its output, or give more time with --timeout"
            )
        time.sleep(_PAUSE_SECONDS if missing else 0)
    return meeting
