"""Starts a run under torchrun, in this process alone, or through abtrain's own launcher."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from pathlib import Path

from abtrain import failpoints
from abtrain.commands.process import ignore_all
from abtrain.commands.tasks.task import TASKS
from abtrain.commands.train import worker
from abtrain.commands.train.config import TrainConfig, notices
from abtrain.commands.train.config_problems import checked
from abtrain.commands.train.launcher import start_workers
from abtrain.commands.train.world import is_joined, is_restarted_by_torchrun, joined_world
from abtrain.errors import AbtrainError

log = logging.getLogger("abtrain")

FAILURE = "ABTRAIN_FAILURE"
"""The environment variable that names a file for the exit code of the worker that fails first.

torchrun does not pass exit codes of workers on.
"""


def run(config: TrainConfig) -> None:
    """Trains with the settings of `config`, and returns when all workers have finished.

    Raises:
        ConfigurationError: at least one setting is invalid. The error lists all of them. No worker has started.
        DataError: the task's data is not available. No worker has started.
        StoppedError: SIGINT, SIGTERM or SIGHUP was received, and all workers have ended.
        AbtrainError: the error of the worker that failed first; all others have ended.
    """
    failpoints.check()
    joined, notes = is_joined(), list[str]()
    if joined:
        config, notes = _take_world_size(config)
    config = checked(config)
    TASKS[config.task].find(config.data)
    worker.set_up_log()
    for line in (*notes, *notices(config)):
        log.info(line)
    if joined:
        try:
            worker.train_together(config)
        except AbtrainError as error:
            note_failure(error)
            raise
        finally:
            # This process is about to end anyway: torchrun, which now ends its workers, must not interrupt that.
            ignore_all()
    elif config.workers > 1:
        start_workers(config)
    else:
        worker.train_alone(config)


def note_failure(error: AbtrainError) -> None:
    """Writes this worker's exit code to the file that the variable `FAILURE` names, unless another one is there."""
    with contextlib.suppress(KeyError, OSError), Path(os.environ[FAILURE]).open("x", encoding="utf-8") as file:
        file.write(str(error.exit_code))


def _take_world_size(config: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """Returns the settings with torchrun's number of workers, and notes about options that torchrun affects."""
    world_size = joined_world().size
    notes = []
    if config.workers not in (world_size, TrainConfig.workers):
        notes.append(f"--workers {config.workers} is ignored: torchrun started {world_size} workers")
    if config.out is None and is_restarted_by_torchrun():
        notes.append("without --out, each restart begins a new run in a new folder: add --out FOLDER to resume the run")
    return dataclasses.replace(config, workers=world_size), notes
