"""Marks the tensors of a saved state that are equal on all workers, and checks them at saving and at loading.

Without the checks, a worker whose weights have drifted would save a checkpoint that cannot be loaded, and save would
remove good ones in its favor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from abtrain.comm.checksums import fingerprint
from abtrain.comm.communicator import Communicator, Scope
from abtrain.comm.topology import Topology
from abtrain.consistency.agreement import gather_json
from abtrain.consistency.replicas import check_replicas
from abtrain.errors import RanksDisagreeError

_SCOPE_OF = "_same_on"
"""In a tree, `NAME_same_on: SCOPE` beside `NAME` means that all workers of the scope hold the same tensors there."""

Marks = list[list[str]]
"""The marks in one worker's state: place, scope, and fingerprint of the tensors."""


def marked(name: str, tensors: Mapping[str, Tensor], scope: Scope | None) -> dict[str, Any]:
    """Returns the entry `name` of a tree, marked as equal on all workers of a scope (None: not marked)."""
    return {name: tensors} if scope is None else {name: tensors, f"{name}{_SCOPE_OF}": scope}


def same_in(tree: Any, place: str = "") -> Iterator[tuple[str, Scope, Any]]:
    """Yields the place, scope and content of every marked entry of a tree."""
    if not isinstance(tree, Mapping):
        return
    for key, item in tree.items():
        name = key.removesuffix(_SCOPE_OF) if isinstance(key, str) else key
        if name != key and item in get_args(Scope) and isinstance(tree.get(name), Mapping):
            yield f"{place}/{name}", item, tree[name]
        yield from same_in(item, f"{place}/{key}")


def check_same(tree: Any, comm: Communicator, where: str) -> None:
    """Compares the marked tensors of a tree; all workers have the same marks. Collective over the world.

    Rounding differences are removed, in place. If a worker has drifted, all raise a RanksDisagreeError.
    """
    problem = ""
    for _, scope, tensors in same_in(tree):
        held = {name: t for name, t in tensors.items() if isinstance(t, Tensor)}
        real = {name: torch.view_as_real(t) if t.is_complex() else t for name, t in held.items()}
        try:
            check_replicas(comm, real, scope, where)
        except RanksDisagreeError as error:
            problem = problem or str(error)
    for found in filter(None, gather_json(comm, problem)):
        raise RanksDisagreeError(found)


def marks(structure: Any) -> Marks:
    """Returns the marks in a structure of references to tensors: equal references are equal tensors."""
    return [[place.strip("/"), scope, str(fingerprint(refs))] for place, scope, refs in same_in(structure)]


def drifted(answers: Sequence[Sequence[Marks]], topology: Topology) -> str:
    """Describes a part of a state that was marked as equal but saved differently; empty if there is none.

    `answers` has, for each present worker, the marks of the states that it has read: its own, or those of all former
    workers.
    """
    found: dict[tuple[str, str], set[str]] = {}
    for rank, states in enumerate(answers):
        for place, scope, digest in (row for state in states for row in state):
            # If the number of workers has changed, their former groups are unknown.
            if scope == "group" and len(states) > 1:
                continue
            group = str(topology.group_of(rank)) if scope == "group" else "world"
            found.setdefault((place, group), set()).add(digest)
    odd = sorted(place for (place, _), digests in found.items() if len(digests) > 1)
    return f"workers had drifted apart in {odd[0]} when they saved it" if odd else ""
