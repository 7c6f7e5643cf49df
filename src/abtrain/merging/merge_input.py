"""Defines what a worker brings to one merge."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from abtrain.consistency.agreement import Place
from abtrain.merging.store import Store
from abtrain.recipes.sync import WeightSync


@dataclass(frozen=True)
class MergeInput:
    """The input of one worker to one merge.

    Attributes:
        tensors: a function that returns the present tensors to merge, by the names passed to `Merger.begin`. The
            merge overwrites them in place at its end. They are equal on all workers of a group. Many tensors merge
            faster if each merge gets the same `Held`.
        sync: the settings of the merge, such as its rule and its wire format.
        trained_by: by tensor name, whether each worker trained the tensor. If a name is missing, all workers did.
        buffers: a function that returns the present buffers by name, as real tensors of any dtype. Buffers that
            are equal on all workers keep their values.
        averaged: the names of the buffers that are averaged if they differ. Other buffers take one worker's values.
        started: copies of this worker's pieces of the tensors, made when a hidden merge began; None if the merge is not
            hidden.
        started_buffers: copies of the buffers, made when a hidden merge began.
        loss: this worker's mean training loss since the last merge; None if it is unknown.
        step: the number of training steps done when the merge began.
        place: values by name, such as the step, that must be equal on all workers that merge.
        factors: the names of the tensors that are factors of a weight.
    """

    tensors: Callable[[], Mapping[str, Tensor]]
    sync: WeightSync
    trained_by: Mapping[str, Sequence[bool]]
    buffers: Callable[[], Mapping[str, Tensor]] = dict
    averaged: Collection[str] = ()
    started: Store | None = None
    started_buffers: Mapping[str, Tensor] = field(default_factory=dict)
    loss: float | None = None
    step: int = 0
    place: Place = field(default_factory=dict)
    factors: Collection[str] = ()
