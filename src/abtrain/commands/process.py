"""Handles requests to stop in the process of a command, and ends the process.

A request to stop is a SIGTERM, SIGINT or SIGHUP that a person or a scheduler sends.
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
"""The signal with which the launcher passes a request to stop on to its workers.

Schedulers often signal all processes of a run at the same time. If the launcher passed this signal on
as SIGTERM, each worker would receive the same request twice, the second time seconds later if the launcher is slow.
"""
UNREAD = 128 + signal.SIGPIPE
"""The exit code of a command whose reader has ended, as `head` does: the same as for programs that SIGPIPE ends."""
SAME_REQUEST_SECONDS = 5.0
"""Signals within this many seconds after the first one count as the same request.

Python cannot handle a signal while the process waits in native code. Workers wait for each other for up to two seconds
before they agree to stop. A worker may therefore handle a signal two seconds after another worker does.
"""


class Requests:
    """Records the first request to stop that a process receives, and recognizes repetitions of it.

    Attributes:
        number: the number of the signal that was the first request; 0 if there was none.
    """

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0

    def note(self, number: int) -> bool:
        """Records a signal. Returns whether it is a second request, rather than a repetition of the first."""
        now = time.monotonic()
        if not self.number:
            self.number, self._since = signal.SIGTERM if number == PASSED_ON else number, now
            return False
        return number != PASSED_ON and now - self._since > SAME_REQUEST_SECONDS

    def handled_by(self, handler: Handler, numbers: Iterable[int] = SIGNALS) -> contextlib.AbstractContextManager[None]:
        """Returns a context in which these signals call `handler`.

        After the context the former handlers apply again, wrapped in `Afterwards` if a request arrived. Outside the
        main thread the context does nothing, because Python sets and runs signal handlers in the main thread only.
        """
        if threading.current_thread() is not threading.main_thread():
            return contextlib.nullcontext()
        return handling(handler, numbers, lambda former: Afterwards(self, former) if self.number else former)


class Afterwards:
    """The signal handler after a stopped run. It ignores repetitions of the request that stopped the run.

    Args:
        requests: the requests that the run received.
        before: the handler from before the run, which is called at a new request.
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
    """Installs `handler` for these signals inside the context, and `restored(former handler)` afterwards."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, restored(former))


@contextlib.contextmanager
def stopped_by_signals(kept: str = "") -> Iterator[None]:
    """Raises StoppedError at the first request to stop, and ignores further ones until the context ends.

    The message ends with `kept`, which says what remains and how to continue.
    """

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for other in SIGNALS:
            signal.signal(other, signal.SIG_IGN)  # nothing must interrupt the cleaning up
        raise StoppedError(f"{stopped_message(number)}{kept}")

    with handling(stop):
        yield


def stopped_message(number: int) -> str:
    """Returns the message of a command that was stopped by this signal."""
    return f"stopped on request ({signal.Signals(number).name})"


def end_at_once() -> None:
    """Makes any later request to stop end this process immediately, even while it waits in native code."""
    for number in (*SIGNALS, PASSED_ON):
        signal.signal(number, signal.SIG_DFL)


def ignore_all() -> None:
    """Ignores all later requests to stop, because this process is about to end."""
    for number in (*SIGNALS, PASSED_ON):
        signal.signal(number, _ignore)


def _ignore(number: int, frame: FrameType | None) -> None:
    """Ignores a signal. With SIG_IGN, Python would complain about a signal that has arrived but is not yet handled."""


@contextlib.contextmanager
def ends_with_its_reader() -> Iterator[None]:
    """Exits with code UNREAD and without a message if the reader of standard output, such as `head`, has ended."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        discard_output()
        sys.exit(UNREAD)


def discard_output() -> None:
    """Discards all further output. Otherwise Python would try to write the rest of it when the process ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def leave(code: int) -> NoReturn:
    """Ends this process immediately with an exit code.

    Gloo's threads may still hold tensors. If one of them releases a tensor while Python shuts down, the process aborts
    (SIGABRT) and the exit code is lost.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BrokenPipeError):
            stream.flush()
    os._exit(code)
