"""Saves and loads checkpoints: the state of the engine, the schedules, the random generators and the recorder."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from abtrain import checkpoint
from abtrain.commands.train.config import differences, identity
from abtrain.commands.train.recorder import Recorder
from abtrain.commands.train.resizing import can_be_resized, resized
from abtrain.commands.train.trainer import CHECKPOINT, Trainer
from abtrain.engine.state_problems import recipe_of
from abtrain.errors import CheckpointError

log = logging.getLogger("abtrain")


class Saving:
    """Saves checkpoints of a run, and resumes the run from them. All workers call `save` and `resume` together.

    Args:
        trainer: this worker's trainer.
        recorder: the recorder on rank 0; None on other ranks.
        folder: the folder of checkpoints, the same on all workers.
        samples: the number of training samples. Checkpoints of runs with another number are rejected.
    """

    def __init__(self, trainer: Trainer, recorder: Recorder | None, folder: Path, samples: int) -> None:
        self._config = trainer.config
        self._run = {**identity(trainer.config), "samples": samples}
        self._ab = trainer.ab
        self._schedules = trainer.schedules
        self._recorder = recorder
        self._folder = folder

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` steps."""
        return self._config.checkpoint_every > 0 and step % self._config.checkpoint_every == 0

    def save(self) -> Path | None:
        """Writes a checkpoint and returns its folder. Returns None if writing failed but the run continues.

        Raises:
            CheckpointError: writing failed, and `on_checkpoint_error` is `stop`.
        """
        ab, comm = self._ab, self._ab.communicator
        engine = ab.state_dict()
        state = {
            "run": self._run,
            "ab": engine,
            "schedules": [schedule.state_dict() for schedule in self._schedules],
            "generators": _generators_state(comm.device),
            "record": {} if self._recorder is None else self._recorder.state_dict(),
        }
        meter, started = comm.meter, time.perf_counter()
        phase, waited, meter.phase = meter.phase, meter.sync_seconds, CHECKPOINT
        try:
            return checkpoint.save(
                self._folder,
                ab.steps_done,
                state,
                comm,
                keep=self._config.keep,
                resizable=can_be_resized(engine, ab.position),
            )
        except CheckpointError as error:
            if self._config.on_checkpoint_error == "stop":
                raise
            if comm.rank == 0:
                log.warning("%s: the run continues with the older checkpoints", error)
            return None
        finally:
            meter.phase, meter.sync_seconds = phase, waited
            if self._recorder is not None:
                self._recorder.spent(CHECKPOINT, time.perf_counter() - started)

    def resume(self) -> int:
        """Loads the newest checkpoint that all workers can use. Returns the number of steps done; 0 if there is none.

        Raises:
            CheckpointError: checkpoints exist, but all are damaged or belong to other runs.
        """
        comm = self._ab.communicator
        saved = checkpoint.latest(self._folder, comm)
        if saved is None:
            return 0
        try:
            self._load(saved)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise CheckpointError(
                f"the checkpoint of step {saved.step} in {self._folder} is malformed ({error!r}): remove it, or start "
                "a new run in another folder (--out)"
            ) from error
        if comm.rank == 0:
            back = (
                f", at the last merge before it (step {self._ab.steps_done})"
                if self._ab.steps_done != saved.step
                else ""
            )
            log.info("resuming from the checkpoint of step %d%s", saved.step, back)
            if saved.workers != comm.topology.world_size:
                log.info(
                    "%d workers resume a run of %d workers: from now on the samples are divided among the new workers",
                    comm.topology.world_size,
                    saved.workers,
                )
        return self._ab.steps_done

    def _load(self, saved: checkpoint.Saved) -> None:
        comm, states = self._ab.communicator, saved.states
        own = states[comm.rank % len(states)]
        self._check_run(own, saved.step)
        engine = own["ab"]
        if saved.workers != comm.topology.world_size:
            size = comm.topology.group_size
            engines = [state["ab"] for state in states]
            engine = resized(engines, comm.rank, recipe_of(engines[0], self._ab.recipe), size)
        self._ab.load_state_dict(engine)
        for schedule, state in zip(self._schedules, own["schedules"], strict=True):
            schedule.load_state_dict(state)
        record = states[0]["record"]
        if engine["step"] != saved.step:
            for schedule in self._schedules:
                schedule.last_epoch = engine["step"] - 1
                schedule.step()
            record = {**record, "losses": record["losses"][:0]} if record else record
        _load_generators_state(own["generators"], comm.device)
        if self._recorder is not None:
            self._recorder.load_state_dict(record)

    def _check_run(self, state: Mapping[str, Any], step: int) -> None:
        """Raises CheckpointError if a state is from a run with other settings or another number of samples."""
        run = state.get("run")
        which = f"the checkpoint of step {step} in {self._folder}"
        if not isinstance(run, Mapping):
            raise CheckpointError(
                f"{which} does not contain the settings of its run: another version of abtrain may have written it. "
                "Remove it, or start a new run in another folder (--out)"
            )
        differing = differences(run, self._run)
        if differing:
            raise CheckpointError(
                f"{which} belongs to another run ({'; '.join(differing)}): "
                "use the same settings to resume it, or remove it"
            )


def _generators_state(device: torch.device) -> dict[str, Any]:
    """Returns the state of Python's random generator and of torch's on the CPU and on `device`."""
    version, numbers, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": {"version": version, "numbers": torch.tensor(numbers, dtype=torch.int64), "gauss": gauss},
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _load_generators_state(state: Mapping[str, Any], device: torch.device) -> None:
    python = state["python"]
    random.setstate((python["version"], tuple(python["numbers"].tolist()), python["gauss"]))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
