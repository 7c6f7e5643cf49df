"""One worker of a run: joins the others where there are any, and trains.

As a program, `python -m abtrain.train.worker FOLDER`, it is a worker that `launch.py` started. FOLDER holds the
settings and the file through which the workers find each other.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import FileStore, Store  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.distributed.rendezvous import rendezvous

from abtrain.comm.torch_distributed import default_communicator
from abtrain.errors import AbtrainError, StoppedError
from abtrain.train.config import TrainConfig, restarted
from abtrain.train.config_file import from_toml
from abtrain.train.loop import train
from abtrain.train.meeting import meet

SETTINGS_FILE = "config.toml"
STORE_FILE = "store"


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
        store, _, _ = next(rendezvous("env://", rank, config.workers, timeout=timeout))
    store.set_timeout(timeout)
    dist.init_process_group(
        "nccl" if config.device == "cuda" else "gloo",
        store=meet(store, rank, config.workers, config.timeout),
        rank=rank,
        world_size=config.workers,
        timeout=timeout,
    )
    try:
        communicator = default_communicator(config.group_size)
        # Once all workers are here, all have found the settings valid: only then rank 0 may make a run folder.
        communicator.barrier()
        train(config, communicator)
    finally:
        dist.destroy_process_group()


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
        get_error_handler().record_exception(error)
        return error.exit_code if isinstance(error, AbtrainError) else AbtrainError.exit_code
    return 0


def _end_with_parent(parent: int, folder: Path) -> None:
    """Ends this worker once the launcher is gone, however that came about: no worker is left alone."""
    while os.getppid() == parent:
        time.sleep(1)
    shutil.rmtree(folder, ignore_errors=True)  # in the launcher's place
    os._exit(StoppedError.exit_code)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
