"""The training loop, as one worker runs it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import platform
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from abtrain import __version__, recipes
from abtrain.comm.communicator import Communicator
from abtrain.engine import ABTraining
from abtrain.errors import NonFiniteError
from abtrain.export import weights_digest
from abtrain.sync import GradientSync
from abtrain.train.config import TrainConfig, used_options
from abtrain.train.progress import Display
from abtrain.train.run_folder import RunFolder
from abtrain.train.tasks import TASKS, Task, batches, build_model, build_optimizer, build_schedule, evaluate


def train(config: TrainConfig, communicator: Communicator) -> dict[str, Any]:
    """Trains, and on rank 0 evaluates, shows and records. Collective: every worker calls it.

    Args:
        config: valid and resolved; `workers` and `group_size` are the communicator's.
        communicator: how to reach the other workers; the model trains on its device.

    Returns:
        On rank 0 the content of result.json, elsewhere nothing.

    Raises:
        ConfigurationError: settings that do not fit the data or the model. No run folder is made then.
        DataError: data that is missing or damaged. No run folder is made then.
        NonFiniteError: the loss is NaN or infinite.
    """
    assert config.steps is not None and config.batch_size is not None and config.lr is not None
    task, rank = TASKS[config.task], communicator.rank
    data = task.load(config.data).to(communicator.device)
    stream = batches(task, data, seed=config.seed, rank=rank, world_size=config.workers, batch_size=config.batch_size)
    model = build_model(task, config.seed, config.init).to(communicator.device)
    parameters = sum(p.numel() for p in model.parameters())
    optimizer = build_optimizer(model, config.lr, config.weight_decay)
    schedule = build_schedule(optimizer, config.steps)
    recipe = recipes.build(config.recipe, config.steps, **used_options(config))
    started = time.perf_counter()
    ab = ABTraining(model, optimizer, recipe, communicator=communicator, on_nonfinite=config.on_nonfinite)
    with contextlib.ExitStack() as stack:
        recorder = stack.enter_context(_Recorder(config, parameters)) if rank == 0 else None
        _run(config, task, ab, schedule, stream, recorder)
        seconds = time.perf_counter() - started
        result = {}
        with ab.merged():
            if recorder is not None:
                result = _result(config, ab, parameters, seconds, evaluate(model, task, data))
                recorder.finish(result)
            communicator.barrier()
    return result


class _Recorder:
    """What rank 0 alone does: the run folder and the display."""

    def __init__(self, config: TrainConfig, parameters: int) -> None:
        assert config.steps is not None
        self._last_step, self._every = config.steps, config.log_every
        self._started = time.perf_counter()
        self._losses: list[float] = []
        self._folder = RunFolder(config)
        self._display = Display(config.steps)
        self._display.heading(config, parameters)

    def __enter__(self) -> _Recorder:
        self._display.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._display.__exit__(*exception)
        self._folder.__exit__(*exception)

    def step(self, step: int, phase: str, loss: float, lr: float, payload_bytes: int) -> None:
        """Every so many steps: a line of metrics, the loss averaged since the last."""
        self._losses.append(loss)
        if step % self._every and step != self._last_step:
            return
        record = {
            "step": step,
            "phase": phase,
            "loss": math.fsum(self._losses) / len(self._losses),
            "lr": lr,
            "payload_bytes": payload_bytes,
            "seconds": round(time.perf_counter() - self._started, 3),
        }
        self._losses.clear()
        self._folder.log(record)
        self._display.show(record)

    def finish(self, result: dict[str, Any]) -> None:
        """The end of a run that went well."""
        self._folder.finish(result)
        self._display.__exit__(None, None, None)
        self._display.summary(result, self._folder.path)


def _run(
    config: TrainConfig,
    task: Task,
    ab: ABTraining,
    schedule: LRScheduler,
    stream: Iterator[tuple[Tensor, Tensor]],
    recorder: _Recorder | None,
) -> None:
    meter = ab.communicator.meter
    while ab.position is not None:
        x, y = next(stream)
        phase = ab.position.phase.name
        lr = float(schedule.get_last_lr()[0]) * ab.rebound_factor
        loss = task.loss(ab(x), y)
        value = loss.item()
        gradients_travel = isinstance(ab.position.phase.sync, GradientSync)
        if not math.isfinite(value) and (gradients_travel or config.on_nonfinite == "stop"):
            # Before the gradients of this worker reach the others; the launcher ends those.
            raise NonFiniteError(
                f"the loss of worker {ab.communicator.rank} is {value} at step {ab.steps_done} ({phase}), "
                f"learning rate {lr:.3g}: lower --lr (now {config.lr}), or try another --seed"
            )
        loss.backward()
        ab.optimizer.step()
        schedule.step()
        ab.optimizer.zero_grad()
        ab.step(value)
        if recorder is not None:
            recorder.step(ab.steps_done, phase, value, lr, meter.payload()["total"])


def _result(
    config: TrainConfig, ab: ABTraining, parameters: int, total: float, scores: dict[str, float | None]
) -> dict[str, Any]:
    """The content of result.json."""
    meter, topology = ab.communicator.meter, ab.communicator.topology
    payload, svd = meter.payload(), ab.seconds["svd"]
    return {
        "recipe": config.recipe,
        "task": config.task,
        "seed": config.seed,
        "world_size": topology.world_size,
        "group_size": topology.group_size,
        "steps": ab.steps_done,
        **scores,
        "seconds": {
            "total": total,
            "compute": total - meter.sync_seconds - svd,
            "sync": meter.sync_seconds,
            "svd": svd,
        },
        "payload_bytes": payload,
        # DDP hands over every parameter's gradient, 4 bytes each, at every step.
        "payload_ratio": payload["total"] / (4 * parameters * ab.steps_done),
        "parameters": parameters,
        "compression": ab.compression,
        "ranks": ab.rank_history,
        "decisions": ab.decisions,
        "weights_digest": weights_digest(ab.dense_state_dict()),
        "schedule": repr(ab.recipe),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "abtrain": __version__},
        "hardware": {
            "platform": platform.platform(),
            "device": _device_name(ab.communicator.device),
            "cores": os.cpu_count(),
            "threads_per_worker": torch.get_num_threads(),
        },
        "config": dataclasses.asdict(config),
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
