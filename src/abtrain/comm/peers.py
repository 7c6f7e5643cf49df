"""Finds out which workers are lost, since a failed collective does not name them."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import platform
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

_WAIT_SECONDS = 2.0
"""Seconds to wait for messages of the other workers, which notice a lost worker at about the same time."""
_STORE_SECONDS = 2.0
"""Seconds within which a reachable store answers."""
_PAUSE_SECONDS = 0.05
_HERE = "here"
_LONGEST_WORD = 300
_BROKEN = (errno.EPIPE, errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH)
_SIGNS_OF_LOSS = ("timeout", "timed out", "connect", "by peer", *(os.strerror(one).lower() for one in _BROKEN))
"""Words in Gloo's messages about a lost worker. Gloo has no separate exception for this."""
_OF_A_STORE = ("wait timeout", "timeout waiting for key")
"""How messages of a `FileStore` begin if a worker has not written what the others wait for."""


def is_loss(error: RuntimeError) -> bool:
    """Whether an error of torch.distributed means that another worker, or the store, is lost or out of reach."""
    message = str(error).lower()
    of_gloo = "gloo" in message and any(sign in message for sign in _SIGNS_OF_LOSS)
    return isinstance(error, dist.DistError) or of_gloo or message.startswith(_OF_A_STORE)


def host_key(rank: int) -> str:
    """Returns the key in torch.distributed's store under which a worker stores the name of its host."""
    return f"host/{rank}"


class Peers:
    """Lets a worker leave a message in the store when it ends early or loses another worker, and read others' messages.

    Only the workers of one run use the store. Each may have stored its host name there (see `host_key`). No call
    raises an error or takes more than a few seconds, even if the store is gone.
    """

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self._store, self._rank = store, rank
        self._others = [other for other in range(world_size) if other != rank]
        self._hosts: dict[int, str] = {}
        self._words: dict[int, str] = {}
        self._findings = ""
        self._asked: Counter[str] = Counter()

    @property
    def has_lost_one(self) -> bool:
        """Whether this worker has lost another one, and asked who is missing."""
        return bool(self._findings)

    def learn_hosts(self) -> None:
        """Reads the host names of the other workers, while the store can still be reached."""
        _within(_STORE_SECONDS, lambda: self._read(host_key, self._hosts))

    def leave_word(self, error: BaseException) -> None:
        """Leaves a message in the store that explains why this worker ended."""
        text = str(error)
        word = f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"[:_LONGEST_WORD]
        _within(_STORE_SECONDS, lambda: self._store.set(_word_key(self._rank), word))

    def is_first(self, place: str) -> bool:
        """Returns whether this worker is the first that asks at this place; True if the store cannot be reached.

        Workers that come to a place again ask anew.
        """
        counts: list[int] = []
        self._asked[place] += 1
        key = f"first/{place}/{self._asked[place]}"
        _within(_STORE_SECONDS, lambda: counts.append(self._store.add(key, 1)))
        return counts in ([], [1])

    def roll_call(self) -> str:
        """Returns a sentence that names missing and ended workers. The first call waits for other workers' messages."""
        self._findings = self._findings or self._ask()
        return self._findings

    def _ask(self) -> str:
        if not _within(_WAIT_SECONDS + _STORE_SECONDS, self._collect_words):
            return (
                "The missing workers are unknown, since torch.distributed's store cannot be reached: the process that "
                "hosts it has ended, or the link to it is down"
            )
        found = [f"{self._name(other)} ended ({word})" for other, word in sorted(self._words.items()) if word != _HERE]
        silent = [self._name(other) for other in self._others if other not in self._words]
        if silent:
            found.append(
                f"no message from {', '.join(silent)}: it died, froze, is out of reach, waits elsewhere, or ended "
                "early because it has fewer batches"
            )
        text = "; ".join(found) or "all others responded and lost a worker too: a link between them failed or is slow"
        return f"{text[0].upper()}{text[1:]}"

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self._hosts[rank]}" if rank in self._hosts else f"rank {rank}"

    def _collect_words(self) -> None:
        self._store.set(_word_key(self._rank), _HERE)
        self._read(host_key, self._hosts)
        deadline = time.monotonic() + _WAIT_SECONDS
        while True:
            self._read(_word_key, self._words)
            if len(self._words) == len(self._others) or time.monotonic() > deadline:
                return
            time.sleep(_PAUSE_SECONDS)

    def _read(self, key: Callable[[int], str], texts: dict[int, str]) -> None:
        """Adds to `texts`, by rank, what other workers have stored under `key(rank)`, unless it is there already."""
        for other in self._others:
            if other not in texts and self._store.check([key(other)]):
                texts[other] = self._store.get(key(other)).decode()


_worlds = itertools.count()


def peers_of_world() -> Peers:
    """Returns the `Peers` of torch.distributed's world. All workers must call this the same number of times."""
    # One world may have several `Peers`. Each has its own keys, so none reads the messages of an earlier one.
    distributed: Any = dist.distributed_c10d
    store = PrefixStore(f"abtrain/{next(_worlds)}", distributed._get_default_store())
    rank, size = dist.get_rank(), dist.get_world_size()
    _within(_STORE_SECONDS, lambda: store.set(host_key(rank), platform.node()))
    return Peers(store, rank, size)


def _word_key(rank: int) -> str:
    return f"word/{rank}"


def _within(seconds: float, call: Callable[[], None]) -> bool:
    """Runs a function that may fail or hang, in a thread. Returns whether it succeeded within `seconds`."""
    done = threading.Event()

    def work() -> None:
        with contextlib.suppress(Exception):
            call()
            done.set()

    thread = threading.Thread(target=work, name="abtrain roll call", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # a process that ends starts no threads from Python 3.12 on
        work()
        return done.is_set()
    thread.join(seconds)
    return done.is_set()
