"""Counts the bytes that a worker passes to collectives, and the seconds that it waits for them.

Payload is counted when it is passed to a collective, so it does not depend on how a backend routes it. The bytes that
cross the network interface (wire bytes) also depend on the collective's algorithm, headers and retransmissions.
"""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

Spans = Literal["between_groups", "within_groups"]


class Meter:
    """Counts one worker's payload in bytes by phase and by scope, and its seconds of waiting.

    `phase` is the name under which the next payload is counted, and `step` the number of steps done; the engine
    sets both. Counting is thread-safe, since autograd may run hooks in its own threads.
    """

    def __init__(self) -> None:
        self.phase = "setup"
        self.step = 0
        self.sync_seconds = 0.0
        self._by_scope: dict[str, int] = {"between_groups": 0, "within_groups": 0}
        self._by_phase: dict[str, int] = {}
        self._of_group: dict[str, int] = {}
        self._waits = 0
        self._waiting_since = 0.0
        self._lock = threading.Lock()

    @property
    def where(self) -> str:
        """The step, the phase and the host of this worker, for messages."""
        return f"step {self.step}, phase {self.phase!r}, host {platform.node()}"

    def count(self, nbytes: int, spans: Spans, senders: int = 1) -> None:
        """Adds payload to the current phase.

        `spans` says whether the payload also goes to other groups, and `senders` how many workers of the group send as
        much of their own there. The others sum their payload within the group first.
        """
        if nbytes == 0:
            return
        with self._lock:
            self._by_scope[spans] += nbytes
            self._by_phase[self.phase] = self._by_phase.get(self.phase, 0) + nbytes
            if spans == "between_groups":
                self._of_group[self.phase] = self._of_group.get(self.phase, 0) + nbytes * senders

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Adds the wall time spent inside the context to `sync_seconds`. Nested or overlapping waits count once."""
        with self._lock:
            self._waits += 1
            if self._waits == 1:
                self._waiting_since = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._waits -= 1
                if self._waits == 0:
                    self.sync_seconds += time.perf_counter() - self._waiting_since

    def payload(self) -> dict[str, Any]:
        """Returns the bytes so far: `total`, `between_groups`, `within_groups`, and for each phase in `by_phase`.

        All are the worker's. On the first worker of a group, `of_group` has, for each phase, the bytes that the group
        sends to other groups.
        """
        with self._lock:
            total = sum(self._by_scope.values())
            return {
                "total": total,
                **self._by_scope,
                "by_phase": dict(self._by_phase),
                "of_group": dict(self._of_group),
            }

    def state_dict(self) -> dict[str, Any]:
        """Returns the phase, the payload and the seconds of waiting as JSON values."""
        with self._lock:
            return {
                "phase": self.phase,
                "sync_seconds": self.sync_seconds,
                "by_scope": dict(self._by_scope),
                "by_phase": dict(self._by_phase),
                "of_group": dict(self._of_group),
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replaces the phase, the payload and the seconds of waiting by those of a `state_dict`."""
        with self._lock:
            self.phase = str(state["phase"])
            self.sync_seconds = float(state["sync_seconds"])
            self._by_scope = {spans: int(state["by_scope"][spans]) for spans in self._by_scope}
            self._by_phase = {str(phase): int(nbytes) for phase, nbytes in state["by_phase"].items()}
            self._of_group = {str(phase): int(nbytes) for phase, nbytes in state["of_group"].items()}
