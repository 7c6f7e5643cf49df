"""Requests to stop a process: SIGTERM, SIGINT or SIGHUP, from a person or a scheduler, or passed on by the launcher."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PASSED_ON = signal.SIGUSR1
"""Passes a request on from the launcher to its workers.

Schedulers often signal all processes of a run at once. If the launcher passed that on as SIGTERM, each worker would get
the same request twice, seconds apart where the launcher is slow.
"""
SAME_REQUEST_SECONDS = 5.0
"""Signals that are handled sooner after the first one are the same request.

Python handles none while the process waits for others in native code. Workers that are about to agree on a stop make
each other wait up to two seconds, so a signal that came at once may be handled that much later.
"""


class Requests:
    """Counts the requests to stop that a process gets.

    Attributes:
        number: the signal of the first request; 0 before it.
    """

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0

    def note(self, number: int) -> bool:
        """Notes a signal; whether it is a second request."""
        now = time.monotonic()
        if not self.number:
            self.number, self._since = signal.SIGTERM if number == PASSED_ON else number, now
            return False
        return number != PASSED_ON and now - self._since > SAME_REQUEST_SECONDS


class Afterwards:
    """A handler for after a run that was stopped: the same request, seen again, does nothing.

    Args:
        requests: that the run got.
        before: the handler to call at another request.
    """

    def __init__(self, requests: Requests, before: Any) -> None:
        self._requests = requests
        self.before: Any = before.before if isinstance(before, Afterwards) else before

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self._requests.note(number):
            return
        if callable(self.before):
            self.before(number, frame)
        elif self.before == signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def end_at_once() -> None:
    """From here on any request ends this process at once, also where it waits in native code."""
    for number in (*SIGNALS, PASSED_ON):
        signal.signal(number, signal.SIG_DFL)


def ignore_all() -> None:
    """From here on requests do nothing: this process is at its end."""
    for number in (*SIGNALS, PASSED_ON):
        signal.signal(number, _ignore)


def _ignore(number: int, frame: FrameType | None) -> None:
    """In place of SIG_IGN, of which Python complains if the signal has come already and waits to be handled."""
