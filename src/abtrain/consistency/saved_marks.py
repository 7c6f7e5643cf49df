"""Tensors that workers hold the same, proven when they are saved and when they are loaded.

A worker whose weights have drifted apart unseen would otherwise leave a checkpoint that nobody can load, and good ones
would be removed for it.
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
"""In a tree, `NAME_same_on: SCOPE` beside `NAME` says that all workers of a scope hold the same tensors there."""

Marks = list[list[str]]
"""Of one worker's state: place, scope and fingerprint of everything that has to be the same."""


def marked(name: str, tensors: Mapping[str, Tensor], scope: str | None) -> dict[str, Any]:
    """Tensors by name as an entry `name` of a tree, marked as the same on all workers of a scope; None: of no scope."""
    return {name: tensors} if scope is None else {name: tensors, f"{name}{_SCOPE_OF}": scope}


def same_in(tree: Any, place: str = "") -> Iterator[tuple[str, Scope, Any]]:
    """Place, scope and content of everything in a tree that is marked."""
    if not isinstance(tree, Mapping):
        return
    for key, item in tree.items():
        name = key.removesuffix(_SCOPE_OF) if isinstance(key, str) else key
        if name != key and item in get_args(Scope) and isinstance(tree.get(name), Mapping):
            yield f"{place}/{name}", item, tree[name]
        yield from same_in(item, f"{place}/{key}")


def check_same(tree: Any, comm: Communicator, where: str) -> None:
    """Compares all that is marked. Differences that rounding makes are levelled, in place. Collective over the world.

    Args:
        tree: of this worker; on all workers with the same places and scopes.
        comm: of this worker.
        where: for the message.

    Raises:
        RanksDisagreeError: a worker has drifted apart; on all workers.
    """
    problem = ""
    for _, scope, tensors in same_in(tree):
        held = {name: t for name, t in tensors.items() if isinstance(t, Tensor)}
        real = {name: torch.view_as_real(t) if t.is_complex() else t for name, t in held.items()}
        try:
            check_replicas(comm, real, scope, where)
        except RanksDisagreeError as error:
            problem = problem or str(error)
    for told in gather_json(comm, problem):
        if told:
            raise RanksDisagreeError(told)


def marks(structure: Any) -> Marks:
    """Returns the marks in a structure of references: equal references are equal tensors."""
    return [[place.strip("/"), scope, str(fingerprint(refs))] for place, scope, refs in same_in(structure)]


def drifted(answers: Sequence[Sequence[Marks]], topology: Topology) -> str:
    """Describes a state that workers saved differently although it should be the same; empty if there is none.

    Args:
        answers: for each worker, the marks of the states that it has read: its own, or those of all former workers.
        topology: of the workers now.
    """
    found: dict[tuple[str, str], set[str]] = {}
    for rank, states in enumerate(answers):
        for place, scope, print_ in (row for state in states for row in state):
            # Where others have saved than those who load, nobody knows who belonged to a group.
            if scope == "group" and len(states) > 1:
                continue
            group = str(topology.group_of(rank)) if scope == "group" else "world"
            found.setdefault((place, group), set()).add(print_)
    odd = sorted(place for (place, _), prints in found.items() if len(prints) > 1)
    return f"workers had drifted apart in {odd[0]} when they saved it" if odd else ""
