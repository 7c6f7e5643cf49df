"""Starts the workers of a run on this machine, watches them, and restarts them if one dies.

PyTorch's elastic launcher starts the workers, which find each other through files. PyTorch's usual TCPStore would
listen on all network interfaces; with files, nothing listens beyond the loopback interface.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from abtrain.commands.files import is_regular, read_regular
from abtrain.commands.output import Output
from abtrain.commands.process import PASSED_ON, SIGNALS, Requests, stopped_message
from abtrain.commands.train import worker
from abtrain.commands.train.config import TrainConfig
from abtrain.commands.train.config_file import to_toml
from abtrain.commands.train.folder_content import OUTCOME_FILE, RESULT_FILE
from abtrain.commands.train.run_folder import default_folder
from abtrain.commands.train.world import LAUNCH
from abtrain.errors import AbtrainError, ConfigurationError, OutOfMemoryError, PeerLostError, StoppedError
from abtrain.failpoints import ATTEMPT

log = logging.getLogger("abtrain")

_SHUTDOWN_SECONDS = 30  # workers have this long to save and exit, as under torchrun
_RETRY_SECONDS = 0.1
_PROGRAM = "abtrain.commands.train"
_RESTARTED = frozenset({AbtrainError.exit_code, PeerLostError.exit_code})
"""Exit codes of attempts that are worth repeating: a worker died, or an unforeseen error occurred."""


def start_workers(config: TrainConfig) -> None:
    """Starts the workers of a run, and returns when all have finished.

    Raises:
        StoppedError: a request to stop was received, and all workers have ended.
        AbtrainError: the error of the worker that failed first; all others have ended.
    """
    # All attempts use the same folder.
    config = dataclasses.replace(config, out=config.out or default_folder(config))
    # PyTorch's launcher would log the errors that are raised here a second time, at length.
    launcher_log = logging.getLogger("torch.distributed.elastic")
    launcher_log.propagate = False
    launcher_log.addHandler(logging.NullHandler())
    started = time.time()
    try:
        with PassingOn():
            _start_until_done(config)
    except SignalException as stopped:
        # A run that is already evaluating finishes: there is nothing left to stop.
        if not _is_done(config, started):
            raise StoppedError(f"{stopped}{_kept(config, started)}") from None
    finally:
        # A worker that was killed could not restore the cursor that its progress bar hid.
        Output().show_cursor()


def _is_done(config: TrainConfig, started: float) -> bool:
    """Whether the run folder contains a result that was written after the time `started`."""
    result = None if config.out is None else config.out / RESULT_FILE
    return result is not None and is_regular(result) and result.stat().st_mtime >= started


def _kept(config: TrainConfig, started: float) -> str:
    """Returns the end of rank 0's message about the stopped run, which says what was saved; empty without a message.

    Messages from before the time `started` do not count.
    """
    assert config.out is not None
    outcome = config.out / OUTCOME_FILE
    try:
        told = json.loads(read_regular(outcome))["message"] if outcome.stat().st_mtime >= started else ""
    except (OSError, ValueError, KeyError):
        return ""
    _, comma, kept = told.partition(", ")
    return comma + kept


def _start_until_done(config: TrainConfig) -> None:
    """Starts the workers, and restarts them if one dies, up to the number of times in the settings.

    Raises:
        AbtrainError: the error of the last attempt. There is no further attempt after an error that would occur again,
            or after a request to stop.
        SignalException: this process received a request to stop.
    """
    launch, started = uuid.uuid4().hex, time.time()
    for attempt in itertools.count():
        # Workers that are stopped during start-up may still write into this folder while it is removed.
        scratch = tempfile.TemporaryDirectory(prefix="abtrain-", ignore_cleanup_errors=True)
        with scratch as name, _worker_environment(attempt, launch):
            folder = Path(name)
            (folder / worker.SETTINGS_FILE).write_text(to_toml(config), encoding="utf-8")
            try:
                elastic_launch(_launch_config(config, folder), sys.executable)("-m", _PROGRAM, name)
                return
            except ChildFailedError as failed:
                error = _first_error(list(failed.failures.values()))
        last = attempt == config.max_restarts or _is_done(config, started)
        if error.exit_code not in _RESTARTED or last:
            raise error
        log.info("%s", error)
        log.info("restarting all workers (restart %d of at most %d)", attempt + 1, config.max_restarts)


def _launch_config(config: TrainConfig, folder: Path) -> LaunchConfig:
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=config.workers,
        run_id="abtrain",
        role="worker",
        rdzv_backend="c10d",
        rdzv_endpoint=str(folder / "rendezvous"),
        rdzv_configs={"store_type": "file"},
        max_restarts=0,  # it would restart workers after any error
        local_addr="127.0.0.1",
        logs_specs=DefaultLogsSpecs(log_dir=str(folder)),
        # `PassingOn` handles the signals that request a stop.
        signals_to_handle="SIGQUIT",
        shutdown_timeout=_SHUTDOWN_SECONDS,
    )


@contextlib.contextmanager
def _worker_environment(attempt: int = 0, launch: str = "") -> Iterator[None]:
    """Sets environment variables for the workers of an attempt inside the context, and restores them after it."""
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    before = dict(os.environ)
    os.environ |= {
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": loopback,
        # Otherwise the launcher opens a TCPStore for the workers, on all interfaces.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        ATTEMPT: str(attempt),
        LAUNCH: launch,
    }
    # As torchrun does: workers that each use all cores slow each other down.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class PassingOn:
    """Passes requests to stop from the launcher to its workers, inside this context.

    At the first request the launcher waits for the workers to save; a second one ends them immediately. PyTorch's
    launcher does both at a SignalException, which a signal handler raises in whatever code the main thread is running.
    If this code is a destructor or a callback, Python drops the exception. A thread therefore repeats the signal until
    the exception is being handled.
    """

    def __init__(self) -> None:
        self._requests = Requests()
        self._handlers = contextlib.ExitStack()
        self._error: SignalException | None = None
        self._asked = threading.Event()
        self._over = threading.Event()
        self._retries = False
        self._thread = threading.Thread(target=self._insist, name="abtrain requests", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()
        self._handlers.enter_context(self._requests.handled_by(self._note))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._asked.set()
        self._thread.join()
        self._handlers.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._over.is_set():
            return
        if self._retries:
            self._retries = False
            if self._error is not None and not _is_handled(self._error):
                raise self._error
            return
        first = not self._requests.number
        again = self._requests.note(number)
        if first:
            self._error = SignalException(stopped_message(number), PASSED_ON)
        elif again:
            name = signal.Signals(number).name
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
    """Whether the main thread, interrupted by a signal, is inside an `except` or `finally` clause for the error."""
    current = sys.exc_info()[1]
    while current is not None:
        if current is error:
            return True
        current = current.__context__
    return False


def _first_error(failures: list[ProcessFailure]) -> AbtrainError:
    """Returns the error of the worker that failed first. Most of the other failures are consequences of this one."""
    # A worker that had to be killed long after the first failure did not react to signals, because it was frozen.
    long_before = min(failure.timestamp for failure in failures) + _SHUTDOWN_SECONDS - 1
    frozen = [f for f in failures if f.exitcode == -signal.SIGKILL and f.timestamp >= long_before]
    rest = [failure for failure in failures if failure not in frozen] or failures
    first = min(rest, key=lambda failure: (_is_consequence(failure), failure.timestamp))
    if -first.exitcode in (*SIGNALS, PASSED_ON):
        name = first.signal_name()
        return StoppedError(f"stopped on request ({name} at worker {first.local_rank}, before training began)")
    if first.exitcode < 0:
        why = "if the machine ran out of memory, use fewer --workers or a smaller --batch-size"
        remedy = f": {why}" if first.exitcode == -signal.SIGKILL else ""
        return PeerLostError(f"worker {first.local_rank} was killed by {first.signal_name()}{remedy}")
    error = _error_of(first)
    if frozen and type(error) is PeerLostError:
        ranks = ", ".join(str(failure.local_rank) for failure in frozen)
        return PeerLostError(
            f"{error}. The launcher killed worker {ranks}, which was frozen: for {_SHUTDOWN_SECONDS} s it did not "
            "react to SIGTERM"
        )
    return error


def _error_of(failure: ProcessFailure) -> AbtrainError:
    """Returns the error that a worker wrote to its error file before it ended."""
    content = failure.error_file_data.get("message", "")
    if not isinstance(content, dict):
        return AbtrainError(
            f"worker {failure.local_rank} ended with exit code {failure.exitcode} and without an error message: look "
            "at the output above"
        )
    kind = {kind.exit_code: kind for kind in AbtrainError.__subclasses__()}.get(failure.exitcode)
    if kind is None:  # an unforeseen error needs its traceback
        return AbtrainError(f"worker {failure.local_rank} failed\n{content['extraInfo']['py_callstack']}")
    message = content["message"].partition(": ")[2]
    return ConfigurationError(message.splitlines()) if kind is ConfigurationError else kind(message)


def _is_consequence(failure: ProcessFailure) -> bool:
    """Whether a worker ended only because another worker had ended before."""
    content = failure.error_file_data.get("message", "")
    own = isinstance(content, dict) and content["message"].startswith(f"{OutOfMemoryError.__name__}: ")
    # A worker that loses its peers during its shutdown aborts.
    ended = failure.exitcode in (-signal.SIGTERM, -PASSED_ON, -signal.SIGABRT)
    return ended or (failure.exitcode == PeerLostError.exit_code and not own)
