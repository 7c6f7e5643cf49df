"""The process of a command: how requests to stop reach it, and how it ends.

A request to stop is SIGTERM, SIGINT or SIGHUP, from a person or a scheduler.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, NoReturn

from abtrain.errors import StoppedError

Handler = Callable[[int, FrameType | None], object]

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PASSED_ON = signal.SIGUSR1
"""Passes a request on from the launcher to its workers.

Schedulers often signal all processes of a run at the same time. If the launcher passed that on as SIGTERM, each worker
would receive the same request twice, seconds apart if the launcher is slow.
"""
SAME_REQUEST_SECONDS = 5.0
"""Signals within this time after the first one are the same request.

Python handles no signal while the process waits in native code. Workers that are about to agree on a stop make each
other wait up to two seconds, so a signal that was sent at the same time may be handled that much later.
"""


class Requests:
    """Counts the requests to stop that a process receives.

    Attributes:
        number: the signal of the first request; 0 before it.
    """

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0

    def note(self, number: int) -> bool:
        """Records a signal and returns whether it is a second request."""
        now = time.monotonic()
        if not self.number:
            self.number, self._since = signal.SIGTERM if number == PASSED_ON else number, now
            return False
        return number != PASSED_ON and now - self._since > SAME_REQUEST_SECONDS

    def handled_by(self, handler: Handler, numbers: Iterable[int] = SIGNALS) -> contextlib.AbstractContextManager[None]:
        """Returns a context in which these signals call `handler`.

        After a request the former handlers return as `Afterwards`. In threads other than the main thread the context
        does nothing: only the main thread can set handlers, and only it is interrupted.
        """
        if threading.current_thread() is not threading.main_thread():
            return contextlib.nullcontext()
        return handling(handler, numbers, lambda former: Afterwards(self, former) if self.number else former)


class Afterwards:
    """The signal handler after a stopped run. It ignores repetitions of the same request.

    Args:
        requests: the requests that the run received.
        before: the handler to call at a new request.
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


@contextlib.contextmanager
def handling(
    handler: Handler, numbers: Iterable[int] = SIGNALS, restored: Callable[[Any], Any] = lambda former: former
) -> Iterator[None]:
    """Calls `handler` at these signals inside the context, and sets `restored(former handler)` after it."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, restored(former))


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Raises StoppedError at the first request to stop, and ignores further ones until the context ends."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for other in SIGNALS:
            signal.signal(other, signal.SIG_IGN)  # cleaning up takes a moment and must not be interrupted
        raise StoppedError(stopped_message(number))

    with handling(stop):
        yield


def stopped_message(number: int) -> str:
    """Returns the message of a command that was stopped by this signal."""
    return f"stopped on request ({signal.Signals(number).name})"


def end_at_once() -> None:
    """Makes any request end this process immediately from now on, even while it waits in native code."""
    for number in (*SIGNALS, PASSED_ON):
        signal.signal(number, signal.SIG_DFL)


def ignore_all() -> None:
    """Ignores requests from now on, because this process is about to end."""
    for number in (*SIGNALS, PASSED_ON):
        signal.signal(number, _ignore)


def _ignore(number: int, frame: FrameType | None) -> None:
    """Replaces SIG_IGN, which makes Python complain if a signal has arrived and is not handled yet."""


def leave(code: int) -> NoReturn:
    """Ends this process immediately with an exit code.

    Gloo's threads may still hold tensors. If one of them releases a tensor while Python shuts down, the process aborts
    (SIGABRT) and the exit code is lost.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
