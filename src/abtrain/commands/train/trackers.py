"""Sends metrics to TensorBoard, Weights & Biases or MLflow, in addition to metrics.jsonl.

A tracker's package is imported only if the tracker is requested. A tracker never ends a run: its first error is logged,
and it is not called again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from abtrain.commands.never_fatal import NeverFatal
from abtrain.commands.train.config import TrainConfig
from abtrain.errors import nearest

Numbers = Mapping[str, float]
Kind = Literal["train", "eval", "merge"]
"""The kinds of metrics. Names of metrics in trackers begin with their kind, such as `train/loss`."""
_NO_METRICS = frozenset({"step", "began"})  # trackers receive the step separately


class Tracker(Protocol):
    """The interface of a tracker, which receives the metrics of a run."""

    def log(self, step: int, numbers: Numbers) -> None:
        """Records the metrics of a step. `numbers` contains their values by name."""
        ...

    def finish(self, numbers: Numbers) -> None:
        """Records the result of a finished run. `numbers` contains its numeric values by name."""
        ...

    def close(self, finished: bool) -> None:
        """Sends the remaining metrics and closes the tracker. `finished` is False if the run was stopped or failed."""
        ...


class TensorBoard:
    """Writes event files to FOLDER/tensorboard, for `tensorboard --logdir`."""

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, numbers: Numbers) -> None:
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)

    def finish(self, numbers: Numbers) -> None:
        self.log(0, {f"result/{name}": number for name, number in numbers.items()})

    def close(self, finished: bool) -> None:
        self._writer.close()


class WandB:
    """Records the run in W&B's project `abtrain`; with WANDB_MODE=offline, in FOLDER/wandb, for `wandb sync`."""

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        import wandb

        # The identifier comes from the folder, so a resumed run continues its record.
        number = hashlib.blake2b(str(folder.absolute()).encode(), digest_size=8).hexdigest()
        settings = {name: str(value) for name, value in dataclasses.asdict(config).items()}
        self._run: Any = wandb.init(
            project="abtrain", name=folder.name, id=number, resume="allow", dir=str(folder), config=settings
        )

    def log(self, step: int, numbers: Numbers) -> None:
        self._run.log(dict(numbers), step=step)

    def finish(self, numbers: Numbers) -> None:
        self._run.summary.update(dict(numbers))

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class MLflow:
    """Records the run in MLflow's experiment `abtrain`, in FOLDER/mlflow unless MLFLOW_TRACKING_URI is set."""

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        import mlflow

        self._mlflow: Any = mlflow
        if "MLFLOW_TRACKING_URI" not in os.environ:
            mlflow.set_tracking_uri((folder / "mlflow").absolute().as_uri())
        mlflow.set_experiment("abtrain")
        mlflow.start_run(run_name=folder.name)
        mlflow.log_params({name: str(value)[:500] for name, value in dataclasses.asdict(config).items()})

    def log(self, step: int, numbers: Numbers) -> None:
        self._mlflow.log_metrics(dict(numbers), step=step)

    def finish(self, numbers: Numbers) -> None:
        self._mlflow.log_metrics({f"result_{name}": number for name, number in numbers.items()})

    def close(self, finished: bool) -> None:
        self._mlflow.end_run("FINISHED" if finished else "FAILED")


TRACKERS: dict[str, tuple[str, Callable[[Path, TrainConfig], Tracker]]] = {
    "tensorboard": ("tensorboard", TensorBoard),
    "wandb": ("wandb", WandB),
    "mlflow": ("mlflow", MLflow),
}
"""By the name of each tracker: the package that it needs, and its class."""


def tracker_problems(names: Sequence[str]) -> list[str]:
    """Returns a message for each requested tracker that is unknown or not installed."""
    found = []
    for name in names:
        if name not in TRACKERS:
            found.append(f"unknown tracker {name!r}: {nearest(name, TRACKERS)}")
        elif importlib.util.find_spec(TRACKERS[name][0]) is None:
            found.append(f"--track {name}: {TRACKERS[name][0]} is not installed: pip install 'abtrain[{name}]'")
    return found


class Trackers:
    """All trackers of a run. Their errors are logged and do not end the run.

    Args:
        config: the settings of the run.
        folder: the run folder.
    """

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        self._live: dict[str, Tracker] = {}
        self._never_fatal = NeverFatal()

        def begin(name: str) -> None:
            self._live[name] = TRACKERS[name][1](folder, config)

        for name in config.track:
            self._never_fatal(name, begin, name)

    def log(self, kind: Kind, step: int, record: Mapping[str, Any]) -> None:
        """Sends the numeric values in a record of metrics to all trackers, under names such as `train/loss`."""
        numbers = {f"{kind}/{name}": value for name, value in _numbers(record).items() if name not in _NO_METRICS}
        self._each(lambda tracker: tracker.log(step, numbers))

    def finish(self, result: Mapping[str, Any]) -> None:
        """Sends the numeric values in the result to all trackers."""
        self._each(lambda tracker: tracker.finish(_numbers(result)))

    def close(self, finished: bool) -> None:
        """Closes all trackers. `finished` is False if the run was stopped or failed."""
        self._each(lambda tracker: tracker.close(finished))

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._live.items()):
            if not self._never_fatal(name, call, tracker):
                del self._live[name]


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
