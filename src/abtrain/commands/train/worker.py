"""Runs one worker: joins the other workers, if there are any, and trains.

`main` is the program of a worker that `launcher.py` starts, `python -m abtrain.commands.train FOLDER`. FOLDER
contains the settings, and the file through which the workers find each other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import threading
import time
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import FileStore, PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.distributed.rendezvous import rendezvous

from abtrain.comm.communicator import Communicator
from abtrain.comm.peers import Peers, is_loss
from abtrain.comm.torch_distributed import TorchCommunicator, default_communicator
from abtrain.commands.process import end_at_once, ignore_all
from abtrain.commands.train.config import TrainConfig
from abtrain.commands.train.config_file import from_toml
from abtrain.commands.train.join import launch_of, meet
from abtrain.commands.train.loop import train
from abtrain.commands.train.world import LAUNCH, is_first, joined_world
from abtrain.errors import AbtrainError, ConfigurationError, OutOfMemoryError, PeerLostError, StoppedError

_NO_MEMORY = "DefaultCPUAllocator: "
"""The start of torch's message when CPU memory is exhausted. torch has no separate exception for this."""
SETTINGS_FILE = "config.toml"
STORE_FILE = "store"
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # the name that torch gives it
_START_SECONDS = 30.0
"""The time limit for connecting. All workers are present, so connecting takes less than a second unless one is lost."""


def set_up_log() -> None:
    """Sends the library's log to standard error. Of several workers, only rank 0 logs or warns; all report errors."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("abtrain: note: %(message)s"))
    log = logging.getLogger("abtrain")
    log.addHandler(handler)
    log.setLevel(logging.INFO if is_first() else logging.ERROR)
    if not is_first():
        warnings.simplefilter("ignore")


def train_alone(config: TrainConfig) -> None:
    """Trains in this process as the only worker."""
    communicator = default_communicator(config.group_size)
    # A single worker sends nothing, so any device works.
    communicator.device = torch.device(config.device)
    with memory_named(rank=0):
        train(_grouped(config, communicator), communicator)


def _grouped(config: TrainConfig, communicator: Communicator) -> TrainConfig:
    """Returns the settings with the group size that the workers have agreed on."""
    return dataclasses.replace(config, group_size=communicator.topology.group_size)


def train_together(config: TrainConfig, store: Store | None = None) -> None:
    """Joins the other workers, which torchrun's environment variables describe, and trains with them.

    Args:
        config: the settings, validated and resolved; `workers` equals WORLD_SIZE.
        store: the store through which the workers find each other; by default the one at MASTER_ADDR.
    """
    world = joined_world(at_master=store is None)
    if config.device == "cuda":
        torch.cuda.set_device(world.local_rank)
    rank, timeout = world.rank, timedelta(seconds=config.timeout)
    if store is None:
        store = _announced_store(rank, config.workers, timeout)
    store.set_timeout(timeout)
    launch = os.environ.get(LAUNCH) or launch_of(store, rank, config.workers)
    store = meet(store, rank, config.workers, config.timeout)
    peers = Peers(store, rank, config.workers)
    try:
        with _losses_named(peers, rank), memory_named(rank):
            communicator = _join(config, store, rank)
            peers.learn_hosts()
            if isinstance(communicator, TorchCommunicator):
                communicator.peers = peers  # workers leave the reason for their end in its store
            train(_grouped(config, communicator), communicator, PrefixStore("stopping", store), launch)
    except BaseException:
        with contextlib.suppress(Exception):  # an error of its own would hide the one that ended the training
            _leave()
        raise
    _leave()


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _join(config: TrainConfig, store: Store, rank: int) -> Communicator:
    """Creates the process groups. All workers are present by now, so a short time limit suffices.

    Raises:
        PeerLostError: another worker ended, or it could not be reached.
    """
    timeout = timedelta(seconds=config.timeout)
    # NCCL connects in its first collectives, which may take longer, and uses only the store here.
    first = timedelta(seconds=min(config.timeout, _START_SECONDS))
    store.set_timeout(first)
    try:
        dist.init_process_group(
            "nccl" if config.device == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=config.workers,
            timeout=timeout if config.device == "cuda" else first,
        )
        communicator = default_communicator(config.group_size)
        # After the barrier all workers have found the settings valid. Only then may rank 0 create a run folder.
        communicator.barrier()
    except RuntimeError as error:
        if not is_loss(error):
            raise
        raise PeerLostError(
            f"rank {rank} lost another worker during start-up: all {config.workers} workers had started, but "
            f"connecting them failed ({_first_line(error)}). Look at the other workers' output"
        ) from error
    _wait_as_long_as(timeout, store)
    return communicator


def _wait_as_long_as(timeout: timedelta, store: Store) -> None:
    """Sets the time-out of all later collectives and of the store."""
    store.set_timeout(timeout)
    distributed: Any = dist.distributed_c10d
    # The function is public since torch 2.14.
    set_timeout = getattr(dist, "set_timeout", None) or distributed._set_pg_timeout
    for group in list(distributed._world.pg_map):
        set_timeout(timeout, group)


@contextlib.contextmanager
def _losses_named(peers: Peers, rank: int) -> Iterator[None]:
    """Makes each error about a lost peer a PeerLostError with the missing ranks. Reports other errors to the others."""
    try:
        yield
    except OutOfMemoryError as error:
        peers.leave_word(error)
        raise
    except PeerLostError as error:
        missing = peers.roll_call()
        if missing in str(error):
            raise
        raise PeerLostError(f"{error}. {missing}") from error
    except BaseException as error:
        if isinstance(error, RuntimeError) and is_loss(error):
            found = f"rank {rank} lost another worker ({_first_line(error)}). {peers.roll_call()}"
            raise PeerLostError(f"{found}. Look at the first error in the other workers' output") from error
        peers.leave_word(error)
        raise


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]


def _announced_store(rank: int, world_size: int, timeout: timedelta) -> Store:
    """Returns the store at MASTER_ADDR and MASTER_PORT.

    Raises:
        ConfigurationError: another program listens there.
        PeerLostError: the worker that hosts the store, or a worker that should connect to it, did not start in time.
    """
    try:
        store: Store
        store, _, _ = next(rendezvous("env://", rank, world_size, timeout=timeout))
    except dist.DistError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        if "EADDRINUSE" in str(error):
            raise ConfigurationError(
                f"another program listens at {place}, where workers should connect: give torchrun another --master-port"
            ) from error
        raise PeerLostError(
            f"rank {rank} waited {timeout.total_seconds():g} s for all {world_size} workers to connect to {place}, and "
            "some did not: look at the output of the other workers, or allow more time with --timeout"
        ) from error
    return store


@contextlib.contextmanager
def memory_named(rank: int) -> Iterator[None]:
    """Converts all errors of torch and Python about exhausted memory to OutOfMemoryError, inside this context."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        message = str(error)
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and _NO_MEMORY not in message:
            raise
        reason = message.splitlines()[0] if message else type(error).__name__
        raise OutOfMemoryError(
            f"rank {rank} ran out of memory ({reason}): use a smaller --batch-size, or fewer --workers on this machine"
        ) from error


def main(folder: Path) -> int:
    """Trains as a worker of `launcher.py`, and returns the exit code. Writes an error to the launcher's error file."""
    end_at_once()  # until training begins
    threading.Thread(target=_end_with_parent, args=(os.getppid(), folder), daemon=True).start()
    set_up_log()
    if not folder.exists():  # the launcher was stopped while it started this worker
        return StoppedError.exit_code
    config = from_toml(folder / SETTINGS_FILE)
    try:
        train_together(config, FileStore(str(folder / STORE_FILE), config.workers))
    except Exception as error:
        ignore_all()
        report_to_launcher(error)
        return error.exit_code if isinstance(error, AbtrainError) else AbtrainError.exit_code
    ignore_all()
    return 0


def report_to_launcher(error: Exception) -> None:
    """Writes an error to the launcher's error file, completely or not at all.

    The launcher may end this worker at any time because another one has failed, and cannot read an incomplete file.
    """
    file = os.environ[_ERROR_FILE]
    os.environ[_ERROR_FILE] = partial = f"{file}.begun"
    get_error_handler().record_exception(error)
    with contextlib.suppress(FileNotFoundError):  # the launcher is gone, and its folder with it
        Path(partial).replace(file)


def _end_with_parent(parent: int, folder: Path) -> None:
    """Ends this worker when the launcher has ended for any reason. No worker outlives the launcher."""
    while os.getppid() == parent:
        time.sleep(1)
    shutil.rmtree(folder, ignore_errors=True)  # in the launcher's place
    os._exit(StoppedError.exit_code)
