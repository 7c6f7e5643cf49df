"""The settings of a run and their defaults. What can be wrong with them: `config_problems.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from abtrain import recipes
from abtrain.commands.tasks.choices import Init, OnBadImage, OnCheckpointError, OnNonFinite, Precision
from abtrain.commands.train.world import is_joined, local_size
from abtrain.recipes.recipe import Recipe

# torch takes seconds to import: what needs it is imported where it is used, so that `--help` answers at once.


@dataclass(frozen=True)
class TrainConfig:
    """Trains a task by a recipe, on workers of its own or on those of torchrun."""

    recipe: Annotated[
        Positional[str],
        arg(
            help=f"RECIPE or RECIPE:OPTION=VALUE,OPTION=VALUE, such as ab_outer:every=40,wire=int4. Recipes are "
            f"{', '.join(recipes.RECIPES)}; `abtrain recipes RECIPE` lists the options of one."
        ),
    ] = recipes.DEFAULT
    task: str = "digits-mlp"
    """digits-mlp, fashion-cnn, fashion-vit, pysrc-gpt, or one of the paper's: imagenet-vit-b16, imagenet-resnet50,
    cifar10-vgg16, cifar100-mini-vit."""
    workers: int = 4
    """Processes to start on this machine; under torchrun it is torchrun that says."""
    group_size: int | None = None
    """Workers that share their gradients at every step; by default those of a machine, and 1 on a single machine."""
    steps: int | None = None
    """Optimizer steps of the run; by default the task's."""
    batch_size: int | None = None
    """Samples per worker and step; by default the task's."""
    lr: float | None = None
    """Highest learning rate: reached after 5 % of the steps, then a cosine to zero; by default the task's."""
    weight_decay: float | None = None
    """AdamW's, on matrices only; by default the task's."""
    clip: float | None = None
    """Largest norm of all gradients together, longer ones are shortened to it; 0: any; by default the task's."""
    precision: Precision | None = None
    """Of forward and backward passes: fp32, or bf16 where autocast finds that safe; by default the task's."""
    seed: int = 0
    """Of the initial weights, the order of the samples, and their augmentation."""
    init: Init | None = None
    """Initial weights: PyTorch's own (default), or every matrix orthogonal; by default the task's."""
    data: Path | None = None
    """Folder with the task's data; by default its usual place."""
    loaders: int = 4
    """Processes that read images for each worker, where they are not held in memory; 0: the worker itself."""
    on_bad_image: OnBadImage = "stop"
    """Where an image cannot be read: stop, or name it and take the next one in its place (skip)."""
    out: Path | None = None
    """Run folder; by default runs/TASK-RECIPE-seedSEED-TIME."""
    overwrite: bool = False
    """Replace the run that the folder holds."""
    config: Path | None = None
    """TOML file with any of these settings; the command line wins over it."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where every worker has a GPU of its own."""
    timeout: float = 600
    """Seconds that a worker waits for the others before it gives up."""
    on_nonfinite: OnNonFinite = "stop"
    """At NaN or infinity stop; or drop_worker, leave a worker's part of a merge out; or skip, leave a step out."""
    log_every: int = 20
    """Steps between two lines of metrics."""
    divergence: bool = False
    """Measure, at merges, how far workers have come apart, layer by layer: in metrics.jsonl."""
    track: tuple[str, ...] = ()
    """Where metrics go beside metrics.jsonl: tensorboard, wandb (offline with WANDB_MODE=offline), mlflow."""
    checkpoint_every: int = 0
    """Steps between two checkpoints; 0: one only where the run is stopped on request."""
    keep: int = 2
    """Checkpoints that are kept, the newest ones."""
    resume: bool = True
    """Go on with an unfinished run of the same settings that the folder holds."""
    max_restarts: int = 0
    """How often workers are started again where one of them died, to go on from the last checkpoint."""
    on_checkpoint_error: OnCheckpointError = "warn"
    """Where a checkpoint cannot be written: warn and go on with the older ones, or stop."""

    @property
    def recipe_name(self) -> str:
        """The recipe's name, without its options."""
        return self.recipe.partition(":")[0]


def recipe_of(config: TrainConfig) -> Recipe:
    """The recipe of a run whose number of steps is known.

    Raises:
        ConfigurationError: no such recipe, or options that cannot be.
    """
    assert config.steps is not None
    return recipes.from_text(config.recipe, config.steps)


NOT_OF_THE_METHOD = frozenset(
    {
        "workers",
        "data",
        "out",
        "overwrite",
        "config",
        "device",
        "timeout",
        "log_every",
        "loaders",
        "track",
        "divergence",
    }
    | {"checkpoint_every", "keep", "resume", "max_restarts", "on_checkpoint_error"}
)
"""Settings that may change when a run goes on: they do not say what is computed."""


def notices(config: TrainConfig) -> list[str]:
    """The settings of a valid configuration that are ignored, a line each."""
    from abtrain.commands.tasks.task import TASKS

    if config.data is None or TASKS[config.task].reads_folder:
        return []
    return [f"--data is ignored by task {config.task}"]


def resolve(config: TrainConfig) -> TrainConfig:
    """A valid configuration with the task's defaults filled in, the recipe's text in its canonical form, and `device`
    either cpu or cuda.

    Under a launcher workers find out together which of them share a machine: a group size that nobody gave stays open.
    """
    from abtrain.commands.tasks.task import TASKS

    task = TASKS[config.task]
    return dataclasses.replace(
        config,
        recipe=recipes.canonical(config.recipe),
        group_size=config.group_size if is_joined() else group_size_of(config),
        steps=task.steps if config.steps is None else config.steps,
        batch_size=task.batch_size if config.batch_size is None else config.batch_size,
        lr=task.lr if config.lr is None else config.lr,
        weight_decay=task.weight_decay if config.weight_decay is None else config.weight_decay,
        clip=task.clip if config.clip is None else config.clip,
        precision=config.precision or task.precision,
        init=config.init or task.init,
        device=choose_device(config),
        config=None,
    )


def group_size_of(config: TrainConfig) -> int:
    """The group size of a run that no launcher joins, where nobody gave one: each worker is a group."""
    return config.group_size or 1


def identity(config: TrainConfig) -> dict[str, Any]:
    """Everything in a resolved configuration that says what is computed, as JSON values.

    Raises:
        ConfigurationError: the recipe's text cannot be read.
    """
    held = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in NOT_OF_THE_METHOD}
    return held | {"recipe": recipes.canonical(config.recipe)}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings in which two runs differ, in words; `before` is there, and `now` is here."""
    return [
        f"{name} is {before.get(name)!r} there and {now.get(name)!r} here"
        for name in dict.fromkeys((*now, *before))
        if before.get(name) != now.get(name)
    ]


def choose_device(config: TrainConfig) -> str:
    """`cpu` or `cuda`; where that is left open, cuda if every worker on this machine has a GPU of its own."""
    if config.device != "auto":
        return config.device
    import torch

    return "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= local_workers(config) else "cpu"


def local_workers(config: TrainConfig) -> int:
    """Workers on this machine."""
    return local_size(config.workers)
