"""Checks that workers have the same weights: after every phase, within groups before every merge, and in saved states.

Workers that average gradients apply equal changes to weights that should be equal. Without a check, a worker whose
weights have drifted from the others' would go unnoticed. Differences due to rounding are removed.

A saved state marks the tensors that must be equal on all workers. They are checked when they are saved and loaded.
Otherwise, drifted weights would be saved in checkpoints that cannot be loaded, and older, good ones would be removed.
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

# The largest difference that counts as rounding, relative to the tensor's largest element; for coarser dtypes, the
# number of units in the last place.
_ROUNDING, _ULPS = 1e-5, 4

_SCOPE_OF = "_same_on"
"""In a state, the entry `NAME_same_on: SCOPE` marks the tensors under `NAME` as equal on all workers of the scope."""

Marks = list[list[str]]
"""The marked entries in one worker's state: for each, the place, the scope, and a hash of the tensors."""


def check_replicas(
    comm: Communicator,
    tensors: Mapping[str, Tensor],
    scope: Scope,
    where: str,
    buffers: Mapping[str, Tensor] | None = None,
    total: int | None = None,
) -> None:
    """Checks that tensors are equal on the ranks of a scope. Collective over it. Sends 16 bytes if nothing differs.

    `tensors` have the same shapes on all ranks. Tensors that differ only by rounding are replaced by the first rank's,
    in place. The names, shapes and dtypes of `buffers` are compared too; they can only be passed for the scope `world`.
    Messages contain `where`, such as `step 120, phase warmup`. `total` is a hash of all tensors, if it is known.

    Raises:
        RanksDisagreeError: tensors differ by more than rounding, or buffers differ. All ranks of the scope raise it.
    """
    ranks = comm.ranks(scope)
    if len(ranks) == 1:
        return
    tensors = {name: torch.view_as_real(t.detach()) if t.is_complex() else t for name, t in tensors.items()}
    layouts = layouts_of(buffers or {})
    if total is None:
        total = fingerprint(*map(checksum, tensors.values()))
    mine = fingerprint(total, *layouts.items())
    if not disagreeing(comm, [mine], scope):
        return
    if layouts and (different := differences(gather_json(comm, layouts))):
        raise RanksDisagreeError(
            f"{where}: workers have different buffers: {different}. Change buffers on all workers at the same step"
        )
    sums = [checksum(tensor) for tensor in tensors.values()]
    rows = comm.all_gather(torch.tensor([mine, *sums], dtype=torch.int64, device=comm.device), scope).tolist()
    digests, *columns = zip(*rows, strict=True)
    relative = 0.0
    for (name, tensor), column in zip(tensors.items(), columns, strict=True):
        if len(set(column)) > 1:
            relative = max(relative, _equalize(comm, name, tensor, scope, f"{_odd(digests, ranks)}: {where}"))
    if comm.rank == ranks[0]:
        log.info("%s: weights differed by rounding (%.1e): workers copied those of rank %d", where, relative, ranks[0])


def _equalize(comm: Communicator, name: str, tensor: Tensor, scope: Scope, what: str) -> float:
    """Copies the first rank's tensor if ranks differ only by rounding, and returns the largest relative difference."""
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
    """Describes which ranks have drifted: those that differ from the majority, or if there is none, from the first."""
    common, count = Counter(digests).most_common(1)[0]
    kept = common if 2 * count > len(digests) else digests[0]
    odd = [rank for rank, value in zip(ranks, digests, strict=True) if value != kept]
    rest = [rank for rank in ranks if rank not in odd]
    return f"rank {', '.join(map(str, odd))} has different weights from rank {', '.join(map(str, rest))}"


def marked(name: str, tensors: Mapping[str, Tensor], scope: Scope | None) -> dict[str, Any]:
    """Returns {name: tensors}, with a mark that they are equal on all workers of `scope`; no mark if it is None."""
    return {name: tensors} if scope is None else {name: tensors, f"{name}{_SCOPE_OF}": scope}


def same_in(tree: Any, place: str = "") -> Iterator[tuple[str, Scope, Any]]:
    """Yields place (keys joined by `/`), scope and content of every entry of a state that `marked` has made."""
    if not isinstance(tree, Mapping):
        return
    for key, item in tree.items():
        name = key.removesuffix(_SCOPE_OF) if isinstance(key, str) else key
        if name != key and item in get_args(Scope) and isinstance(tree.get(name), Mapping):
            yield f"{place}/{name}", item, tree[name]
        yield from same_in(item, f"{place}/{key}")


def check_same(tree: Any, comm: Communicator, where: str) -> None:
    """Checks that the marked tensors in a state are equal on the workers of their scopes. Collective over the world.

    Differences due to rounding are removed, in place. Larger ones raise a RanksDisagreeError on all workers.
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
    """Returns the marked entries in a state with references instead of tensors. Equal tensors have equal references."""
    return [[place.strip("/"), scope, str(fingerprint(refs))] for place, scope, refs in same_in(structure)]


def drifted(answers: Sequence[Sequence[Marks]], topology: Topology) -> str:
    """Describes an entry that is marked as equal but differs between saved states; empty if there is none.

    `answers` has for each worker the marks in the states that it has read: its own, or all saved ones.
    """
    found: dict[tuple[str, str], set[str]] = {}
    for rank, states in enumerate(answers):
        for place, scope, digest in (row for state in states for row in state):
            # If the number of workers has changed, the groups of the saved run are unknown.
            if scope != "world" and len(states) > 1:
                continue
            among = {"group": f"group {topology.group_of(rank)}", "counterparts": f"place {topology.place_of(rank)}"}
            group = among.get(scope, "world")
            found.setdefault((place, group), set()).add(digest)
    odd = sorted(place for (place, _), digests in found.items() if len(digests) > 1)
    return f"workers saved different tensors in {odd[0]}, which must be equal" if odd else ""
