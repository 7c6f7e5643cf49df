"""One worker of a run: joins the others where there are any, and trains.

As a program, `python -m abtrain.train.worker FOLDER`, it is a worker that `launch.py` started. FOLDER holds the
settings and the file through which the workers find each other.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import FileStore, PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.distributed.rendezvous import rendezvous

from abtrain.comm.torch_distributed import default_communicator
from abtrain.errors import AbtrainError, ConfigurationError, OutOfMemoryError, PeerLostError, StoppedError
from abtrain.train.config import TrainConfig, restarted
from abtrain.train.config_file import from_toml
from abtrain.train.leaving import leave
from abtrain.train.loop import train
from abtrain.train.meeting import meet

_NO_MEMORY = "DefaultCPUAllocator: "  # it has no error of its own
SETTINGS_FILE = "config.toml"
STORE_FILE = "store"
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # the name that torch gives it


def set_up_log() -> None:
    """The library's log goes to standard error; of several workers, the first speaks for all."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("abtrain: note: %(message)s"))
    log = logging.getLogger("abtrain")
    log.addHandler(handler)
    log.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)


def train_alone(config: TrainConfig) -> None:
    """Trains in this process, without others."""
    communicator = default_communicator(config.group_size)
    # Nothing has to be carried anywhere, so the model may be where it is fastest.
    communicator.device = torch.device(config.device)
    with memory_named(rank=0):
        train(config, communicator)


def train_together(config: TrainConfig, store: Store | None = None) -> None:
    """Joins the other workers, by the variables that torchrun sets, and trains with them.

    Args:
        config: valid and resolved; `workers` is WORLD_SIZE.
        store: where the workers find each other; default the one that torchrun announces.
    """
    if config.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    rank, timeout = int(os.environ["RANK"]), timedelta(seconds=config.timeout)
    if store is None:
        store = _announced_store(rank, config.workers, timeout)
    store.set_timeout(timeout)
    store = meet(store, rank, config.workers, config.timeout)
    dist.init_process_group(
        "nccl" if config.device == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=config.workers,
        timeout=timeout,
    )
    try:
        communicator = default_communicator(config.group_size)
        # Once all workers are here, all have found the settings valid: only then rank 0 may make a run folder.
        communicator.barrier()
        with memory_named(rank):
            train(config, communicator, PrefixStore("stopping", store))
    finally:
        dist.destroy_process_group()


def _announced_store(rank: int, world_size: int, timeout: timedelta) -> Store:
    """The store at MASTER_ADDR and MASTER_PORT.

    Raises:
        ConfigurationError: another program listens there.
        PeerLostError: who holds it, or those who ought to join it, did not come in time.
    """
    try:
        store: Store
        store, _, _ = next(rendezvous("env://", rank, world_size, timeout=timeout))
    except dist.DistError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        if "EADDRINUSE" in str(error):
            raise ConfigurationError(
                f"another program listens at {place}, where workers are to meet: give torchrun another --master-port"
            ) from error
        raise PeerLostError(
            f"rank {rank} waited {timeout.total_seconds():g} s at {place} for the others of {world_size} in vain: look "
            "at their output, or give more time with --timeout"
        ) from error
    return store


@contextlib.contextmanager
def memory_named(rank: int) -> Iterator[None]:
    """What torch and Python say in many words, if memory runs out, becomes one message.

    Raises:
        OutOfMemoryError: it did.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        told = str(error)
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and _NO_MEMORY not in told:
            raise
        raise OutOfMemoryError(
            f"rank {rank} ran out of memory ({told.splitlines()[0] if told else type(error).__name__}): use a smaller "
            "--batch-size, or fewer --workers on this machine"
        ) from error


def main(folder: Path) -> int:
    """Trains as a worker of `launch.py`, which learns of an error through the launcher's error file.

    Returns:
        The exit code.
    """
    # Until training begins SIGTERM keeps its default: it ends a worker at once, also where it waits in native code.
    threading.Thread(target=_end_with_parent, args=(os.getppid(), folder), daemon=True).start()
    set_up_log()
    config = restarted(from_toml(folder / SETTINGS_FILE))
    try:
        train_together(config, FileStore(str(folder / STORE_FILE), config.workers))
    except Exception as error:
        tell_launcher(error)
        return error.exit_code if isinstance(error, AbtrainError) else AbtrainError.exit_code
    return 0


def tell_launcher(error: Exception) -> None:
    """Writes the launcher's error file, whole or not at all.

    The launcher ends workers as soon as another one has failed, and itself fails at a file that was begun.
    """
    file = os.environ[_ERROR_FILE]
    os.environ[_ERROR_FILE] = begun = f"{file}.begun"
    get_error_handler().record_exception(error)
    Path(begun).replace(file)


def _end_with_parent(parent: int, folder: Path) -> None:
    """Ends this worker once the launcher is gone, however that came about: no worker is left alone."""
    while os.getppid() == parent:
        time.sleep(1)
    shutil.rmtree(folder, ignore_errors=True)  # in the launcher's place
    os._exit(StoppedError.exit_code)


if __name__ == "__main__":
    leave(main(Path(sys.argv[1])))
