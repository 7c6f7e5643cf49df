"""Dumps the stacks of all threads and exits if a worker hangs."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from abtrain.commands.files import whole_file
from abtrain.errors import PeerLostError

# Collectives that time out have this long to raise their own error, which is more specific.
_MARGIN_SECONDS = 10.0


class Watchdog:
    """Makes a worker that hangs write the stacks of its threads and exit, inside this context.

    A worker hangs if it does not call `beat` for longer than the other workers wait for it. Collectives have their own
    time-outs. The watchdog is for hangs elsewhere, and for backends without time-outs.

    Args:
        seconds: the number of seconds that workers wait for each other.
        who: the name of the worker, for the message.
        file: the file for the stacks; None for standard error.
    """

    def __init__(self, seconds: float, who: str, file: Path | None) -> None:
        self._seconds = seconds
        self._who = who
        self._file = file
        self._place = "at the start"
        self._last = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="abtrain watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if isinstance(error, PeerLostError):
            self.dump()

    def beat(self, place: str) -> None:
        """Records that the worker makes progress. A message about a hang includes `place`, which says what is next."""
        self._place, self._last = place, time.monotonic()

    def dump(self) -> str:
        """Writes the stacks of all threads, and returns the name of the file or stream."""
        if self._file is None:
            faulthandler.dump_traceback(sys.__stderr__ or sys.stderr, all_threads=True)
            return "standard error"
        try:
            with whole_file(self._file) as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            return f"nowhere ({error})"
        return str(self._file)

    def _watch(self) -> None:
        limit = self._seconds + _MARGIN_SECONDS
        while not self._over.wait(min(1.0, limit / 4)):
            if time.monotonic() - self._last > limit:
                where = self.dump()
                print(
                    f"abtrain: error: {self._who} made no progress for {limit:g} s ({self._place}) and exits. "
                    f"Stacks of its threads: {where}",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(PeerLostError.exit_code)
