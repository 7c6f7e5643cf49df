"""Defines the settings of a run and their defaults. `config_problems.py` validates them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from abtrain import recipes
from abtrain.commands.command_line import Shown
from abtrain.commands.tasks.choices import Init, OnBadImage, OnCheckpointError, OptimizerName, Precision
from abtrain.commands.train.world import is_joined, local_size
from abtrain.errors import OnNonFinite
from abtrain.recipes import automatic
from abtrain.recipes.recipe import Recipe

# torch takes seconds to import. Functions that need it import it, so that `--help` answers immediately.


@dataclass(frozen=True)
class TrainConfig:
    """Train a task with a recipe, on workers started here or by torchrun."""

    recipe: Annotated[
        str,
        Shown(
            help=f"RECIPE or RECIPE:OPTION=VALUE,OPTION=VALUE, such as ab_outer:every=40,wire=int4. Recipes are "
            f"{', '.join(recipes.RECIPES)}; `abtrain recipes RECIPE` lists the options of a recipe",
            positional=True,
        ),
    ] = recipes.DEFAULT

    workers: Annotated[int, Shown(group="run")] = 4
    """Workers (processes) to start on this machine; ignored under torchrun, which starts its own."""
    group_size: int | None = None
    """Workers per group. A group averages gradients at every step. Default: the workers of a machine, or 1 if there is
    only one machine."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda if every worker has its own GPU."""
    config: Path | None = None
    """TOML file with any of these settings; the command line takes precedence."""
    timeout: float = 600
    """Seconds for which a worker waits for the others before it fails."""
    on_nonfinite: OnNonFinite = "stop"
    """On NaN or infinity: stop, leave the worker out of the merge (drop_worker), or skip the step."""
    max_restarts: int = 0
    """How many times to restart the workers after one of them dies; they resume from the last checkpoint."""

    task: Annotated[str, Shown(group="data")] = "digits-mlp"
    """digits-mlp, fashion-cnn, fashion-vit, pysrc-gpt, random-gpt2 (124 M parameters; its tokens are random, so it only
    measures time, bytes and memory), or a task of the paper: imagenet-vit-b16, imagenet-resnet50,
    cifar10-vgg16, cifar100-mini-vit."""
    data: Path | None = None
    """Folder with the task's data; by default the task's usual place."""
    loaders: int = 4
    """Processes that read images for each worker, if data is not in memory; 0: the worker itself reads."""
    on_bad_image: OnBadImage = "stop"
    """If an image cannot be read: stop, or log it and use the next image (skip)."""

    steps: Annotated[int | None, Shown(group="method (by default as the task sets it)")] = None
    """Number of optimizer steps."""
    batch_size: int | None = None
    """Number of samples per worker and step."""
    lr: float | None = None
    """Peak learning rate, reached after a warm-up of 5 % of the steps (7 % in the paper's tasks) and followed by a
    cosine to zero."""
    optimizer: OptimizerName = "adamw"
    """adamw, or muon: Muon for the matrices between embedding and head, AdamW for the rest, both at the same rate."""
    weight_decay: float | None = None
    """Decoupled weight decay, on matrices only."""
    clip: float | None = None
    """Maximum of the global gradient norm; 0 for no limit."""
    precision: Precision | None = None
    """Precision of forward and backward passes: fp32, or bf16 by autocast."""
    init: Init | None = None
    """Initial weights: PyTorch's own (default) or orthogonal matrices."""
    seed: int = 0
    """Seed of the initial weights, the order of the samples, and their augmentation."""

    log_every: Annotated[int, Shown(group="metrics")] = 20
    """Steps between two lines of metrics."""
    validate_every: int = 0
    """Steps between two validations of the average of all workers; the best model is saved. 0: only at the end."""
    divergence: bool = False
    """At merges, record in metrics.jsonl how far the workers have diverged, layer by layer."""
    track: tuple[str, ...] = ()
    """Trackers to send metrics to: tensorboard, wandb (offline with WANDB_MODE=offline), mlflow."""

    out: Annotated[Path | None, Shown(group="saving")] = None
    """Run folder; by default runs/TASK-RECIPE-seedSEED-TIME."""
    overwrite: bool = False
    """Replace the run in the folder."""
    resume: bool = True
    """Resume an unfinished run with the same settings in the folder."""
    checkpoint_every: int = 0
    """Steps between two checkpoints; 0: a checkpoint only when the run is stopped on request."""
    keep: int = 2
    """Number of newest checkpoints to keep."""
    on_checkpoint_error: OnCheckpointError = "warn"
    """If a checkpoint cannot be written: warn and continue with the older ones, or stop."""

    @property
    def recipe_name(self) -> str:
        """The recipe's name, without its options."""
        return self.recipe.partition(":")[0]


def recipe_of(config: TrainConfig) -> Recipe:
    """Builds the recipe that the settings name. The number of steps must be set.

    Raises:
        ConfigurationError: the recipe is unknown, or its options are invalid.
    """
    assert config.steps is not None
    return recipes.from_text(config.recipe, config.steps)


_CHANGES_NO_RESULT = ("outer_device",)
"""The options of recipes that may change on resume."""
_CHOSEN = ("every", "wire", "delay")
"""The options of `auto` that it chooses during the run."""
MAY_CHANGE_ON_RESUME = frozenset(
    {"workers", "device", "timeout", "loaders", "data", "config", "out", "overwrite"}
    | {"log_every", "validate_every", "divergence", "track"}
    | {"checkpoint_every", "keep", "resume", "max_restarts", "on_checkpoint_error"}
)
"""Settings that may change when a run is resumed.

They do not affect what is computed, except for `workers`: a run can continue with another number of workers.
"""


def notices(config: TrainConfig) -> list[str]:
    """Returns a message for `--data` if it is set but has no effect, and one for `--max-restarts` likewise."""
    from abtrain.commands.tasks.task import TASKS

    found = []
    if config.data is not None and not TASKS[config.task].reads_folder:
        found.append(f"--data is ignored by task {config.task}")
    if config.max_restarts and is_joined():
        found.append("--max-restarts is ignored under torchrun: use torchrun's own option of this name")
    elif config.max_restarts and config.workers == 1:
        found.append("--max-restarts is ignored with one worker, which trains in this process")
    return found


def resolve(config: TrainConfig) -> TrainConfig:
    """Returns the settings with the task's defaults, the recipe in canonical form, and the device (cpu or cuda).

    Under a launcher, a group size that is not set stays None: workers find out later which of them share a machine.

    Args:
        config: the settings, already validated.
    """
    from abtrain.commands.tasks.task import TASKS

    task = TASKS[config.task]
    return dataclasses.replace(
        config,
        recipe=_canonical(config.recipe),
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
    """Returns the number of workers per group. Without a setting it is 1: each worker forms its own group."""
    return config.group_size or 1


def identity(config: TrainConfig) -> dict[str, Any]:
    """Returns the settings that determine what is computed, as JSON values. The configuration must be resolved.

    Raises:
        ConfigurationError: the recipe cannot be parsed.
    """
    held = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in MAY_CHANGE_ON_RESUME}
    # The choice of `auto` follows from the run. The engine checks that a state belongs to its recipe.
    left_out = _CHOSEN if config.recipe_name == "auto" else ()
    return held | {"recipe": _canonical(config.recipe, (*_CHANGES_NO_RESULT, *left_out))}


def completed(config: TrainConfig, recipe: Recipe) -> TrainConfig:
    """Returns the settings with what a recipe of `auto` has chosen by now; other settings are unchanged."""
    name, options = recipes.parse(config.recipe)
    if name != "auto":
        return config
    return dataclasses.replace(config, recipe=_canonical(recipes.write(name, options | automatic.chosen(recipe))))


def _canonical(text: str, without: Collection[str] = ()) -> str:
    """Returns a recipe's string in a unique form, with options in the order of the recipe's signature."""
    name, options = recipes.parse(text)
    kept = [option for option in recipes.options_of(name) if option in options and option not in without]
    return recipes.write(name, {option: options[option] for option in kept})


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns a message for each setting whose value in a recorded run (`before`) differs from this run's (`now`)."""
    return [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r} now"
        for name in dict.fromkeys((*now, *before))
        if before.get(name) != now.get(name)
    ]


def choose_device(config: TrainConfig) -> str:
    """Returns the device, `cpu` or `cuda`. `auto` means cuda if every worker on this machine can have its own GPU."""
    if config.device != "auto":
        return config.device
    import torch

    return "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= local_workers(config) else "cpu"


def local_workers(config: TrainConfig) -> int:
    """Returns the number of workers on this machine."""
    return local_size(config.workers)
