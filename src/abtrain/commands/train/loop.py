"""Runs the training loop of one worker."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import platform
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import Store  # type: ignore[attr-defined]

from abtrain.comm.communicator import Communicator
from abtrain.commands.memory import peak_memories
from abtrain.commands.tasks.samples import Data, Reading
from abtrain.commands.tasks.task import TASKS, Task, batches, build_model
from abtrain.commands.train.checkpoints import Saving
from abtrain.commands.train.config import TrainConfig
from abtrain.commands.train.folder_content import CHECKPOINTS, stacks_file
from abtrain.commands.train.recorder import Recorder
from abtrain.commands.train.run_folder import RunFolder
from abtrain.commands.train.stopping import Stopping
from abtrain.commands.train.trainer import Trainer
from abtrain.commands.train.validation import Validation, describe_models, drop_replaced_best, save_last_model
from abtrain.commands.train.watchdog import Watchdog
from abtrain.consistency.agreement import check_equal, gather_json
from abtrain.errors import ConfigurationError, DataError, StoppedError
from abtrain.recipes.recipe import Position
from abtrain.version import __version__

# Settings that may differ between workers: paths.
_OWN = frozenset({"out", "data", "config"})


def train(
    config: TrainConfig, communicator: Communicator, store: Store | None = None, launch: str = ""
) -> dict[str, Any]:
    """Trains as one worker. Rank 0 also evaluates the model, and displays and records the run. Every worker calls it.

    Args:
        config: the settings, validated and resolved; `workers` and `group_size` match the communicator.
        communicator: the connection to the other workers; the model trains on its device.
        store: a store that all workers can reach. Workers use it to stop between merges on request. Without a store,
            such a request takes effect at the next merge.
        launch: the name of this launch, see `RunFolder`.

    Returns:
        The content of result.json on rank 0; an empty dict on other ranks.

    Raises:
        ConfigurationError: the settings do not fit the data or the model. No run folder is created then.
        DataError: data is missing or damaged. No run folder is created then.
        NonFiniteError: the loss is NaN or infinite.
        CheckpointError: no checkpoint of the run can be loaded, or the trained model cannot be saved.
        StoppedError: a request to stop was received. The message says whether a checkpoint was written.
    """
    agree_on_start(config, communicator)
    task = TASKS[config.task]
    data, batches_from = _load(task, config, communicator)
    model = build_model(task, config.seed, config.init or task.init).to(communicator.device)
    trainer = Trainer(config, model, communicator)
    with contextlib.ExitStack() as stack:
        # From here on a request to stop takes effect after the first step. The next collective waits for all workers.
        stopping = stack.enter_context(Stopping(communicator, store))
        folder, path, resumes = _open_folder(config, communicator, stack, launch)
        recorder = None
        if folder is not None:
            recorder = stack.enter_context(Recorder(config, folder, trainer.parameters))
        saving = Saving(trainer, recorder, path / CHECKPOINTS, len(data.train))
        step = saving.resume() if resumes else 0
        if not step:
            # The wall time of a run does not include its setup, so neither does its time in collectives.
            communicator.meter.sync_seconds = 0.0
        if recorder is not None:
            recorder.complete(trainer.completed_config)
            recorder.begin(step)
            drop_replaced_best(recorder, path)
        validation = Validation(trainer, recorder, data, path)
        _Loop(trainer, recorder, saving, stopping, validation, path).run(batches_from(start=step))
        return _finish(trainer, recorder, data, path)


def _finish(trainer: Trainer, recorder: Recorder | None, data: Data, folder: Path) -> dict[str, Any]:
    """Evaluates and saves the trained model on rank 0. Returns the result there, and an empty dict elsewhere."""
    seconds = 0.0 if recorder is None else recorder.seconds
    memory = peak_memories(trainer.ab.communicator.device)
    with trainer.ab.merged():
        if recorder is None:
            return {}
        result = trainer.result({"total": seconds, **recorder.aside}, data, recorder.validation, memory)
        save_last_model(trainer, folder)
        recorder.finish(result, describe_models(result, folder))
    return result


def _load(task: Task, config: TrainConfig, communicator: Communicator) -> tuple[Data, Callable[..., Iterator[Any]]]:
    """Loads and checks the data. Returns it, and a function that yields this worker's batches from a given step on."""
    assert config.batch_size is not None
    reading = Reading(config.loaders, config.on_bad_image)
    data = task.load(config.data).read_by(reading).to(communicator.device)
    _check_data(task, data, config.workers)
    rank, workers, size = communicator.rank, config.workers, config.batch_size
    batches_from = functools.partial(
        batches, task, data, seed=config.seed, rank=rank, world_size=workers, batch_size=size
    )
    batches_from()
    return data, batches_from


def agree_on_start(config: TrainConfig, communicator: Communicator) -> None:
    """Checks that all workers have the same versions and settings. Collective over the world.

    Raises:
        RanksDisagreeError: versions or settings differ. All workers raise it, with the differing values and ranks.
    """
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in _OWN}
    check_equal(
        communicator,
        {"abtrain": __version__, "torch": torch.__version__, **settings},
        "workers were started with different software or settings",
        "Start all of them with the same command and the same versions",
    )


def _check_data(task: Task, data: Data, workers: int) -> None:
    """Checks that there are test samples, and at least one training sample for every worker.

    Raises:
        DataError: there are no training samples, or no test samples.
        ConfigurationError: there are fewer training samples than workers.
    """
    samples = len(data.train)
    if not samples or not len(data.test):
        raise DataError(
            f"task {task.name} has {samples} training samples and {len(data.test)} test samples, but needs at least "
            "one of each: check the folder that --data names"
        )
    if samples < workers:
        raise ConfigurationError(
            f"{samples} training samples are too few for {workers} workers: use --workers {samples} or fewer"
        )


def _open_folder(
    config: TrainConfig, communicator: Communicator, stack: contextlib.ExitStack, launch: str
) -> tuple[RunFolder | None, Path, bool]:
    """Opens the run folder on rank 0. Returns it (None on other ranks), its path, and whether to resume a run in it."""
    folder, problems, stopped, path, resumes = None, list[str](), "", "", False
    if communicator.rank == 0:
        try:
            folder = stack.enter_context(RunFolder(config, launch))
            path, resumes = str(folder.path.absolute()), folder.resumes
        except ConfigurationError as error:
            problems = list(error.problems)
        except StoppedError as error:
            stopped = str(error)
    problems, stopped, path, resumes = gather_json(communicator, (problems, stopped, path, resumes))[0]
    if stopped:
        raise StoppedError(stopped)
    if problems:
        raise ConfigurationError(problems)
    return folder, Path(path), resumes


@dataclasses.dataclass(frozen=True)
class _Loop:
    """Runs and records the training steps. Saves checkpoints when they are due, and stops the run on request.

    `folder` is the folder of the run.
    """

    trainer: Trainer
    recorder: Recorder | None
    saving: Saving
    stopping: Stopping
    validation: Validation
    folder: Path

    def run(self, stream: Iterator[tuple[Tensor, Tensor]]) -> None:
        """Trains to the end of the recipe.

        Args:
            stream: the batches from the first remaining step on.
        """
        ab = self.trainer.ab
        comm = ab.communicator
        who = f"rank {comm.rank} on {platform.node()}"
        watchdog = Watchdog(self.trainer.config.timeout, who, self.folder / stacks_file(comm.rank))
        with watchdog if comm.topology.world_size > 1 else contextlib.nullcontext():
            while ab.position is not None:
                watchdog.beat(f"step {ab.steps_done}, phase {ab.position.phase.name}")
                self._step(ab.position, *next(stream), watchdog)

    def _step(self, position: Position, x: Tensor, y: Tensor, watchdog: Watchdog) -> None:
        ab, recorder = self.trainer.ab, self.recorder
        logs = recorder is not None and recorder.logs(ab.steps_done + 1)
        figures = self.trainer.optimizer_step(position, x, y, measures_norm=logs)
        shares_gradients = position.phase.shares_gradients
        if not shares_gradients:
            self._before_merge(position)
        recipe = ab.recipe
        ab.step(figures.loss)
        if recorder is not None and ab.recipe is not recipe:
            recorder.complete(self.trainer.completed_config)
        if recorder is not None:
            payload = ab.communicator.meter.payload()["total"]
            recorder.merged(ab.steps_done, position.phase.name, ab.last_merges)
            recorder.step(ab.steps_done, position.phase.name, figures, payload, ab.divergence)
        self.validation.after(ab.steps_done, watchdog.beat)
        watchdog.beat(f"after {ab.steps_done} steps")  # a checkpoint has the whole time limit again
        self._save_or_stop(position, shares_gradients)

    def _before_merge(self, position: Position) -> None:
        done, rounds = self.trainer.ab.steps_done + 1, position.phase.rounds
        due = self.saving.due(done) or self.validation.joins(done)
        waits = position.merges or due or done == self.trainer.config.steps
        self.stopping.before_step(done - 1, waits, rounds.delay if rounds else 0)

    def _save_or_stop(self, position: Position, shares_gradients: bool) -> None:
        ab, rounds = self.trainer.ab, position.phase.rounds
        due = self.saving.due(ab.steps_done)
        # Unless workers wait for each other anyway, none waits here: the answer may arrive when they communicate next.
        waits_anyway = rounds is not None and position.merges and (position.last or not rounds.delay)
        together = due or self.validation.joins(ab.steps_done)
        # After the last step there is nothing left to stop.
        meets = not ab.finished and (shares_gradients or position.merges or together)
        number = self.stopping.agreed(meets, wait=waits_anyway or together or ab.finished)
        if not (meets or ab.finished):
            number = self.stopping.agreed_between(ab.steps_done)
        stops = number != 0 and not ab.finished
        saved = self.saving.save() if due or stops else None
        if stops:
            out = self.trainer.config.out or self.folder
            how = f"step {ab.steps_done} is saved: the same command with --out {out} continues"
            kept = how if saved else "no checkpoint was written"
            raise StoppedError(f"stopped on request ({signal.Signals(number).name}), {kept}")
