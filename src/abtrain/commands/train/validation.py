"""Validates the model during training, and writes the model files of a run."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch

from abtrain.commands.model_file import save_model
from abtrain.commands.tasks.samples import Data
from abtrain.commands.tasks.task import Score, score
from abtrain.commands.train.folder_content import BEST_MODEL, MODEL, continuation, model_files
from abtrain.commands.train.recorder import Recorder
from abtrain.commands.train.trainer import VALIDATE, Trainer
from abtrain.errors import CheckpointError

log = logging.getLogger("abtrain")


class Validation:
    """Validates the average of all workers at regular intervals, and saves the best model.

    Each worker evaluates a part of the test set. The bytes and seconds of validation do not count as training.

    Args:
        trainer: this worker's trainer.
        recorder: the recorder on rank 0; None on other ranks.
        data: the data of the task.
        folder: the folder for model files.
    """

    def __init__(self, trainer: Trainer, recorder: Recorder | None, data: Data, folder: Path) -> None:
        self._trainer, self._recorder, self._data, self._folder = trainer, recorder, data, folder

    def after(self, step: int) -> None:
        """Validates if a validation is due after `step` steps. Collective over the world."""
        trainer, every = self._trainer, self._trainer.config.validate_every
        if not every or step % every:
            return
        comm, meter = trainer.ab.communicator, trainer.ab.communicator.meter
        started, waited, phase, meter.phase = time.perf_counter(), meter.sync_seconds, meter.phase, VALIDATE
        with trainer.ab.merged():
            # Without any sync there is no common model: rank 0 validates its own.
            common = any(phase.sync is not None for phase in trainer.ab.recipe.phases)
            part, parts = (comm.rank, comm.topology.world_size) if common else (0, 1)
            found = score(trainer.model, trainer.task, self._data, part, parts)
            sums = torch.tensor(found, dtype=torch.float64, device=comm.device)
            if common:
                comm.all_reduce(sums)
            meter.phase, meter.sync_seconds = phase, waited
            if self._recorder is not None:
                quality = Score(*sums.tolist()).quality(trainer.task)
                if self._recorder.validated(step, phase, quality, time.perf_counter() - started):
                    self._save_best()

    def _save_best(self) -> None:
        try:
            save_model_files(self._trainer, self._folder, BEST_MODEL)
        except CheckpointError as error:
            log.warning("%s: the run continues without its best model", error)


def save_model_files(trainer: Trainer, folder: Path, name: str = MODEL) -> None:
    """Writes the model with factors and with dense weights. Only one worker calls it, inside `ab.merged()`.

    Raises:
        CheckpointError: a file cannot be written.
    """
    ab, files = trainer.ab, model_files(name)
    for form, state in (("factored", ab.factored_state_dict()), ("dense", ab.dense_state_dict())):
        save_model(folder / files[form], state, {"form": form, "recipe": ab.recipe.name, "step": ab.steps_done})


def save_last_model(trainer: Trainer, folder: Path) -> None:
    """Writes the model of a finished run in both forms.

    Raises:
        CheckpointError: a file cannot be written.
    """
    try:
        save_model_files(trainer, folder)
    except CheckpointError as error:
        raise CheckpointError(
            f"the run has finished, but its model cannot be saved: {error}. Free some space and run again: "
            f"{continuation(folder)}"
        ) from error


def describe_models(result: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Returns the content of model.json: a description of each model of a finished run, and the names of its files."""
    quality = {name: result[name] for name in ("top1", "loss")}
    models = {MODEL: {"step": result["steps"], **quality}, BEST_MODEL: result["validation"].get("best")}
    run = {
        name: result[name] for name in ("task", "recipe", "schedule", "seed", "parameters", "compression", "versions")
    }
    return run | {
        name: {**about, "files": {form: file for form, file in model_files(name).items() if (folder / file).exists()}}
        for name, about in models.items()
        if about is not None
    }
