"""Proof that all workers train alike: before they begin, and before they go on from saved states.

A recipe or an option that differs on one worker would hang the others at best. At worst it changes what is averaged,
and nobody learns of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from abtrain.comm.agreement import differing_fields, gather_json, values_by_rank
from abtrain.comm.checksums import fingerprint
from abtrain.comm.communicator import Communicator
from abtrain.errors import RanksDisagreeError
from abtrain.recipe import Recipe
from abtrain.resume import stable_repr

_MOST_TOLD = 5
_ABSENT = "absent"


def check_start(comm: Communicator, recipe: Recipe, **options: object) -> None:
    """Compares recipe, groups and options. Collective over the world; 24 bytes, until something differs.

    Args:
        comm: of this worker.
        recipe: as it was given.
        options: what else has to be alike, versions too.

    Raises:
        RanksDisagreeError: on all ranks, with what differs and where.
    """
    _compare(
        comm,
        {**options, "topology": comm.topology, "recipe": recipe},
        "workers were started with different software or settings",
        "Build ABTraining with the same recipe and the same options on every worker, under the same versions",
    )


def check_loaded(comm: Communicator, recipe: Recipe, state: Mapping[str, Any]) -> None:
    """Compares where workers go on. Collective over the world; 24 bytes, until something differs.

    Args:
        comm: of this worker.
        recipe: with the lengths that were decided before the state was saved.
        state: of this worker, from `ABTraining.state_dict`.

    Raises:
        RanksDisagreeError: on all ranks, if steps, phases, recipes or merges under way differ.
    """
    step = int(state["step"])
    place = {
        "step": step,
        "phase": recipe.at(step).phase.name if step < recipe.total_steps else "none, the recipe has ended",
        "recipe": recipe,
        "workers_equal": bool(state["workers_equal"]),
        "merges_since_step": [merge["step"] for merge in state["rounds"]["under_way"]],
    }
    _compare(
        comm,
        place,
        "workers load states that do not belong together",
        "Load on every worker what was saved at the same step of the same run",
    )


def _compare(comm: Communicator, values: Mapping[str, object], what: str, remedy: str) -> None:
    """Makes sure that all ranks hold the same values.

    Raises:
        RanksDisagreeError: they do not; `what` is wrong, the first differences, and the `remedy`.
    """
    held = {name: dict(_leaves(name, value)) for name, value in values.items()}
    differing = differing_fields(comm, **{name: fingerprint(*leaves.items()) for name, leaves in held.items()})
    if not differing:
        return
    # All ranks are here, since all have seen it.
    everyone = gather_json(comm, {place: text for name in differing for place, text in held[name].items()})
    told = _differences(everyone)
    more = f"; and {len(told) - _MOST_TOLD} more" if len(told) > _MOST_TOLD else ""
    raise RanksDisagreeError(f"{what}: {'; '.join(told[:_MOST_TOLD])}{more}. {remedy}")


def _leaves(place: str, value: object) -> Iterator[tuple[str, str]]:
    """A value as words, part by part, each with its place: dataclasses by their fields, tuples by their items."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield place, type(value).__name__
        for field in dataclasses.fields(value):
            yield from _leaves(f"{place}.{field.name}", getattr(value, field.name))
    elif isinstance(value, tuple | list):
        for i, item in enumerate(value):
            yield from _leaves(f"{place}[{i}]", item)
    else:
        yield place, stable_repr(value)


def _differences(everyone: list[dict[str, str]]) -> list[str]:
    """What differs and where. Of what is of another kind, or missing, the parts say nothing more."""
    found: dict[str, str] = {}
    for place in dict.fromkeys(place for held in everyone for place in held):
        values = [held.get(place, _ABSENT) for held in everyone]
        within = tuple(f"{outer}{mark}" for outer in found for mark in ".[")
        if len(set(values)) > 1 and not place.startswith(within):
            found[place] = values_by_rank(place, values)
    return list(found.values())
