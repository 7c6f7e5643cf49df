"""Compares values and tensors between workers, makes tensors equal, and exchanges small values and errors as JSON.

If nothing differs, each worker sends 24 bytes to compare any number of values, and 16 to compare the hash of a tensor.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from abtrain.comm.buckets import pack, unpack
from abtrain.comm.checksums import BITS, LIMIT, checksum, fingerprint, layouts_of, stable_repr
from abtrain.comm.communicator import Calls, Communicator, Scope, Traffic
from abtrain.comm.stages import Stages, finish
from abtrain.errors import CheckpointError, RanksDisagreeError

Place = Mapping[str, object]
"""Values, by name, that must be equal on all ranks: numbers, strings, dataclasses, dicts, lists, tuples, `Hashed`."""
Told = tuple[int, float]
"""The two numbers that each rank sends to all others in `roll_call`: one as int64, one as float64."""

_MOST_LISTED = 5
_ABSENT = "absent"
_READABLE_DIGITS = 9  # longer whole numbers are hashes, whose digits mean nothing to a reader
_DISAGREE = "workers disagree"
_REMEDY = (
    "Give every worker the same model, recipe and optimizer settings (unless same_settings=False), and call ab.step() "
    "once for each optimizer step, on every worker the same number of times"
)
CALL = "call"
"""The name in a `Place` of the user's call that compares it, for messages to workers that make different calls."""
_TOGETHER = (
    "All workers must make the same calls at the same step. ab.step(), entering ab.merged(), checkpoint.save(), "
    "checkpoint.latest() and ab.load_state_dict() are calls for all workers: do not put them under `if rank == 0:`. "
    "ab.save() and ab.state_dict() send nothing, and one worker may call them alone"
)


def largest(
    comm: Communicator, values: Sequence[float], dtype: torch.dtype = torch.float64, scope: Scope = "world"
) -> list[Any]:
    """Returns, for each index, the largest value on any rank of the scope. All ranks pass the same number of values."""
    numbers = torch.tensor(values, dtype=dtype, device=comm.device)
    comm.all_reduce(numbers, "max", scope)
    return numbers.tolist()


def disagreeing(comm: Communicator, values: Sequence[int], scope: Scope = "world") -> list[int]:
    """Returns the indexes at which ranks of a scope pass different values. Every rank gets the same list.

    Every rank passes the same number of integers from 0 to 2**62 - 1. Any other integer raises a ValueError.
    """
    outside = [value for value in values if not 0 <= value < LIMIT]
    if outside:
        raise ValueError(f"{outside[0]} cannot be compared between ranks: use values from 0 to 2**{BITS} - 1")
    if not values:
        return []
    # The largest -v is minus the smallest v: one call finds both ends of the range.
    ends = largest(comm, [*values, *(-value for value in values)], torch.int64, scope)
    return [i for i in range(len(values)) if ends[i] != -ends[i + len(values)]]


def sent_by_comparison(count: int = 1, scope: Scope = "world") -> Calls:
    """Returns the collective call with which `disagreeing` compares `count` values; an empty tuple for 0.

    `differing_tensors` compares one value for each tensor. `take_rank_0` and `check_replicas` first compare only one.
    """
    return (Traffic("all_reduce", scope, 2 * count * torch.int64.itemsize),) if count else ()


def check_equal(comm: Communicator, values: Place, what: str = _DISAGREE, remedy: str = _REMEDY) -> None:
    """Checks that all ranks pass equal `values`. Collective over the world. Sends 24 bytes if they are equal.

    All calls send tensors of the same shape. So if ranks call this at different places of the program, they get an
    error instead of values that were sent for another purpose. The error's message begins with `what` and ends with
    `remedy`.

    Raises:
        RanksDisagreeError: values differ. The message lists which ranks have which values. All ranks raise the error.
    """
    finish(roll_call(comm, values, what=what, remedy=remedy))


def roll_call(
    comm: Communicator, place: Place, told: Told = (0, 0.0), what: str = _DISAGREE, remedy: str = _REMEDY
) -> Stages[list[Told]]:
    """Checks `place` like `check_equal`, in stages, and returns the pairs `told` of all ranks, in rank order."""
    parts = {name: dict(leaves(name, value, hashes=True)) for name, value in place.items()}
    whole = torch.tensor([fingerprint(parts), told[0]], dtype=torch.int64)
    row = torch.cat([whole, torch.tensor([told[1]], dtype=torch.float64).view(torch.int64)])
    under_way = comm.launch_all_gather(row.to(comm.device))
    yield
    rows = under_way.wait().cpu()
    if bool((rows[:, 0] != rows[0, 0]).any()):
        # All ranks have the same rows, so all of them make the next collective call.
        held = {name: dict(leaves(name, value)) for name, value in place.items()}
        everyone = gather_json(comm, held)
        if any(other.keys() != held.keys() for other in everyone):
            calls = [other.get(CALL, {}).get(CALL, "'another call'").strip("'") for other in everyone]
            raise RanksDisagreeError(
                f"workers are at different places of the program: {_by_rank('the call', calls)}. {_TOGETHER}"
            )
        flat = [{leaf: text for parts in other.values() for leaf, text in parts.items()} for other in everyone]
        listed = differences(flat) or "they have the same values in different orders"
        raise RanksDisagreeError(f"{what}: {listed}. {remedy}")
    return list(zip(rows[:, 1].tolist(), rows[:, 2].contiguous().view(torch.float64).tolist(), strict=True))


ROLL_CALL: Calls = (Traffic("all_gather", "world", 3 * torch.int64.itemsize),)
"""The collective call that `roll_call` or `check_equal` makes if nothing differs."""


class Hashed:
    """A value in a `Place` that has many parts and rarely changes, so its hash is computed once."""

    def __init__(self, value: object) -> None:
        self.value = value

    @cached_property
    def hash(self) -> int:
        return fingerprint(dict(leaves("", self.value)))


def leaves(place: str, value: object, hashes: bool = False) -> Iterator[tuple[str, str]]:
    """Yields a name (`place` and a path) and a text for each value in nested dataclasses, dicts, lists and tuples.

    With `hashes`, the text of a `Hashed` is its hash. Otherwise its parts are listed. Fields of dataclasses that do not
    count in comparisons are left out.
    """
    if isinstance(value, Hashed):
        yield from ((place, f"{value.hash:x}"),) if hashes else leaves(place, value.value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield place, type(value).__name__
        for field in (one for one in dataclasses.fields(value) if one.compare):
            yield from leaves(f"{place}.{field.name}", getattr(value, field.name), hashes)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(f"{place}.{key}", item, hashes)
    elif isinstance(value, tuple | list):
        for i, item in enumerate(value):
            yield from leaves(f"{place}[{i}]", item, hashes)
    else:
        yield place, stable_repr(value)


def differences(everyone: Sequence[Mapping[str, str]]) -> str:
    """Describes how the ranks' values differ; an empty string if they do not. `everyone` has a dict for each rank."""
    found: dict[str, str] = {}
    for place in dict.fromkeys(place for held in everyone for place in held):
        values = [held.get(place, _ABSENT) for held in everyone]
        # If a value is missing on a rank or has another type there, the values in it are not listed.
        listed = place.startswith(tuple(f"{outer}{mark}" for outer in found for mark in ".["))
        if len(set(values)) > 1 and not listed:
            found[place] = _by_rank(place, values)
    return _first(list(found.values()))


def _first(texts: Sequence[str]) -> str:
    more = f"; and {len(texts) - _MOST_LISTED} more" if len(texts) > _MOST_LISTED else ""
    return "; ".join(texts[:_MOST_LISTED]) + more


def _by_rank(place: str, values: Sequence[str]) -> str:
    """Describes which ranks have which value, the most frequent value first. The digits of hashes are left out."""
    holders: dict[str, list[str]] = {}
    for rank, value in enumerate(values):
        holders.setdefault(value, []).append(str(rank))
    ranked = sorted(holders.items(), key=lambda item: -len(item[1]))
    if all(value.isdigit() and len(value) > _READABLE_DIGITS for value in values):
        return f"{place} differs between rank " + " and rank ".join(", ".join(ranks) for _, ranks in ranked)
    return f"{place} is " + " and ".join(f"{value} on rank {', '.join(ranks)}" for value, ranks in ranked)


def gather_json(comm: Communicator, value: Any, nbytes: int = 0) -> list[Any]:
    """Returns every rank's value, in rank order. Collective over the world. Sends JSON: reading it never runs code.

    `nbytes` is equal on all ranks: an upper bound for the size of any value as JSON, or 0 to exchange sizes first.
    """
    text = json.dumps(value).encode()
    if comm.topology.world_size == 1:
        return [json.loads(text)]
    if not nbytes:
        sizes = comm.all_gather(torch.tensor([len(text)], dtype=torch.int64, device=comm.device))
        nbytes = int(sizes.max())
    row = torch.zeros(nbytes, dtype=torch.uint8)
    row[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return [json.loads(bytes(row.numpy()).rstrip(b"\0")) for row in comm.all_gather(row.to(comm.device)).cpu()]


def raise_together(comm: Communicator, problem: str) -> None:
    """Raises a CheckpointError on all workers if any of them reports a problem. Collective over the world.

    `problem` describes a problem with the state that this worker loads. It is empty if there is none.
    """
    found = gather_json(comm, problem)
    ranks = {one: [str(rank) for rank, other in enumerate(found) if other == one] for one in filter(None, found)}
    if ranks:
        told = [f"on rank {', '.join(some)}: {reason}" for reason, some in ranks.items()]
        raise CheckpointError(_first(told) if comm.topology.world_size > 1 else problem)


def share(comm: Communicator, tensors: Sequence[Tensor], owners: Sequence[int], scope: Scope = "world") -> None:
    """Copies each tensor bitwise from the rank that owns it to all ranks of a scope, in place. Collective over it.

    `owners` contains the owner's world rank for each tensor. Shapes and dtypes are the same on all ranks.
    """
    if len(tensors) != len(owners):
        raise ValueError(f"cannot share {len(tensors)} tensors with {len(owners)} owners: pass one owner per tensor")
    if len(comm.ranks(scope)) == 1:
        return
    for owner in sorted(set(owners)):
        owned = [tensor for tensor, its_owner in zip(tensors, owners, strict=True) if its_owner == owner]
        buckets = pack([tensor.detach().to(comm.device) for tensor in owned], widen=False)
        for bucket in buckets:
            comm.broadcast(bucket.flat, owner, scope)
        if comm.rank != owner:
            for tensor, received in zip(owned, unpack(buckets, owned), strict=True):
                tensor.detach().copy_(received)


def sent_by_share(tensors: Sequence[Tensor], scope: Scope = "world") -> Calls:
    """Returns the collective calls that `share` makes for tensors with the same owner."""
    return tuple(Traffic("broadcast", scope, bucket.flat.nbytes) for bucket in pack(tensors, widen=False))


def differing_tensors(comm: Communicator, named: Mapping[str, Tensor], scope: Scope = "world") -> list[str]:
    """Returns the names of the tensors that differ between the ranks of a scope, in the order of `named`.

    Names, shapes and dtypes are the same on all ranks, and all get the same list. Collective over the scope. Sends 16
    bytes for each tensor.
    """
    names = list(named)
    return [names[i] for i in disagreeing(comm, [checksum(tensor) for tensor in named.values()], scope)]


def agree_on_tensors(comm: Communicator, named: Mapping[str, Tensor]) -> list[str]:
    """Replaces tensors that differ between ranks by rank 0's, in place. Collective over the world.

    Returns:
        The names of the replaced tensors, in the order of `named`. All ranks get the same list.

    Raises:
        RanksDisagreeError: names, shapes or dtypes differ between ranks. All ranks raise the error.
    """
    check_equal(comm, {"names": list(named), "tensors": layouts_of(named)})
    return take_first(comm, named)


def sent_by_agree_on_tensors(count: int) -> Calls:
    """Returns the collective calls that `agree_on_tensors` makes for `count` tensors that are equal on all ranks."""
    return (*ROLL_CALL, *sent_by_comparison(count))


def take_rank_0(comm: Communicator, named: Mapping[str, Tensor]) -> list[str]:
    """Replaces tensors that differ between ranks by rank 0's, in place, and returns their names.

    All ranks pass the same names, shapes and dtypes. Collective over the world. Sends 16 bytes if nothing differs.
    """
    return take_first(comm, named) if disagreeing(comm, [fingerprint(*map(checksum, named.values()))]) else []


def take_first(comm: Communicator, named: Mapping[str, Tensor], scope: Scope = "world") -> list[str]:
    """Replaces tensors that differ between the ranks of a scope by its first rank's, in place. Returns their names.

    All ranks pass the same names, shapes and dtypes. Collective over the scope. Sends 16 bytes for each tensor.
    """
    differing = differing_tensors(comm, named, scope)
    share(comm, [named[name] for name in differing], [comm.ranks(scope)[0]] * len(differing), scope)
    return differing
