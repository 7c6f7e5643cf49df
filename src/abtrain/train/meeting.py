"""How the workers of one attempt at a run find each other in a store that may hold what earlier attempts left.

torchrun keeps its store when it starts workers again, and with it the addresses of workers that are gone. Whoever reads
those before they are replaced waits for nobody. So every attempt meets under a name of its own.
"""

from __future__ import annotations

import time
import uuid

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from abtrain.errors import PeerLostError

_PAUSE_SECONDS = 0.05


def meet(store: Store, rank: int, world_size: int, seconds: float) -> Store:
    """The part of a store that belongs to this attempt alone. All workers call it.

    Each worker says hello by a number that nobody had before. Rank 0 answers every number that it sees, old ones in
    vain, with the name of the meeting, until all have been there.

    Args:
        store: that all workers reach; its own time-out is `seconds` too.
        rank: of this worker.
        world_size: how many there are.
        seconds: how long to wait for the others.

    Raises:
        PeerLostError: not all came in time; on rank 0 it names those who did not.
    """
    number = uuid.uuid4().hex
    if rank == 0:
        _welcome(store, number, world_size, seconds)
        return PrefixStore(number, store)
    store.set(f"hello/{rank}", number)
    try:
        meeting = store.get(f"welcome/{number}").decode()
    except RuntimeError as error:
        raise PeerLostError(f"rank {rank} was alone for {seconds:g} s at the start: rank 0 did not come") from error
    store.set(f"here/{meeting}/{rank}", "1")
    return PrefixStore(meeting, store)


def _welcome(store: Store, meeting: str, world_size: int, seconds: float) -> None:
    missing, welcomed, deadline = set(range(1, world_size)), set(), time.monotonic() + seconds
    while missing:
        for rank in sorted(missing):
            if store.check([f"here/{meeting}/{rank}"]):
                missing.remove(rank)
            elif store.check([f"hello/{rank}"]):
                number = store.get(f"hello/{rank}").decode()
                if number not in welcomed:
                    store.set(f"welcome/{number}", meeting)
                    welcomed.add(number)
        if missing and time.monotonic() > deadline:
            raise PeerLostError(
                f"rank {', '.join(map(str, sorted(missing)))} of {world_size} did not come within {seconds:g} s: look "
                "at its output, or give more time with --timeout"
            )
        time.sleep(_PAUSE_SECONDS if missing else 0)
