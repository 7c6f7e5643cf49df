"""Validates the settings of a run."""

from __future__ import annotations

import dataclasses
import typing

import torch

from abtrain import recipes
from abtrain.comm.topology import topology_problems
from abtrain.commands.files import is_regular
from abtrain.commands.tasks.choices import DEVICES, Init, OnBadImage, OnCheckpointError, OptimizerName, Precision
from abtrain.commands.tasks.task import TASKS
from abtrain.commands.train.config import TrainConfig, choose_device, local_workers, resolve
from abtrain.commands.train.folder_content import RESULT_FILE, holds_nothing, holds_unfinished_run
from abtrain.commands.train.trackers import tracker_problems
from abtrain.errors import ConfigurationError, OnNonFinite, nearest
from abtrain.recipes.numbers import is_finite_number

_CHOICES = {
    "init": typing.get_args(Init),
    "precision": typing.get_args(Precision),
    "optimizer": typing.get_args(OptimizerName),
    "on_bad_image": typing.get_args(OnBadImage),
    "on_nonfinite": typing.get_args(OnNonFinite),
    "on_checkpoint_error": typing.get_args(OnCheckpointError),
    "device": DEVICES,
}
_MINIMA = {
    "steps": 1,
    "batch_size": 1,
    "log_every": 1,
    "validate_every": 0,
    "keep": 1,
    "checkpoint_every": 0,
    "max_restarts": 0,
    "loaders": 0,
}
_MAX_TIMEOUT = 10**7  # seconds; longer times overflow in some of the libraries that wait


def checked(config: TrainConfig) -> TrainConfig:
    """Validates the settings, and returns them with all defaults filled in.

    Raises:
        ConfigurationError: at least one setting is invalid. The error lists all invalid settings.
    """
    problems = validate(config)
    if problems:
        raise ConfigurationError(problems)
    return resolve(config)


def validate(config: TrainConfig) -> list[str]:
    """Returns a message for each invalid setting; empty if all are valid."""
    return _text_problems(config) or [
        *_value_problems(config),
        *tracker_problems(config.track),
        *topology_problems(config.workers, 1 if config.group_size is None else config.group_size),
        *_task_and_recipe_problems(config),
        *_folder_problems(config),
        *_device_problems(config),
    ]


def _text_problems(config: TrainConfig) -> list[str]:
    """Returns a message for each string that is not UTF-8 or contains a null byte."""
    problems = []
    for name, value in dataclasses.asdict(dataclasses.replace(config, config=None)).items():
        for text in map(str, value if isinstance(value, tuple) else [value]):
            if any("\ud800" <= letter <= "\udfff" for letter in text):
                problems.append(f"{_option(name)} {text!a} is not UTF-8, but config.toml must be: use a name in UTF-8")
            elif "\0" in text:
                problems.append(f"{_option(name)} {text!r} contains a null byte: use a name without one")
    return problems


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _value_problems(config: TrainConfig) -> list[str]:
    values = {name: value for name, value in vars(config).items() if value is not None}
    problems = [
        f"unknown {name} {values[name]!r}: {nearest(values[name], known)}"
        for name, known in _CHOICES.items()
        if name in values and values[name] not in known
    ]
    problems += [
        f"{_option(name)} {values[name]} is too small: use at least {minimum}"
        for name, minimum in _MINIMA.items()
        if name in values and values[name] < minimum
    ]
    if not 0 <= config.seed < 2**32:
        problems.append(f"--seed {config.seed} is out of range: use a number from 0 to {2**32 - 1}")
    if config.lr is not None and not (is_finite_number(config.lr) and config.lr > 0):
        problems.append(f"--lr {config.lr} is not a finite number above 0: use a number such as 0.001")
    if not 0 < config.timeout <= _MAX_TIMEOUT:
        problems.append(f"--timeout {config.timeout} is out of range: use a number above 0, up to {_MAX_TIMEOUT}")
    for name in ("weight_decay", "clip"):
        if name in values and not (is_finite_number(values[name]) and values[name] >= 0):
            problems.append(
                f"{_option(name)} {values[name]} is not a finite number of at least 0: use a number such as 0.1"
            )
    return problems


def _task_and_recipe_problems(config: TrainConfig) -> list[str]:
    task = TASKS.get(config.task)
    problems = [] if task else [f"unknown task {config.task!r}: {nearest(config.task, TASKS)}"]
    steps = task.steps if config.steps is None and task else config.steps
    try:
        if steps is not None and steps >= 1:
            recipes.from_text(config.recipe, steps)
        else:
            recipes.parse(config.recipe)
    except ConfigurationError as error:
        problems += error.problems
    return problems


def _folder_problems(config: TrainConfig) -> list[str]:
    out = config.out
    try:
        if out is None or not out.exists():
            return []
        if not out.is_dir():
            return [f"--out {out} is a file: name a folder that is empty or does not exist yet"]
        if config.overwrite or (config.resume and holds_unfinished_run(out)) or holds_nothing(out):
            return []
        if is_regular(out / RESULT_FILE):
            return [
                f"--out {out} contains a finished run, with its results in {RESULT_FILE}: name another folder for a "
                "new run, or add --overwrite to replace the finished one"
            ]
        return [f"--out {out} is not empty: name another folder, or add --overwrite to replace the run in it"]
    except OSError as error:
        return [f"--out {out} cannot be read: {error}. Make it readable, or name another folder"]


def _device_problems(config: TrainConfig) -> list[str]:
    if config.device == "cuda" and choose_device(dataclasses.replace(config, device="auto")) == "cpu":
        return [
            f"--device cuda: this machine has {torch.cuda.device_count()} usable GPUs, and each of its "
            f"{local_workers(config)} workers needs its own: use --device cpu, or fewer workers"
        ]
    return []
