"""Where the workers of a run come from: torchrun, this process alone, or processes that we start.

Workers of our own start through PyTorch's elastic launcher and find each other through files, so that nothing listens
beyond the loopback interface: a TCPStore, PyTorch's usual meeting place, listens on all of them whatever its host name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from abtrain import failpoints as faults
from abtrain.commands.tasks.task import TASKS
from abtrain.commands.train import worker
from abtrain.commands.train.config import TrainConfig, notices, resolve
from abtrain.commands.train.config_file import to_toml
from abtrain.commands.train.config_problems import validate
from abtrain.commands.train.folder_content import RESULT_FILE
from abtrain.commands.train.passing_on import PassingOn
from abtrain.commands.train.requests import PASSED_ON, SIGNALS, ignore_all
from abtrain.commands.train.run_folder import default_folder
from abtrain.commands.train.world import check_world, is_joined
from abtrain.errors import AbtrainError, ConfigurationError, OutOfMemoryError, PeerLostError, StoppedError
from abtrain.failpoints import ATTEMPT
from abtrain.files import is_regular

log = logging.getLogger("abtrain")

_SHUTDOWN_SECONDS = 30  # that workers have to save and to end by themselves; as with torchrun
PROGRAM = "abtrain.commands.train"
"""The module that is a worker, as a program."""
_STARTED_AGAIN = frozenset({AbtrainError.exit_code, PeerLostError.exit_code})
"""Exit codes of runs that may go well the next time: a worker died, or something happened that nobody foresaw."""


def run(config: TrainConfig) -> None:
    """Trains as `config` says, and returns when all workers are done.

    Raises:
        ConfigurationError: all that is wrong with the settings, before anything starts.
        DataError: the task's data is not to be had; also before anything starts.
        StoppedError: SIGINT, SIGTERM or SIGHUP; all workers have ended.
        AbtrainError: what made the first worker fail; all others have ended.
    """
    check_world()
    faults.check()
    joined, said = is_joined(), list[str]()
    if joined:
        config, said = _take_world_size(config)
    problems = validate(config)
    if problems:
        raise ConfigurationError(problems)
    said += notices(config)
    config = resolve(config)
    TASKS[config.task].find(config.data)
    worker.set_up_log()
    for line in said:
        log.info(line)
    if config.workers > 1 and not joined:
        _start_workers(config)
        return
    if joined:
        try:
            worker.train_together(config)
        finally:
            # This process is at its end anyway: torchrun, which now ends its workers, need not interrupt that.
            ignore_all()
    else:
        worker.train_alone(config)


def _take_world_size(config: TrainConfig) -> tuple[TrainConfig, list[str]]:
    world_size = int(os.environ["WORLD_SIZE"])
    said = []
    if config.workers not in (world_size, TrainConfig.workers):
        said.append(f"--workers {config.workers} plays no part: torchrun started {world_size}")
    if config.out is None and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        said.append("without --out every restart begins anew, in a folder of its own: name one")
    return dataclasses.replace(config, workers=world_size), said


def _start_workers(config: TrainConfig) -> None:
    # The same for all attempts.
    config = dataclasses.replace(config, out=config.out or default_folder(config))
    # The launcher's own log repeats, at length, what is raised here.
    launcher_log = logging.getLogger("torch.distributed.elastic")
    launcher_log.propagate = False
    launcher_log.addHandler(logging.NullHandler())
    started = time.time()
    try:
        with PassingOn():
            _start_until_done(config)
    except SignalException as stopped:
        # They end what they are at, and where that is the evaluation there is nothing left to stop.
        if not _is_done(config, started):
            raise StoppedError(str(stopped)) from None
    finally:
        # A worker that was killed could not bring the cursor back that its progress bar hid.
        Console().show_cursor()


def _is_done(config: TrainConfig, started: float) -> bool:
    """Whether a run has come to its end since this launch started."""
    if config.out is None:
        return False
    result = config.out / RESULT_FILE
    return is_regular(result) and result.stat().st_mtime >= started


def _start_until_done(config: TrainConfig) -> None:
    """Starts workers, and starts them again where one of them died, as often as the settings allow.

    Raises:
        AbtrainError: what made the first worker fail, in the last attempt. Errors that would come again, and a request
            to stop, leave no other attempt.
        SignalException: this process was asked to stop.
    """
    launch, started = uuid.uuid4().hex, time.time()
    for attempt in itertools.count():
        # Workers that are told to stop while they start may still write into it.
        scratch = tempfile.TemporaryDirectory(prefix="abtrain-", ignore_cleanup_errors=True)
        with scratch as name, _worker_environment(attempt, launch):
            folder = Path(name)
            (folder / worker.SETTINGS_FILE).write_text(to_toml(config), encoding="utf-8")
            try:
                elastic_launch(_launch_config(config, folder), sys.executable)("-m", PROGRAM, name)
                return
            except ChildFailedError as failed:
                error = _first_error(list(failed.failures.values()))
        last = attempt == config.max_restarts or _is_done(config, started)
        if error.exit_code not in _STARTED_AGAIN or last:
            raise error
        log.info("%s", error)
        log.info("workers are started again, for the %d. of %d times", attempt + 1, config.max_restarts)


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
        max_restarts=0,  # it would start workers again whatever ended them
        local_addr="127.0.0.1",
        logs_specs=DefaultLogsSpecs(log_dir=str(folder)),
        # The others are ours to handle, see `PassingOn`.
        signals_to_handle="SIGQUIT",
        shutdown_timeout=_SHUTDOWN_SECONDS,
    )


@contextlib.contextmanager
def _worker_environment(attempt: int = 0, launch: str = "") -> Iterator[None]:
    """The variables that workers inherit from this process while they start, for the `attempt`th time again."""
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    before = dict(os.environ)
    os.environ |= {
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": loopback,
        # Or else the launcher opens a TCPStore for the workers, on all interfaces.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        ATTEMPT: str(attempt),
        worker.LAUNCH: launch,
    }
    # As torchrun does: workers that each take all cores are slower together.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _first_error(failures: list[ProcessFailure]) -> AbtrainError:
    """Returns the error that made the run fail, as it was raised in the worker."""
    # Who had to be killed although others had failed long before did not obey: it was frozen, or out of reach.
    long_before = min(failure.timestamp for failure in failures) + _SHUTDOWN_SECONDS - 1
    deaf = [f for f in failures if f.exitcode == -signal.SIGKILL and f.timestamp >= long_before]
    rest = [failure for failure in failures if failure not in deaf] or failures
    first = min(rest, key=lambda failure: (_is_consequence(failure), failure.timestamp))
    if -first.exitcode in (*SIGNALS, PASSED_ON):
        name = first.signal_name()
        return StoppedError(f"stopped on request ({name} at worker {first.local_rank}, before training began)")
    if first.exitcode < 0:
        why = "if the machine ran out of memory, use fewer --workers or a smaller --batch-size"
        remedy = f": {why}" if first.exitcode == -signal.SIGKILL else ""
        return PeerLostError(f"worker {first.local_rank} was killed by {first.signal_name()}{remedy}")
    content = first.error_file_data.get("message", "")
    if not isinstance(content, dict):
        return AbtrainError(f"worker {first.local_rank} ended with exit code {first.exitcode} and left no message")
    kind = {kind.exit_code: kind for kind in AbtrainError.__subclasses__()}.get(first.exitcode)
    if kind is None:  # an error that nobody foresaw: where it happened is what helps
        return AbtrainError(f"worker {first.local_rank} failed\n{content['extraInfo']['py_callstack']}")
    message = content["message"].partition(": ")[2]
    if deaf and kind is PeerLostError:
        ranks = ", ".join(str(failure.local_rank) for failure in deaf)
        message += f". Worker {ranks} did not obey SIGTERM for {_SHUTDOWN_SECONDS} s and was killed: it was frozen"
    return ConfigurationError(message.splitlines()) if kind is ConfigurationError else kind(message)


def _is_consequence(failure: ProcessFailure) -> bool:
    """Whether a worker ended because another one had."""
    content = failure.error_file_data.get("message", "")
    own = isinstance(content, dict) and content["message"].startswith(f"{OutOfMemoryError.__name__}: ")
    # A worker that loses its peers in the midst of its end aborts.
    ended = failure.exitcode in (-signal.SIGTERM, -PASSED_ON, -signal.SIGABRT)
    return ended or (failure.exitcode == PeerLostError.exit_code and not own)
