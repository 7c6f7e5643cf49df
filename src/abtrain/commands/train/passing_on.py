"""Passes requests to stop on from the launcher to its workers."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

from torch.distributed.elastic.multiprocessing import SignalException

from abtrain.commands.train.requests import PASSED_ON, SIGNALS, Afterwards, Requests

_RETRY_SECONDS = 0.1


class PassingOn:
    """Inside it, a request to stop goes on to the workers, which obey it at any time, importing or training.

    A first request has the launcher wait for them to save; a second one ends them at once. PyTorch's launcher does both
    when it meets a SignalException. That is raised in whatever the main thread does, which may be a destructor or a
    callback, where Python drops it. So a thread sends the signal again until the exception is being handled.
    """

    def __init__(self) -> None:
        self._requests = Requests()
        self._before: dict[int, Any] = {}
        self._error: SignalException | None = None
        self._asked = threading.Event()
        self._over = threading.Event()
        self._retries = False
        self._thread = threading.Thread(target=self._insist, name="abtrain requests", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()
        self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._asked.set()
        self._thread.join()
        for number, handler in self._before.items():
            signal.signal(number, Afterwards(self._requests, handler) if self._requests.number else handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._over.is_set():
            return
        if self._retries:
            self._retries = False
            if self._error is not None and not _is_handled(self._error):
                raise self._error
            return
        first = not self._requests.number
        again = self._requests.note(number)
        name = signal.Signals(number).name
        if first:
            self._error = SignalException(f"stopped on request ({name})", PASSED_ON)
        elif again:
            self._error = SignalException(f"stopped at once on a second request ({name})", signal.SIGTERM)
        else:
            return
        self._asked.set()
        raise self._error

    def _insist(self) -> None:
        self._asked.wait()
        while not self._over.wait(_RETRY_SECONDS):
            self._retries = True
            os.kill(os.getpid(), self._requests.number)


def _is_handled(error: BaseException) -> bool:
    """Whether the main thread, interrupted in a signal handler, is in a clause that handles the error."""
    current = sys.exc_info()[1]
    while current is not None:
        if current is error:
            return True
        current = current.__context__
    return False
