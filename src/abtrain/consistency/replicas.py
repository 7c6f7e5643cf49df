"""Checks that replicas hold the same weights: after every phase, inside groups before every merge, and in saved states.

Workers that average gradients apply equal changes to weights that they assume to be equal; without a check, nobody
would notice that one of them has drifted. Differences that processors cause by rounding are removed.

The tensors of a saved state that are equal on all workers are marked, and checked at saving and at loading. Otherwise a
worker whose weights have drifted would save a checkpoint that cannot be loaded, and good ones would be removed.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from abtrain.comm.checksums import checksum, fingerprint, layouts_of
from abtrain.comm.communicator import Communicator, Scope
from abtrain.comm.topology import Topology
from abtrain.consistency.agreement import differences, disagreeing, gather_json
from abtrain.errors import RanksDisagreeError

log = logging.getLogger("abtrain")

# The largest difference that counts as rounding, relative to the largest number of the tensor; for dtypes that round
# more coarsely, in units of the last place.
_ROUNDING, _ULPS = 1e-5, 4

_SCOPE_OF = "_same_on"
"""In a tree, `NAME_same_on: SCOPE` beside `NAME` means that all workers of the scope hold the same tensors there."""

Marks = list[list[str]]
"""The marked entries of one worker's state: place, scope, and fingerprint of the tensors."""


def check_replicas(
    comm: Communicator,
    tensors: Mapping[str, Tensor],
    scope: Scope,
    where: str,
    buffers: Mapping[str, Tensor] | None = None,
) -> None:
    """Checks that tensors are equal on the ranks of a scope. Collective over it; 16 bytes unless something differs.

    `tensors` have the same shapes on all ranks. Tensors that differ only by rounding are replaced by the first rank's,
    in place. `buffers` are compared by name, shape and dtype, only if the scope is `world`. Messages say `where` it
    happened, such as `step 120, phase warmup`.

    Raises:
        RanksDisagreeError: a rank has drifted; the message names it. All ranks of the scope raise the error.
    """
    ranks = comm.ranks(scope)
    if len(ranks) == 1:
        return
    tensors = {name: torch.view_as_real(t.detach()) if t.is_complex() else t for name, t in tensors.items()}
    sums = [checksum(tensor) for tensor in tensors.values()]
    layouts = layouts_of(buffers or {})
    mine = fingerprint(*sums, *layouts.items())
    if not disagreeing(comm, [mine], scope):
        return
    if layouts and (different := differences(gather_json(comm, layouts))):
        raise RanksDisagreeError(
            f"{where}: workers hold buffers of different shapes: {different}. Change buffers on all workers at the "
            "same step"
        )
    rows = comm.all_gather(torch.tensor([mine, *sums], dtype=torch.int64, device=comm.device), scope).tolist()
    digests, *columns = zip(*rows, strict=True)
    relative = 0.0
    for (name, tensor), column in zip(tensors.items(), columns, strict=True):
        if len(set(column)) > 1:
            relative = max(relative, _equalize(comm, name, tensor, scope, f"{_odd(digests, ranks)}: {where}"))
    if comm.rank == ranks[0]:
        log.info("%s: weights differed by rounding (%.1e); all workers now have rank %d's", where, relative, ranks[0])


def _equalize(comm: Communicator, name: str, tensor: Tensor, scope: Scope, what: str) -> float:
    """Takes the first rank's tensor if ranks differ only by rounding, and returns the largest relative difference."""
    held = comm.all_gather(tensor.detach().contiguous().to(comm.device), scope)
    wide = held.double().view(len(held), -1)
    distance, size = (wide - wide[0]).abs().max().item(), wide.abs().max().item()
    # Whole numbers are not rounded.
    rounding = max(_ROUNDING, _ULPS * torch.finfo(tensor.dtype).eps) if tensor.is_floating_point() else 0.0
    # 0 and -0 have distance 0, whatever `size` is. Rounding does not cause NaN or infinity.
    if not math.isfinite(distance) or distance > rounding * size:
        raise RanksDisagreeError(
            f"{what}. The weights must be equal on all workers, but {name} differs by up to {distance:.1e}. Find out "
            "what changes weights on only one worker (a hook, faulty memory, a different optimizer or learning rate), "
            "then resume from the last checkpoint"
        )
    tensor.copy_(held[0])
    return distance / max(size, torch.finfo(torch.float64).tiny)


def _odd(digests: Sequence[int], ranks: Sequence[int]) -> str:
    """Says which ranks have drifted: those that differ from the majority or, without one, from the first rank."""
    common, count = Counter(digests).most_common(1)[0]
    kept = common if 2 * count > len(digests) else digests[0]
    odd = [rank for rank, value in zip(ranks, digests, strict=True) if value != kept]
    rest = [rank for rank in ranks if rank not in odd]
    return f"rank {', '.join(map(str, odd))} holds other weights than rank {', '.join(map(str, rest))}"


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
        try:
            check_replicas(comm, {name: t for name, t in tensors.items() if isinstance(t, Tensor)}, scope, where)
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
