"""Validates the model during training, and writes the model files of a run."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from abtrain.commands.tasks.evaluation import Score, score
from abtrain.commands.tasks.samples import Data
from abtrain.commands.train.folder_content import BEST_MODEL, MODEL, continuation, model_files
from abtrain.commands.train.recorder import Recorder
from abtrain.commands.train.trainer import VALIDATE, Trainer
from abtrain.errors import CheckpointError
from abtrain.lowrank.model_file import describe, save_model

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

        # In a recipe that never synchronizes workers there is no common model, and rank 0 validates its own.
        self._has_common_model = any(phase.sync is not None for phase in trainer.ab.recipe.phases)

    def joins(self, step: int) -> bool:
        """Whether all workers wait for each other after `step` steps, because they validate a common model."""
        return self._has_common_model and self._is_due(step)

    def after(self, step: int, beat: Callable[[str], object]) -> None:
        """Validates if a validation is due after `step` steps. Collective over the world.

        Calls `beat` after each batch, with a description of what this worker does.
        """
        if not self._is_due(step):
            return
        trainer, common = self._trainer, self._has_common_model
        comm, meter = trainer.ab.communicator, trainer.ab.communicator.meter
        started, waited, phase, meter.phase = time.perf_counter(), meter.sync_seconds, meter.phase, VALIDATE
        with trainer.ab.merged():
            part, parts = (comm.rank, comm.topology.world_size) if common else (0, 1)
            place = f"validation after {step} steps"
            found = score(trainer.model, trainer.task, self._data, part, parts, after_batch=lambda: beat(place))
            sums = torch.tensor(found, dtype=torch.float64, device=comm.device)
            if common:
                comm.all_reduce(sums)
            meter.phase, meter.sync_seconds = phase, waited
            if self._recorder is not None:
                quality = Score(*sums.tolist()).quality(trainer.task)
                if self._recorder.validated(step, phase, quality):
                    self._save_best()
                self._recorder.spent(VALIDATE, time.perf_counter() - started)

    def _is_due(self, step: int) -> bool:
        every = self._trainer.config.validate_every
        return every > 0 and step % every == 0

    def _save_best(self) -> None:
        try:
            save_model_files(self._trainer, self._folder, BEST_MODEL)
        except CheckpointError as error:
            # The former files are not the best model any more, and may be of two different steps.
            _remove_best(self._folder)
            log.warning("%s: the run continues, but its best model so far was not saved", error)


def drop_replaced_best(recorder: Recorder, folder: Path) -> None:
    """Drops the best model of a resumed run unless its files are those of the best validation on record.

    A validation after the checkpoint from which the run resumes may have replaced the files.
    """
    best = recorder.validation.get("best")
    files = [folder / name for name in model_files(BEST_MODEL).values()]
    if any(file.exists() and (best is None or _step_of(file) != best["step"]) for file in files):
        _remove_best(folder)
        recorder.validation.pop("best", None)


def _step_of(file: Path) -> Any:
    """Returns the step of a model file; None if the file is damaged."""
    try:
        return describe(file).get("step")
    except CheckpointError:
        return None


def _remove_best(folder: Path) -> None:
    for name in model_files(BEST_MODEL).values():
        with contextlib.suppress(OSError):
            (folder / name).unlink(missing_ok=True)


def save_model_files(trainer: Trainer, folder: Path, name: str = MODEL) -> None:
    """Writes the model with factors and with dense weights. Only one worker calls it, inside `ab.merged()`.

    Raises:
        CheckpointError: a file cannot be written.
    """
    ab, files = trainer.ab, model_files(name)
    for form, state in (("factored", ab.factored_state_dict()), ("dense", ab.dense_state_dict())):
        save_model(folder / files[form], state, {"form": form, "recipe": ab.recipe.name, "step": ab.steps_done})


def save_last_model(trainer: Trainer, folder: Path) -> None:
    """Writes the model of a finished run, with factors and with dense weights.

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
