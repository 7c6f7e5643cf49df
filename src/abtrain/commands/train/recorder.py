"""Records a run in its folder and in trackers, and displays it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from abtrain.commands.never_fatal import NeverFatal
from abtrain.commands.train.config import TrainConfig
from abtrain.commands.train.display import Display
from abtrain.commands.train.run_folder import RunFolder
from abtrain.commands.train.trackers import Kind, Trackers
from abtrain.commands.train.trainer import StepFigures
from abtrain.errors import StoppedError


class Recorder:
    """Records a run on rank 0 in its folder and in trackers, and displays it.

    It is a context manager. At its end it closes the trackers, and records whether the run was stopped on request.

    Attributes:
        validation: the `last` and the `best` validation so far; empty before the first one.
        aside: the seconds of validations and checkpoints, which do not count as training, by the names under which the
            meter counts the bytes.
    """

    def __init__(self, config: TrainConfig, folder: RunFolder, parameters: int) -> None:
        assert config.steps is not None and config.batch_size is not None
        self._last_step, self._every = config.steps, config.log_every
        self._samples_per_step = config.workers * config.batch_size
        self._started = self._last_log = time.perf_counter()
        self._losses: list[float] = []
        self._steps = 0  # in this process since the last log
        self._merges: list[dict[str, Any]] = []  # since the last log
        self._step = 0
        self._folder = folder
        self._display = Display(config.steps)
        self._never_fatal = NeverFatal()
        self._heading = config, parameters
        self._trackers: Trackers | None = None
        self.validation: dict[str, Any] = {}
        self.aside: dict[str, float] = {}

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._never_fatal("the display", self._display.__exit__, kind, error, trace)
        if isinstance(error, StoppedError):
            outcome = {"outcome": "stopped", "exit_code": error.exit_code, "step": self._step, "message": str(error)}
            self._never_fatal("outcome.json", self._folder.stop, outcome)
        if self._trackers is not None:
            self._trackers.close(finished=error is None)

    @property
    def seconds(self) -> float:
        """The wall time of the run so far in seconds, including earlier attempts."""
        return time.perf_counter() - self._started

    def begin(self, step: int) -> None:
        """Begins recording a run, or resumes it after `step` steps."""
        seconds = self.seconds if step else 0.0
        self._step = step
        self._folder.begin(step)
        self._trackers = Trackers(self._heading[0], self._folder.path)
        self._never_fatal("the display", self._display.heading, *self._heading)
        self._never_fatal("the display", self._display.__enter__)
        # The time of a run does not include its setup.
        self._last_log = time.perf_counter()
        self._started = self._last_log - seconds

    def complete(self, config: TrainConfig) -> None:
        """Records the settings with a choice of the recipe `auto` in config.toml."""
        self._never_fatal("config.toml", self._folder.complete, config)

    def state_dict(self) -> dict[str, Any]:
        """Returns the losses since the last log, the times and the validations so far, for `load_state_dict`."""
        return {
            "losses": torch.tensor(self._losses, dtype=torch.float64),
            "seconds": self.seconds,
            "validation": self.validation,
            "aside": self.aside,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues with the losses, the times and the validations of a `state_dict`."""
        self._losses = state["losses"].tolist()
        self._started = time.perf_counter() - float(state["seconds"])
        self.validation = dict(state["validation"])
        self.aside = dict(state.get("aside", {}))

    def logs(self, step: int) -> bool:
        """Whether the metrics are logged after `step` steps."""
        return step % self._every == 0 or step == self._last_step

    def step(
        self, step: int, phase: str, figures: StepFigures, payload_bytes: int, divergence: Sequence[Any] = ()
    ) -> None:
        """Records a step. Every `log_every` steps it logs the metrics, with the mean loss since the last log."""
        self._losses.append(figures.loss)
        self._step = step
        self._steps += 1
        if not self.logs(step):
            return
        now = time.perf_counter()
        record = {
            "step": step,
            "phase": phase,
            "loss": math.fsum(self._losses) / len(self._losses),
            "lr": figures.lr,
            "grad_norm": figures.grad_norm,
            "samples_per_second": round(self._steps * self._samples_per_step / (now - self._last_log), 1),
            "payload_bytes": payload_bytes,
            "seconds": round(self.seconds, 3),
        }
        if divergence:
            record["divergence"] = divergence[-1]
        self._log("train", record, record)
        self._never_fatal("the display", self._display.show, record, self._merges)
        self._losses, self._merges, self._steps, self._last_log = [], [], 0, now

    def merged(self, step: int, phase: str, merges: Sequence[Mapping[str, Any]]) -> None:
        """Records the merges that ended after `step` steps, as `ABTraining.last_merges` lists them."""
        for merge in merges:
            figures = merge_figures(merge)
            self._merges.append(figures)
            record = {"step": step, "phase": phase, "merge": figures, "seconds": round(self.seconds, 3)}
            self._log("merge", record, {**figures, "workers": len(figures["ranks"])})

    def _log(self, kind: Kind, record: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
        """Adds `record` to metrics.jsonl, and sends the numbers in `figures` to the trackers."""
        self._never_fatal("metrics.jsonl", self._folder.log, record)
        if self._trackers is not None:
            self._trackers.log(kind, record["step"], figures)

    def spent(self, name: str, seconds: float) -> None:
        """Adds the seconds of a validation or checkpoint, which do not count as training, to `aside[name]`."""
        self.aside[name] = self.aside.get(name, 0.0) + seconds
        self._last_log += seconds

    def validated(self, step: int, phase: str, quality: Mapping[str, Any]) -> bool:
        """Records a validation. Returns whether its model is the best so far.

        The best model has the highest top-1 accuracy; for tasks without classes, the lowest loss. A model for which
        this number is not finite is never the best.
        """
        found = {"step": step, **quality}
        best = self.validation.get("best")
        key = "loss" if quality["top1"] is None else "top1"
        sign = -1 if key == "loss" else 1
        is_best = math.isfinite(quality[key]) and (best is None or sign * quality[key] > sign * best[key])
        self.validation = {"last": found, "best": found if is_best else best}
        record = {"step": step, "phase": phase, "validation": dict(quality), "seconds": round(self.seconds, 3)}
        self._log("eval", record, quality)
        self._never_fatal("the display", self._display.validated, step, quality, is_best)
        return is_best

    def finish(self, result: dict[str, Any], models: Mapping[str, Any]) -> None:
        """Records and displays the result of a finished run. `models` describes its model files."""
        self._folder.finish(result, models)
        if self._trackers is not None:
            self._trackers.finish(result)
        self._never_fatal("the display", self._display.__exit__, None, None, None)
        self._never_fatal("the display", self._display.summary, result, self._folder.path)


def merge_figures(merge: Mapping[str, Any]) -> dict[str, Any]:
    """Summarizes an entry of `ABTraining.last_merges`, for metrics.jsonl.

    Returns:
        The step at which the merge began, the ranks that took part, the mean and maximum of their losses (None if no
        loss is known), the seconds that the merge took, and the seconds that this worker waited.
    """
    ranks = [rank for rank in range(len(merge["losses"])) if rank not in merge["dropped"]]
    losses = [merge["losses"][rank] for rank in ranks if not math.isnan(merge["losses"][rank])]
    return {
        "began": merge["step"],
        "ranks": ranks,
        "loss_mean": math.fsum(losses) / len(losses) if losses else None,
        "loss_max": max(losses) if losses else None,
        "seconds": round(merge["seconds"], 4),
        "wait_seconds": round(merge["wait_seconds"], 4),
    }
