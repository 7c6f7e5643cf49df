"""Defines the paper's experiments: the runs of each table and figure, at full and tiny scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from abtrain import recipes
from abtrain.commands.paper.published import AB, DDP, GPUS, NO_GROUPS, RESNET, VGG, VIT
from abtrain.commands.train.config import TrainConfig
from abtrain.recipes.paper import AB_SHARE, REBOUND_SHARE
from abtrain.recipes.shared import WARMUP_SHARE

LOCAL_SGD, AB_OUTER = "local SGD", "ab_outer"
METHODS = {
    DDP: "ddp",
    AB: "ab",
    NO_GROUPS: "ab_no_groups",
    LOCAL_SGD: "local_sgd",
    AB_OUTER: "ab_outer",
}
"""The recipe of each method: the paper's three methods, `ab_outer`, and an ablation: local SGD without factors."""
SMALL_CNN = "small CNN"
IMAGENET_SAMPLES = 1_281_167
CIFAR_SAMPLES = 50_000

ScaleName = Literal["tiny", "full"]
Scaling = Literal["local", "global"]


@dataclass(frozen=True)
class Model:
    """A model with its data and the length of its runs.

    Attributes:
        task: the name of the task in `abtrain train`.
        samples: the number of samples in an epoch.
        epochs: the number of epochs in a run.
        local_batch: the samples per worker and step in experiments with a constant local batch.
        global_batch: the samples of all workers per step in experiments with a constant global batch.
        exclude: the glob patterns of the parameters that are not factored.
    """

    task: str
    samples: int
    epochs: int
    local_batch: int
    global_batch: int
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scale:
    """The size of the experiments: their models, numbers of nodes and options.

    Attributes:
        name: the name of the scale.
        models: the models of Table II and of the figures, by label.
        table1: the models of Table I with their numbers of nodes, by label.
        local: the numbers of nodes in experiments with a constant local batch.
        global_: the numbers of nodes in experiments with a constant global batch.
        workers_per_node: the number of workers on a node. The workers of a node form one group.
        options: the options of each method's recipe, by method.
    """

    name: ScaleName
    models: Mapping[str, Model]
    table1: Mapping[str, tuple[Model, int]]
    local: tuple[int, ...]
    global_: tuple[int, ...]
    workers_per_node: int
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


_VIT = Model(
    "imagenet-vit-b16",
    IMAGENET_SAMPLES,
    150,
    256,
    4096,
    ("conv_proj.*", "heads.*", "class_token", "encoder.pos_embedding"),
)
_RESNET = Model("imagenet-resnet50", IMAGENET_SAMPLES, 150, 256, 4096, ("conv1.*", "fc.*"))
_VGG = Model("cifar10-vgg16", CIFAR_SAMPLES, 150, 64, 1024, ("features.0.*", "classifier.6.*"))
_CNN = Model("fashion-cnn", 60_000, 1, 32, 128)

_CUTOFF, _TINY_CUTOFF = 0.15, 0.3
SCALES: dict[str, Scale] = {
    "full": Scale(
        "full",
        MappingProxyType({VIT: _VIT, RESNET: _RESNET}),
        MappingProxyType({RESNET: (_RESNET, 4), VGG: (_VGG, 4)}),
        local=(2, 4, 8, 16, 32),
        global_=(4, 8, 16, 32),
        workers_per_node=GPUS,
        options={method: {"sigma_cutoff": _CUTOFF} for method in (AB, NO_GROUPS)},
    ),
    "tiny": Scale(
        "tiny",
        MappingProxyType({SMALL_CNN: _CNN}),
        MappingProxyType({SMALL_CNN: (_CNN, 4)}),
        local=(4, 8, 16),
        global_=(4, 8, 16),
        workers_per_node=1,
        # With svd=each, every simulated worker would decompose all weights on the same few cores.
        options={
            AB: {"sigma_cutoff": _TINY_CUTOFF, "svd": "shared"},
            NO_GROUPS: {"sigma_cutoff": _TINY_CUTOFF, "svd": "shared"},
            AB_OUTER: {"svd": "shared"},
        },
    ),
}
TABLES: dict[str, tuple[Scaling, ...]] = {"table1": (), "table2-local": ("local",), "table2-global": ("global",)}
FIGURES: dict[str, tuple[Scaling, ...]] = {
    "fig2": ("local",),
    "fig3": ("global",),
    "fig4": ("local", "global"),
    "fig5": ("global",),
}
"""The kinds of scaling (see `Cell`) that each figure shows. `TABLES` lists the same for each table."""
SCALING_TABLES: dict[Scaling, str] = {"local": "table2-local", "global": "table2-global"}
"""The table that has the runs of each kind of scaling."""


@dataclass(frozen=True)
class Cell:
    """The method and settings of one cell of a table.

    Attributes:
        scaling: the batch that stays constant as nodes are added: that of a worker (local) or of all workers (global).
        model: the label of the model.
        method: the name of the method.
        nodes: the number of nodes.
        config: the settings of the cell's runs, except for the seed.
        variant: a label that distinguishes runs with different options. It is empty for the runs of tables.
    """

    scaling: Scaling
    model: str
    method: str
    nodes: int
    config: TrainConfig
    variant: str = ""

    @property
    def global_batch(self) -> int:
        """The number of samples of all workers in a step."""
        assert self.config.batch_size is not None
        return self.config.batch_size * self.config.workers

    def __str__(self) -> str:
        return f"{self.model}, {self.method}, {self.nodes} nodes, global batch {self.global_batch:,}"


def cells(experiment: str, scale: Scale, nodes: Sequence[int] = (), methods: Sequence[str] = ()) -> list[Cell]:
    """Returns the cells of a table or figure. Those with the same scaling are in the order of the numbers of nodes.

    Args:
        experiment: a key of TABLES or FIGURES.
        scale: the scale of the experiment.
        nodes: the numbers of nodes that replace those of the scale. Table I always has the numbers of the scale.
        methods: the methods to include, some of METHODS; by default all.
    """
    chosen = [method for method in METHODS if not methods or method in methods]
    if experiment == "table1":
        return [
            _cell(scale, "global", label, model, method, count)
            for label, (model, count) in scale.table1.items()
            for method in chosen
        ]
    own = {"local": scale.local, "global": scale.global_}
    return [
        _cell(scale, scaling, label, model, method, count)
        for scaling in (TABLES | FIGURES)[experiment]
        for count in (nodes or own[scaling])
        for label, model in scale.models.items()
        for method in chosen
    ]


def _cell(scale: Scale, scaling: Scaling, label: str, model: Model, method: str, nodes: int) -> Cell:
    workers = nodes * scale.workers_per_node
    batch = model.local_batch if scaling == "local" else max(model.global_batch // workers, 1)
    steps = model.epochs * (model.samples // (batch * workers))
    options = dict(scale.options.get(method, {}))
    if method in (AB, NO_GROUPS, AB_OUTER):
        options["exclude"] = model.exclude
    options |= _schedule(scale, method, steps)
    config = TrainConfig(
        recipe=recipes.write(METHODS[method], options),
        task=model.task,
        workers=workers,
        group_size=scale.workers_per_node,
        steps=steps,
        batch_size=batch,
    )
    return Cell(scaling, label, method, nodes, config)


def _schedule(scale: Scale, method: str, steps: int) -> dict[str, int]:
    """Returns the options with which a recipe follows the schedule of the paper's guideline (Section IV.C).

    There are none if the defaults of the recipe already follow the guideline.
    """
    group = max(1, round(AB_SHARE * steps))
    if method == LOCAL_SGD:
        warmup, rebound = round(WARMUP_SHARE * steps), max(1, round(REBOUND_SHARE * group))
        return {"every": group, "warmup_steps": warmup, "rebound_steps": rebound}
    # A run at tiny scale has the same number of merges as a run of the paper, whatever its length.
    return {"every": group} if method == AB_OUTER and scale.name == "tiny" else {}
