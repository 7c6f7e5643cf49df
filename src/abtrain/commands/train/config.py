"""The settings of a run and their defaults. What can be wrong with them: `config_problems.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from abtrain import recipes
from abtrain.commands.tasks.choices import Init, OnBadImage, OnCheckpointError, OnNonFinite, Precision
from abtrain.commands.train.world import is_joined, local_size

# torch takes seconds to import: what needs it is imported where it is used, so that `--help` answers at once.


@dataclass(frozen=True)
class TrainConfig:
    """Trains a task by a recipe, on workers of its own or on those of torchrun."""

    recipe: Annotated[Positional[str], arg(help=f"One of {', '.join(recipes.RECIPES)}.")] = recipes.DEFAULT
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
    sigma_cutoff: float | None = None
    """Singular values below this share of the largest are dropped; by default the recipe's."""
    rank_rule: str | None = None
    """In place of the cutoff: energy:SHARE, stable:FACTOR or fixed:K (see abtrain.recipes.rank_rules)."""
    warmup_steps: int | None = None
    """Full-rank steps at the start; by default the recipe's."""
    warmup_every: int | None = None
    """Steps between merges there; 0: gradients are averaged at every step; by default the recipe's."""
    warmup_wire: str | None = None
    """How merges are sent there; by default as elsewhere."""
    warmup_delay: int | None = None
    """Steps that a merge is hidden behind there; by default the recipe's."""
    ab_steps: int | None = None
    """Steps of a group phase; by default the recipe's."""
    refactor_every: int | None = None
    """Rounds after which weights are factored anew; by default the recipe's."""
    rebound_steps: int | None = None
    """Full-rank steps after each group phase; by default the recipe's."""
    rebound_every: int | None = None
    """Steps between merges there; 0: gradients are averaged at every step; by default the recipe's."""
    lr_rebound_steps: int | None = None
    """Steps in which the learning rate climbs back after a change of shapes; by default the recipe's."""
    every: int | None = None
    """Steps between merges; by default the recipe's."""
    delay: int | None = None
    """Steps that a merge is hidden behind, in the main phase; by default the recipe's."""
    fragments: int | None = None
    """Parts of the model that merge in turns; by default the recipe's."""
    trains: str | None = None
    """Factors that a group trains: a_or_b by its role, a_then_b in turns, all or b; by default the recipe's."""
    merge: str | None = None
    """Rule of merges: mean, trained_only or weighted; by default the recipe's."""
    temperature: float | None = None
    """Of weighted merges, in the units of the loss; by default the recipe's."""
    outer_lr: float | None = None
    """Learning rate of the outer optimizer; by default the recipe's."""
    outer_momentum: float | None = None
    """Momentum of the outer optimizer; by default the recipe's."""
    wire: str | None = None
    """Wire of merges: fp32, bf16, int8, int4, int3, ternary, CODE:REPLY, lowrank:R[:CODE], auto; of gradients for ddp:
    fp32, bf16; by default the recipe's."""
    rank: int | None = None
    """Rank of the factors that gradients are sent as; by default the recipe's."""
    damping: float | None = None
    """Damping of the factors' preconditioner; by default the recipe's."""
    factor_lr: float | None = None
    """Multiplies preconditioned steps of factors; by default the recipe's."""
    local_lr: float | None = None
    """Multiplies the learning rate where workers train alone; by default the recipe's."""
    svd: Literal["each", "shared"] | None = None
    """Each worker decomposes every weight, or they share the work; by default the recipe's."""
    optimizer_state: Literal["reset", "project", "auto"] | None = None
    """What becomes of the optimizer's state when shapes change; by default the recipe's."""
    keep_dense_if_larger: bool | None = None
    """Leave a weight dense where its factors would be no smaller; by default the recipe's."""
    min_dim: int | None = None
    """Leave a weight dense whose smaller matrix dimension is below this; by default the recipe's."""
    exclude: tuple[str, ...] = ()
    """Globs of parameter names that stay dense."""
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

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
RECIPE_OPTIONS = tuple(
    name for name in _DEFAULTS if any(name in recipes.options_of(recipe) for recipe in recipes.RECIPES)
)
"""Settings that belong to the recipe; left as they are here, they take the recipe's own default."""


def recipe_options(config: TrainConfig) -> dict[str, Any]:
    """The settings that are the recipe's, as far as they differ from their default."""
    given = {name: getattr(config, name) for name in RECIPE_OPTIONS}
    return {name: value for name, value in given.items() if value != _DEFAULTS[name]}


def used_options(config: TrainConfig) -> dict[str, Any]:
    """Of `recipe_options`, those that the recipe takes.

    Raises:
        ConfigurationError: no recipe is called so.
    """
    known = recipes.options_of(config.recipe)
    return {name: value for name, value in recipe_options(config).items() if name in known}


def notices(config: TrainConfig) -> list[str]:
    """What a valid configuration says in vain, a line each."""
    from abtrain.commands.tasks.task import TASKS

    unused = recipe_options(config).keys() - used_options(config).keys()
    found = [f"--{name.replace('_', '-')} plays no part in recipe {config.recipe}" for name in sorted(unused)]
    if config.data is not None and not TASKS[config.task].reads_folder:
        found.append(f"--data plays no part in task {config.task}")
    return found


def resolve(config: TrainConfig) -> TrainConfig:
    """A valid configuration with the task's defaults filled in, and `device` either cpu or cuda.

    Under a launcher workers find out together which of them share a machine: a group size that nobody gave stays open.
    """
    from abtrain.commands.tasks.task import TASKS

    task = TASKS[config.task]
    return dataclasses.replace(
        config,
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
    """Everything in a resolved configuration that says what is computed, as JSON values."""
    held = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in NOT_OF_THE_METHOD}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in held.items()}


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
