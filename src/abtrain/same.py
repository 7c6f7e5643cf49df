"""Tensors that workers hold the same, proven when they are saved and when they are loaded.

A worker whose weights have drifted apart unseen would otherwise leave a checkpoint that nobody can load, and good ones
would be removed for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from abtrain.comm.agreement import gather_json
from abtrain.comm.checksums import fingerprint
from abtrain.comm.communicator import Communicator
from abtrain.comm.topology import Topology
from abtrain.errors import RanksDisagreeError
from abtrain.replicas import check_replicas

SAME = "$same"
"""In a structure, marks what has to be the same on all workers, and names the scope."""

Marks = list[list[str]]
"""Of one worker's state: place, scope and fingerprint of everything that has to be the same."""


class Same(dict[str, Tensor]):
    """Tensors by name that all workers of a scope hold the same.

    Args:
        tensors: by name.
        scope: `world`, or `group`.
    """

    def __init__(self, tensors: Mapping[str, Tensor], scope: str) -> None:
        super().__init__(tensors)
        self.scope = scope


def same_in(tree: Any, place: str = "") -> Iterator[tuple[str, Same]]:
    """All `Same` of a tree, each with its place."""
    if isinstance(tree, Same):
        yield place, tree
    elif isinstance(tree, Mapping):
        for key, item in tree.items():
            yield from same_in(item, f"{place}/{key}")


def check_same(tree: Any, comm: Communicator, where: str) -> None:
    """Compares all `Same` of a tree. Differences that rounding makes are levelled, in place. Collective over the world.

    Args:
        tree: of this worker; on all workers with the same places and scopes.
        comm: of this worker.
        where: for the message.

    Raises:
        RanksDisagreeError: a worker has drifted apart; on all workers.
    """
    problem = ""
    for _, same in same_in(tree):
        real = {name: torch.view_as_real(t) if t.is_complex() else t for name, t in same.items()}
        try:
            check_replicas(comm, real, "group" if same.scope == "group" else "world", where)
        except RanksDisagreeError as error:
            problem = problem or str(error)
    for told in gather_json(comm, problem):
        if told:
            raise RanksDisagreeError(told)


def marks(structure: Any, place: str = "") -> Marks:
    """What has to be the same, as a structure of references tells it: equal references are equal tensors."""
    if not isinstance(structure, dict):
        return []
    found = [row for key, item in structure.items() for row in marks(item, f"{place}/{key}")]
    if SAME in structure:
        found.append([place, str(structure[SAME]), str(fingerprint(structure.get("tensors")))])
    return found


def drifted(answers: Sequence[Sequence[Marks]], topology: Topology) -> str:
    """What workers saved unlike that ought to be the same; empty if nothing is.

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
    return f"workers had drifted apart in {odd[0].strip('/')} when they saved it" if odd else ""
