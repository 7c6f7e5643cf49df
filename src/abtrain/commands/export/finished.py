"""Rebuilds the models of a finished run from its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from abtrain.commands.files import is_regular, read_regular
from abtrain.commands.tasks.models import without_own_layers
from abtrain.commands.tasks.samples import Data
from abtrain.commands.tasks.task import TASKS, Task, build_model
from abtrain.commands.train.config import TrainConfig
from abtrain.commands.train.config_file import from_text
from abtrain.commands.train.folder_content import BEST_MODEL, CONFIG_FILE, MODEL, RESULT_FILE, model_files
from abtrain.errors import ConfigurationError
from abtrain.lowrank.model_file import load
from abtrain.lowrank.plain import multiplied_out, plain_copy


@dataclass(frozen=True)
class FinishedRun:
    """A finished run, whose model can be loaded from its folder.

    Attributes:
        folder: the run folder.
        name: the name of the model's files: that of the last model, or of the best one of all validations.
        config: the settings of the run.
    """

    folder: Path
    name: str
    config: TrainConfig

    @property
    def task(self) -> Task:
        return TASKS[self.config.task]

    def trained(self) -> nn.Module:
        """Returns the model with its factors, in evaluation mode."""
        return self._loaded("factored")

    def dense(self) -> nn.Module:
        """Returns the model with dense weights, in evaluation mode."""
        return self._loaded("dense")

    def plain(self) -> nn.Module:
        """Returns the model made of plain PyTorch modules, in evaluation mode."""
        return without_own_layers(plain_copy(self.trained())[0])

    def multiplied_out(self) -> str:
        """Describes the weights of the plain model that are dense, though their factors are smaller; empty if none."""
        kept = plain_copy(self.trained())[1]
        return multiplied_out(kept) if kept else ""

    def data(self, folder: Path | None) -> Data:
        """Loads the task's data from `folder`; if that is None, from the folder that the run used.

        Raises:
            DataError: the data is missing.
        """
        return self.task.load(folder or self.config.data)

    def _loaded(self, form: str) -> nn.Module:
        model = build_model(self.task, self.config.seed).eval()
        load(model, self.folder / model_files(self.name)[form])
        return model


def find_run(folder: Path, best: bool) -> FinishedRun:
    """Returns the run in a folder, with its last model, or with the best one of all validations.

    Raises:
        ConfigurationError: the folder contains no run, its settings are damaged, or it has no such model.
    """
    if not is_regular(folder / CONFIG_FILE):
        raise ConfigurationError(f"{folder} is not a run folder: name the --out folder of `abtrain train`")
    name = BEST_MODEL if best else MODEL
    missing = [file for file in model_files(name).values() if not is_regular(folder / file)]
    if missing:
        raise ConfigurationError(f"{folder} has no {missing[0]}: {_remedy(folder, best)}")
    config = from_text(read_regular(folder / CONFIG_FILE), str(folder / CONFIG_FILE))
    if config.task not in TASKS:
        raise ConfigurationError(
            f"{folder / CONFIG_FILE} names the task {config.task!r}, which this version of abtrain does not have: "
            "use the version that trained the run"
        )
    return FinishedRun(folder, name, config)


def _remedy(folder: Path, best: bool) -> str:
    """Returns what to do in a folder that has no model files."""
    if best:
        return "train with --validate-every, which keeps the best model"
    if is_regular(folder / RESULT_FILE):
        return "another version of abtrain wrote the run: use that version, or train again"
    known = all(is_regular(folder / file) for file in model_files(BEST_MODEL).values())
    validated = ", or take the best model so far with --best" if known else ""
    return f"the run has not finished. The same `abtrain train` command with --out {folder} continues it{validated}"


def inputs(run: FinishedRun, data: Data, count: int) -> Tensor:
    """Returns `count` inputs for the model: the start of the test set, which is repeated if it is shorter."""
    x, _ = next(iter(data.test.in_order(count)))
    repeated = x.repeat(-(-count // len(x)), *(1 for _ in x.shape[1:]))
    return run.task.prepare(repeated[:count])


@torch.no_grad()
def largest_difference(one: nn.Module, other: nn.Module, x: Tensor) -> float:
    """Returns the largest absolute difference between the outputs of two models for inputs `x`."""
    return float((one(x) - other(x)).abs().max())
