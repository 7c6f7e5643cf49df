"""Who is missing when a worker is lost. A collective only says that somebody is."""

from __future__ import annotations

import contextlib
import itertools
import platform
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

_WAIT_SECONDS = 2.0
"""For the others' word. Those who lose a peer notice at about the same time."""
_STORE_SECONDS = 2.0
"""More than a store that can be reached takes to answer."""
_PAUSE_SECONDS = 0.05
_HERE = "here"
_LONGEST_WORD = 300


def host_key(rank: int) -> str:
    """Under which a worker says in the store which host it is on."""
    return f"host/{rank}"


class Peers:
    """The workers of one attempt, who leave word in the store when they lose a peer or end before their time.

    No call raises an error or takes longer than seconds, even if the store is gone.

    Args:
        store: of these workers alone, in which each may have left its host (see `host_key`).
        rank: of this worker.
        world_size: how many workers there are.
    """

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self._store = store
        self._rank = rank
        self._others = [other for other in range(world_size) if other != rank]
        self._hosts: dict[int, str] = {}
        self._words: dict[int, str] = {}
        self._told = ""

    def learn_hosts(self) -> None:
        """Asks where the others are, while the store can still be reached."""
        _within(_STORE_SECONDS, self._ask_for_hosts)

    def leave_word(self, error: BaseException) -> None:
        """Tells those who will miss this worker why it ended."""
        text = str(error)
        word = f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"[:_LONGEST_WORD]
        _within(_STORE_SECONDS, lambda: self._store.set(_key(self._rank), word))

    def roll_call(self) -> str:
        """Waits a moment for the others' word; a sentence on who is missing, or what they said. Once: it is kept."""
        self._told = self._told or self._ask_around()
        return self._told

    def _ask_around(self) -> str:
        if not _within(_WAIT_SECONDS + _STORE_SECONDS, self._call_roll):
            return (
                "Who is missing cannot be told, since the store where workers meet is out of reach: the process that "
                "held it has ended, or the link to it is cut"
            )
        ended = [f"{self._name(other)} ended ({word})" for other, word in self._words.items() if word != _HERE]
        silent = [self._name(other) for other in self._others if other not in self._words]
        if silent:
            ended.append(f"no word from {', '.join(silent)}: it died, froze, is out of reach, or is still computing")
        told = "; ".join(ended) or "all others are there and lost a peer too: a link between workers failed or is slow"
        return f"{told[0].upper()}{told[1:]}"

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self._hosts[rank]}" if rank in self._hosts else f"rank {rank}"

    def _ask_for_hosts(self) -> None:
        for other in self._others:
            if other not in self._hosts and self._store.check([host_key(other)]):
                self._hosts[other] = self._store.get(host_key(other)).decode()

    def _call_roll(self) -> None:
        self._store.set(_key(self._rank), _HERE)
        self._ask_for_hosts()
        deadline = time.monotonic() + _WAIT_SECONDS
        while True:
            for other in self._others:
                if other not in self._words and self._store.check([_key(other)]):
                    self._words[other] = self._store.get(_key(other)).decode()
            if len(self._words) == len(self._others) or time.monotonic() > deadline:
                return
            time.sleep(_PAUSE_SECONDS)


_worlds = itertools.count()


def peers_of_world() -> Peers:
    """The workers of torch.distributed's world. All workers call it, as often as the others."""
    # A world may see several of them, and what was said to one of them says nothing to the next.
    distributed: Any = dist.distributed_c10d
    store = PrefixStore(f"abtrain/{next(_worlds)}", distributed._get_default_store())
    rank, size = dist.get_rank(), dist.get_world_size()
    _within(_STORE_SECONDS, lambda: store.set(host_key(rank), platform.node()))
    return Peers(store, rank, size)


def _key(rank: int) -> str:
    return f"word/{rank}"


def _within(seconds: float, call: Callable[[], None]) -> bool:
    """Makes a call that may fail or hang; whether it came back in time, and without an error."""
    done = threading.Event()

    def work() -> None:
        with contextlib.suppress(Exception):
            call()
            done.set()

    thread = threading.Thread(target=work, name="abtrain roll call", daemon=True)
    thread.start()
    thread.join(seconds)
    return done.is_set()
