"""Checkpoints of a run: what the engine holds, and what belongs to the loop beside it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch.optim.lr_scheduler import LRScheduler

from abtrain import checkpoint
from abtrain.commands.train.config import TrainConfig, differences, identity
from abtrain.commands.train.generators import generators_state, load_generators_state
from abtrain.engine.ab_training import ABTraining
from abtrain.engine.resizing import can_be_resized, resized
from abtrain.errors import CheckpointError

log = logging.getLogger("abtrain")


class Record(Protocol):
    """The records that rank 0 keeps beside training."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Saving:
    """Saves a run and goes on with it. Every call is collective: all workers make it, at the same step.

    Args:
        config: of the run.
        ab: its engine.
        schedule: of the learning rate.
        record: on rank 0, what it keeps; elsewhere None.
        folder: of the checkpoints, the same on all workers.
        samples: that there are to train on; a checkpoint of a run on others is refused.
    """

    def __init__(
        self,
        config: TrainConfig,
        ab: ABTraining,
        schedule: LRScheduler,
        record: Record | None,
        folder: Path,
        samples: int = 0,
    ) -> None:
        self._config = config
        self._run = {**identity(config), "samples": samples}
        self._ab = ab
        self._schedule = schedule
        self._record = record
        self._folder = folder

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after so many steps."""
        return self._config.checkpoint_every > 0 and step % self._config.checkpoint_every == 0

    def save(self) -> Path | None:
        """Writes a checkpoint; None where it could not be written, and the run is to go on.

        Raises:
            CheckpointError: it could not be written, and the run is to stop.
        """
        ab, comm = self._ab, self._ab.communicator
        engine = ab.state_dict()
        state = {
            "run": self._run,
            "ab": engine,
            "schedule": self._schedule.state_dict(),
            "generators": generators_state(comm.device),
            "record": {} if self._record is None else self._record.state_dict(),
        }
        phase, comm.meter.phase = comm.meter.phase, "checkpoint"
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
                log.warning("%s: the run goes on with the older checkpoints", error)
            return None
        finally:
            comm.meter.phase = phase

    def resume(self) -> int:
        """Goes on from the newest checkpoint that all workers can use; how many steps are done then.

        Raises:
            CheckpointError: there are checkpoints, but none that fits or is whole.
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
                "a new run"
            ) from error
        if comm.rank == 0:
            back = f", back at the merge of step {self._ab.steps_done}" if self._ab.steps_done != saved.step else ""
            log.info("going on from the checkpoint of step %d%s", saved.step, back)
            if saved.workers != comm.topology.world_size:
                log.info(
                    "%d workers go on with what %d left: samples are dealt out anew",
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
            engine = resized([state["ab"] for state in states], comm.rank, self._ab.recipe)
        self._ab.load_state_dict(engine)
        self._schedule.load_state_dict(own["schedule"])
        record = states[0]["record"]
        if engine["step"] != saved.step:
            self._schedule.last_epoch = engine["step"] - 1
            self._schedule.step()
            record = {**record, "losses": record["losses"][:0]} if record else record
        load_generators_state(own["generators"], comm.device)
        if self._record is not None:
            self._record.load_state_dict(record)

    def _check_run(self, state: Mapping[str, Any], step: int) -> None:
        """Makes sure that a state is of a run of the same settings, on data of the same size.

        Raises:
            CheckpointError: it is not, with what differs.
        """
        run = state.get("run")
        which = f"the checkpoint of step {step} in {self._folder}"
        if not isinstance(run, Mapping):
            raise CheckpointError(
                f"{which} does not say which settings it was saved with: it is of another version of abtrain. Remove "
                "it, or start a new run"
            )
        differing = differences(run, self._run)
        if differing:
            raise CheckpointError(
                f"{which} is of another run ({'; '.join(differing)}): use the same settings to go on from it, or "
                "remove it"
            )
