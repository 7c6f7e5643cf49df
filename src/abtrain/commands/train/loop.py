"""The training loop, as one worker runs it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import platform
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import Store  # type: ignore[attr-defined]
from torch.optim.lr_scheduler import LRScheduler

from abtrain.comm.communicator import Communicator
from abtrain.commands.tasks.samples import Data, Reading
from abtrain.commands.tasks.task import TASKS, Task, batches, build_model, evaluate
from abtrain.commands.train.checkpoints import Saving
from abtrain.commands.train.config import TrainConfig
from abtrain.commands.train.folder_content import CHECKPOINTS, stacks_file
from abtrain.commands.train.recorder import Recorder
from abtrain.commands.train.result import result_of
from abtrain.commands.train.run_folder import RunFolder
from abtrain.commands.train.setup import set_up
from abtrain.commands.train.step import clip_gradients, loss_of
from abtrain.commands.train.stopping import Stopping
from abtrain.commands.train.watchdog import Watchdog
from abtrain.consistency.agreement import gather_json
from abtrain.consistency.settings import check_equal
from abtrain.engine.ab_training import ABTraining
from abtrain.errors import (
    ConfigurationError,
    DataError,
    NonFiniteError,
    StoppedError,
)
from abtrain.recipes.recipe import Position
from abtrain.recipes.sync import GradientSync, WeightSync
from abtrain.version import __version__

# Settings that may differ between workers: where each finds and puts things.
_OWN = frozenset({"out", "data", "config"})


def train(
    config: TrainConfig, communicator: Communicator, store: Store | None = None, launch: str = ""
) -> dict[str, Any]:
    """Trains, and on rank 0 evaluates, shows and records. Collective: every worker calls it.

    Args:
        config: valid and resolved; `workers` and `group_size` are the communicator's.
        communicator: how to reach the other workers; the model trains on its device.
        store: that all workers reach, for a request to stop between merges; None: it waits for the next one.
        launch: of this attempt, see `RunFolder`.

    Returns:
        On rank 0 the content of result.json, elsewhere nothing.

    Raises:
        ConfigurationError: settings that do not fit the data or the model. No run folder is made then.
        DataError: data that is missing or damaged. No run folder is made then.
        NonFiniteError: the loss is NaN or infinite.
    """
    assert config.steps is not None and config.batch_size is not None and config.lr is not None
    agree_on_start(config, communicator)
    task = TASKS[config.task]
    data, dealt = _load(task, config, communicator)
    model = build_model(task, config.seed, config.init or task.init).to(communicator.device)
    parameters = sum(p.numel() for p in model.parameters())
    ab, schedule = set_up(config, model, communicator)
    with contextlib.ExitStack() as stack:
        # From here on a request waits for the first step. No worker leaves the next collective before all are here.
        stopping = stack.enter_context(Stopping(communicator, store))
        folder, path, goes_on = _open_folder(config, communicator, stack, launch)
        recorder = stack.enter_context(Recorder(config, folder, parameters)) if folder is not None else None
        saving = Saving(config, ab, schedule, recorder, path / CHECKPOINTS, len(data.train))
        step = saving.resume() if goes_on else 0
        if recorder is not None:
            recorder.begin(step)
        started = time.perf_counter() - (recorder.seconds if recorder is not None else 0)
        run = _Run(config, task, ab, schedule, recorder, saving, stopping)
        run.train(dealt(start=step), path)
        seconds = time.perf_counter() - started
        result = {}
        with ab.merged():
            if recorder is not None:
                result = result_of(config, ab, parameters, seconds, evaluate(model, task, data))
                recorder.finish(result)
    return result


def _load(task: Task, config: TrainConfig, communicator: Communicator) -> tuple[Data, Callable[..., Iterator[Any]]]:
    """Returns the data, and a function that deals this worker's batches. Data that does not fit raises here."""
    assert config.batch_size is not None
    reading = Reading(config.loaders, config.on_bad_image)
    data = task.load(config.data).read_by(reading).to(communicator.device)
    _check_data(task, data, config.workers)
    rank, workers, size = communicator.rank, config.workers, config.batch_size
    dealt = functools.partial(batches, task, data, seed=config.seed, rank=rank, world_size=workers, batch_size=size)
    dealt()
    return data, dealt


def agree_on_start(config: TrainConfig, communicator: Communicator) -> None:
    """Makes sure that all workers run the same. Collective over the world.

    Raises:
        RanksDisagreeError: on all, with what differs and where.
    """
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in _OWN}
    check_equal(
        communicator,
        {"abtrain": __version__, "torch": torch.__version__, **settings},
        "workers were started with different software or settings",
        "Start all of them with the same command and the same versions",
    )


def _check_data(task: Task, data: Data, workers: int) -> None:
    """Makes sure that there is something for everybody.

    Raises:
        DataError: there are no samples.
        ConfigurationError: there are fewer than workers.
    """
    samples = len(data.train)
    if not samples or not len(data.test):
        raise DataError(
            f"task {task.name} has {samples} samples to train on and {len(data.test)} to be judged by: it needs both. "
            "Look at what --data names"
        )
    if samples < workers:
        raise ConfigurationError(
            f"{samples} samples are too few for {workers} workers: use at most {samples} --workers"
        )


def _open_folder(
    config: TrainConfig, communicator: Communicator, stack: contextlib.ExitStack, launch: str
) -> tuple[RunFolder | None, Path, bool]:
    """On rank 0 the run folder; on all, where it is, and whether it holds a run that goes on. Collective."""
    folder, problems, stopped, path, goes_on = None, list[str](), "", "", False
    if communicator.rank == 0:
        try:
            folder = stack.enter_context(RunFolder(config, launch))
            path, goes_on = str(folder.path.absolute()), folder.goes_on
        except ConfigurationError as error:
            problems = list(error.problems)
        except StoppedError as error:
            stopped = str(error)
    problems, stopped, path, goes_on = gather_json(communicator, (problems, stopped, path, goes_on))[0]
    if stopped:
        raise StoppedError(stopped)
    if problems:
        raise ConfigurationError(problems)
    return folder, Path(path), goes_on


@dataclasses.dataclass(frozen=True)
class _Run:
    """The loop, with all that takes part in it."""

    config: TrainConfig
    task: Task
    ab: ABTraining
    schedule: LRScheduler
    recorder: Recorder | None
    saving: Saving
    stopping: Stopping

    def train(self, stream: Iterator[tuple[Tensor, Tensor]], folder: Path) -> None:
        """Trains to the end of the recipe.

        Args:
            stream: batches from the first step that is left.
            folder: where stacks go if the run hangs.
        """
        comm = self.ab.communicator
        who = f"rank {comm.rank} on {platform.node()}"
        watchdog = Watchdog(self.config.timeout, who, folder / stacks_file(comm.rank))
        with watchdog if comm.topology.world_size > 1 else contextlib.nullcontext():
            while self.ab.position is not None:
                watchdog.beat(f"step {self.ab.steps_done}, phase {self.ab.position.phase.name}")
                self._step(self.ab.position, *next(stream))

    def _step(self, position: Position, x: Tensor, y: Tensor) -> None:
        ab, phase = self.ab, position.phase.name
        lr = float(self.schedule.get_last_lr()[0]) * ab.lr_factor
        loss = loss_of(ab, self.task, x, y, self.config.precision)
        value = loss.item()
        gradients_travel = isinstance(position.phase.sync, GradientSync)
        policy = self.config.on_nonfinite
        if not math.isfinite(value) and (policy == "stop" or (gradients_travel and policy != "skip")):
            # Before the gradients of this worker reach the others; the launcher ends those.
            raise NonFiniteError(
                f"the loss of worker {ab.communicator.rank} is {value} at step {ab.steps_done} ({phase}), "
                f"learning rate {lr:.3g}: lower --lr (now {self.config.lr}), or try another --seed"
            )
        loss.backward()
        clip_gradients(ab.optimizer, self.config.clip)
        ab.optimizer.step()
        self.schedule.step()
        ab.optimizer.zero_grad()
        if not gradients_travel:
            self._before_step(position)
        ab.step(value)
        if self.recorder is not None:
            self.recorder.step(ab.steps_done, phase, value, lr, ab.communicator.meter.payload()["total"], ab.divergence)
        self._save_or_stop(position, gradients_travel)

    def _before_step(self, position: Position) -> None:
        done, sync = self.ab.steps_done + 1, position.phase.sync
        waits = position.merges or self.saving.due(done) or done == self.config.steps
        self.stopping.before_step(self.ab.steps_done, waits, sync.delay if isinstance(sync, WeightSync) else 0)

    def _save_or_stop(self, position: Position, gradients_travel: bool) -> None:
        ab, due, sync = self.ab, self.saving.due(self.ab.steps_done), position.phase.sync
        # Beside gradients and hidden merges the answer may come at the next meeting, and costs no time.
        waits_anyway = isinstance(sync, WeightSync) and position.merges and (position.last or not sync.delay)
        # After the last step there is nothing left to stop.
        meets = not ab.finished and (gradients_travel or position.merges or due)
        number = self.stopping.agreed(meets, wait=waits_anyway or due or ab.finished)
        if not (meets or ab.finished):
            number = self.stopping.agreed_between(ab.steps_done)
        stops = number != 0 and not ab.finished
        saved = self.saving.save() if due or stops else None
        if stops:
            kept = f"step {ab.steps_done} is saved: run again to go on" if saved else "no checkpoint was written"
            raise StoppedError(f"stopped on request ({signal.Signals(number).name}), {kept}")
