"""Everything that can be wrong with the settings of a run."""

from __future__ import annotations

import dataclasses
import typing

import torch

from abtrain import recipes
from abtrain.comm.topology import topology_problems
from abtrain.commands.tasks.choices import DEVICES, Init, OnBadImage, OnCheckpointError, OnNonFinite, Precision
from abtrain.commands.tasks.task import TASKS
from abtrain.commands.train.config import TrainConfig, choose_device, local_workers
from abtrain.commands.train.folder_content import holds_nothing, holds_unfinished_run
from abtrain.commands.train.trackers import tracker_problems
from abtrain.errors import ConfigurationError, nearest
from abtrain.recipes.numbers import is_finite_number

_LEAST = {
    "steps": 1,
    "batch_size": 1,
    "log_every": 1,
    "keep": 1,
    "checkpoint_every": 0,
    "max_restarts": 0,
    "loaders": 0,
}
_LONGEST_TIMEOUT = 10**7  # seconds; what is longer does not fit into every clock that it is given to


def validate(config: TrainConfig) -> list[str]:
    """Everything that is wrong with the settings, a message each; empty if nothing is."""
    return _text_problems(config) or [
        *_value_problems(config),
        *tracker_problems(config.track),
        *topology_problems(config.workers, 1 if config.group_size is None else config.group_size),
        *_task_and_recipe_problems(config),
        *_folder_problems(config),
        *_device_problems(config),
    ]


def _text_problems(config: TrainConfig) -> list[str]:
    """Texts that neither a path nor config.toml can hold."""
    problems = []
    for name, value in dataclasses.asdict(dataclasses.replace(config, config=None)).items():
        option = f"--{name.replace('_', '-')}"
        for text in map(str, value if isinstance(value, tuple) else [value]):
            if any("\ud800" <= letter <= "\udfff" for letter in text):
                problems.append(f"{option} {text!a} is not UTF-8, as config.toml must be: use a name that is")
            elif "\0" in text:
                problems.append(f"{option} {text!r} holds a null byte: name a path without one")
    return problems


def _value_problems(config: TrainConfig) -> list[str]:
    problems = []
    choices = {"init": Init, "precision": Precision, "on_bad_image": OnBadImage}
    for name, kind in choices.items():
        value, known = getattr(config, name), typing.get_args(kind)
        if value is not None and value not in known:
            problems.append(f"unknown {name} {value!r}: {nearest(value, known)}")
    if config.on_nonfinite not in typing.get_args(OnNonFinite):
        known = typing.get_args(OnNonFinite)
        problems.append(f"unknown on_nonfinite {config.on_nonfinite!r}: {nearest(config.on_nonfinite, known)}")
    if config.on_checkpoint_error not in typing.get_args(OnCheckpointError):
        known = typing.get_args(OnCheckpointError)
        problems.append(f"unknown on_checkpoint_error {config.on_checkpoint_error!r}: use {' or '.join(known)}")
    for name, least in _LEAST.items():
        value = getattr(config, name)
        if value is not None and value < least:
            problems.append(f"--{name.replace('_', '-')} {value} is too small: use at least {least}")
    if not 0 <= config.seed < 2**32:
        problems.append(f"--seed {config.seed} is out of range: use a number from 0 to {2**32 - 1}")
    if config.lr is not None and not (is_finite_number(config.lr) and config.lr > 0):
        problems.append(f"--lr {config.lr} is not a finite number above 0: use one")
    if not 0 < config.timeout <= _LONGEST_TIMEOUT:
        problems.append(f"--timeout {config.timeout} is out of range: use a number above 0, up to {_LONGEST_TIMEOUT}")
    for name in ("weight_decay", "clip"):
        value = getattr(config, name)
        if value is not None and not (is_finite_number(value) and value >= 0):
            problems.append(f"--{name.replace('_', '-')} {value} is not a finite number of at least 0: use one")
    return problems


def _task_and_recipe_problems(config: TrainConfig) -> list[str]:
    problems = []
    task = TASKS.get(config.task)
    if task is None:
        problems.append(f"unknown task {config.task!r}: {nearest(config.task, TASKS)}")
    steps = config.steps if config.steps is not None else task.steps if task is not None else None
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
        usable = config.overwrite or (config.resume and holds_unfinished_run(out)) or holds_nothing(out)
        if not usable:
            return [f"--out {out} is not empty: name another folder, or add --overwrite to replace its run"]
    except OSError as error:
        return [f"--out {out} cannot be looked into: {error}"]
    return []


def _device_problems(config: TrainConfig) -> list[str]:
    if config.device not in DEVICES:
        return [f"unknown device {config.device!r}: {nearest(config.device, DEVICES)}"]
    if config.device == "cuda" and choose_device(dataclasses.replace(config, device="auto")) == "cpu":
        return [
            f"--device cuda: this machine has {torch.cuda.device_count()} usable GPUs, and each of the "
            f"{local_workers(config)} workers on it needs its own: use --device cpu, or fewer workers"
        ]
    return []
