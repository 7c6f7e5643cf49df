"""Converts the saved states of merges to another number of workers, or to groups of another size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from abtrain.merging.changes import as_parameter
from abtrain.shards import cut, whole

_OF_PIECES = ("anchors", "momentum", "residuals")


def pooled(states: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns each worker's `Merger.state_dict` with whole tensors, and residuals averaged over all groups.

    Merges depend only on this average. It stays the same if another number of workers start with these residuals.
    """
    size = int(states[0]["places"])
    groups = [states[first : first + size] for first in range(0, len(states), size)]
    joined = [_joined(group) for group in groups for _ in group]
    residuals = [state["residuals"] for state in joined[::size]]
    shared = {name: torch.stack([held[name] for held in residuals]).mean(0) for name in residuals[0]}
    return [{**state, "residuals": shared} for state in joined]


def _joined(group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the state of a worker that merges whole tensors, from those of a group's workers, in rank order."""
    if len(group) == 1:
        return dict(group[0])
    stores = {key: {name: whole([state[key][name] for state in group]) for name in group[0][key]} for key in _OF_PIECES}
    return {**group[0], **stores, "places": 1}


def placed(state: Mapping[str, Any], place: int, count: int) -> dict[str, Any]:
    """Returns the state of a worker at one of `count` places of a group, from a state of whole tensors."""
    if count == 1:
        return dict(state)
    return {**state, **{key: cut(state[key], place, count) for key in _OF_PIECES}, "places": count}


def rewound_weights(state: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns weights as they were at the start of the round, from a `Merger.state_dict` and the present weights."""
    anchors = state["anchors"]
    return {name: as_parameter(anchors[name], held) if name in anchors else held for name, held in weights.items()}
