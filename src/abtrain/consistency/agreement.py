"""How workers find out whether they hold the same, and how they come to. Built on the contract alone.

All of it costs a few dozen bytes, and 16 for each tensor compared, until something differs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from abtrain.comm.buckets import pack, unpack
from abtrain.comm.checksums import BITS, LIMIT, checksum, fingerprint
from abtrain.comm.communicator import Communicator, Scope
from abtrain.comm.stages import Stages, finish
from abtrain.comm.traffic import Calls, Traffic
from abtrain.errors import CheckpointError, RanksDisagreeError

ABSENT = "absent"
_MOST_TOLD = 5

# Larger numbers are digests, of which only says something who holds which.
_READABLE = 10**9

Place = Mapping[str, int | Mapping[str, str]]
"""What says where a rank is: whole numbers by name, and names with words, of which those are told that differ."""
Told = tuple[int, float]
"""What a rank tells all others in a roll call: a whole number below 2**63, and a real one."""
_NOTHING: Told = (0, 0.0)

_REMEDY = (
    "Every rank needs the same model, recipe and optimizer settings (unless same_settings=False), and one ab.step() "
    "for each optimizer step, on every rank the same number of times"
)


def disagreeing(comm: Communicator, values: Sequence[int]) -> list[int]:
    """The indexes at which ranks hold different values; every rank gets the same list.

    Args:
        comm: over whose world to compare.
        values: from 0 to 2**62 - 1, as many on every rank.
    """
    lowest, highest = _ranges(comm, values)
    return [i for i, (low, high) in enumerate(zip(lowest, highest, strict=True)) if low != high]


def check_fingerprint(comm: Communicator, **fields: int) -> None:
    """Makes sure that all ranks are at the same place before they average anything.

    Collectives of the same shape in another order raise no error, they mix up weights. Here every rank sends
    the same few bytes wherever it is.

    Args:
        comm: over whose world to compare.
        fields: whole numbers that say where this rank is, such as `step=120`.

    Raises:
        RanksDisagreeError: on every rank, if any field differs.
    """
    finish(roll_call(comm, fields))


def differing_fields(comm: Communicator, **fields: int) -> list[str]:
    """As `check_fingerprint`, with the same bytes, for callers who can say more of a difference than two numbers.

    Returns:
        The names of the fields that differ; the same on every rank.

    Raises:
        RanksDisagreeError: another rank compares other fields.
    """
    return _differing(fields, finish(_meet(comm, fields, _NOTHING))[1])


def roll_call(comm: Communicator, place: Place, told: Told = _NOTHING) -> Stages[list[Told]]:
    """`check_fingerprint` of a place, in stages, at which every rank tells all others two numbers.

    Returns:
        What each rank told, in rank order.

    Raises:
        RanksDisagreeError: on every rank, if they are not all at the same place.
    """
    rows, places = yield from _meet(comm, place, told)
    differing = _differing(place, places)
    if differing:
        held = [text for name in differing for text in _by_rank(name, [one[name] for one in places])]
        more = f"; and {len(held) - _MOST_TOLD} more" if len(held) > _MOST_TOLD else ""
        raise RanksDisagreeError(f"ranks disagree: {'; '.join(held[:_MOST_TOLD])}{more}. {_REMEDY}")
    return rows


def _meet(comm: Communicator, place: Place, told: Told) -> Stages[tuple[list[Told], list[dict[str, Any]]]]:
    """Returns the numbers of every rank; and the place of each if they are not all at the same one."""
    whole = torch.tensor([fingerprint(*place.items()), told[0]], dtype=torch.int64)
    row = torch.cat([whole, torch.tensor([told[1]], dtype=torch.float64).view(torch.int64)])
    under_way = comm.launch_all_gather(row.to(comm.device))
    yield
    rows = under_way.wait().cpu()
    reals = rows[:, 2].contiguous().view(torch.float64)
    numbers = [(int(one), float(other)) for one, other in zip(rows[:, 1], reals, strict=True)]
    if bool((rows[:, 0] == rows[0, 0]).all()):
        return numbers, []
    # All ranks are here, since all have seen it.
    return numbers, gather_json(comm, dict(place))


def _differing(place: Place, places: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of the fields of which not all places have the same."""
    if any(one.keys() != place.keys() for one in places):
        raise RanksDisagreeError(
            f"ranks are at different places of the program: this one compares {', '.join(place) or 'nothing'}, "
            f"another one does not. {_REMEDY}"
        )
    return [name for name in place if any(one[name] != places[0][name] for one in places)]


def _by_rank(name: str, values: Sequence[Any]) -> list[str]:
    """Who holds what; of digests, who holds the same; of words by name, those that differ."""
    if isinstance(values[0], dict):
        keys = dict.fromkeys(key for held in values for key in held)
        columns = {key: [held.get(key, ABSENT) for held in values] for key in keys}
        return [values_by_rank(key, column) for key, column in columns.items() if len(set(column)) > 1]
    if max(values) < _READABLE:
        return [values_by_rank(name, values)]
    return [f"{name} of rank " + " and of rank ".join(ranks for _, ranks in _holders(values)[::-1]) + " are unlike"]


def values_by_rank(name: str, values: Sequence[int | str]) -> str:
    """Words for what each rank holds of something: what most hold comes first."""
    return f"{name} is " + " and ".join(f"{value} on rank {ranks}" for value, ranks in _holders(values))


def _holders(values: Sequence[int | str]) -> list[tuple[int | str, str]]:
    """Every value with the ranks that hold it, most of them first."""
    holders: dict[int | str, list[str]] = {}
    for rank, value in enumerate(values):
        holders.setdefault(value, []).append(str(rank))
    return [(value, ", ".join(ranks)) for value, ranks in sorted(holders.items(), key=lambda item: -len(item[1]))]


def share(comm: Communicator, tensors: Sequence[Tensor], owners: Sequence[int]) -> None:
    """Overwrites every tensor in place, on every rank, with that of its owner, bit by bit.

    Args:
        comm: over whose world to share.
        tensors: of the same shapes and dtypes on all ranks.
        owners: for each tensor, the rank that has the right one.
    """
    if len(tensors) != len(owners):
        raise ValueError(f"{len(tensors)} tensors, but {len(owners)} owners: each tensor needs one")
    if comm.topology.world_size == 1:
        return
    for owner in sorted(set(owners)):
        owned = [tensor for tensor, its_owner in zip(tensors, owners, strict=True) if its_owner == owner]
        buckets = pack([tensor.detach().to(comm.device) for tensor in owned], widen=False)
        for bucket in buckets:
            comm.broadcast(bucket.flat, owner)
        if comm.rank != owner:
            for tensor, received in zip(owned, unpack(buckets, owned), strict=True):
                tensor.detach().copy_(received)


def agree_on_tensors(comm: Communicator, named: Mapping[str, Tensor]) -> list[str]:
    """Makes named tensors the same on all ranks: where ranks differ, all take rank 0's, in place.

    Returns:
        The names that differed, in order; the same list on every rank.

    Raises:
        RanksDisagreeError: on every rank, if the names, shapes or dtypes differ, which no broadcast can mend.
    """
    check_fingerprint(
        comm,
        tensors=len(named),
        names=fingerprint(*named),
        shapes=fingerprint(*(tuple(t.shape) for t in named.values())),
        dtypes=fingerprint(*(t.dtype for t in named.values())),
    )
    differing = differing_tensors(comm, named)
    share(comm, [named[name] for name in differing], owners=[0] * len(differing))
    return differing


def differing_tensors(comm: Communicator, named: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that ranks hold differently, in order; the same list on every rank.

    Args:
        comm: over whose world to compare; 16 bytes a tensor.
        named: the same names, shapes and dtypes on all ranks.
    """
    names = list(named)
    return [names[i] for i in disagreeing(comm, [checksum(tensor) for tensor in named.values()])]


def take_first(comm: Communicator, named: Mapping[str, Tensor]) -> list[str]:
    """Makes tensors bitwise equal that every rank computed from the same numbers, by taking rank 0's.

    On unlike processors they do. Collective over the world; 16 bytes, until something differs.

    Args:
        comm: of this worker.
        named: the same names, shapes and dtypes on all ranks.

    Returns:
        The names that differed, in order; the same list on every rank.
    """
    names, sums = list(named), [checksum(tensor) for tensor in named.values()]
    if not disagreeing(comm, [fingerprint(*sums)]):
        return []
    differing = [names[i] for i in disagreeing(comm, sums)]
    share(comm, [named[name] for name in differing], owners=[0] * len(differing))
    return differing


def gather_json(comm: Communicator, value: Any) -> list[Any]:
    """Returns every rank's value, in rank order. Values travel as JSON: no bytes from another rank are ever executed.

    Args:
        comm: over whose world.
        value: anything that JSON can hold.
    """
    if comm.topology.world_size == 1:
        return [json.loads(json.dumps(value))]
    text = json.dumps(value).encode()
    sizes = comm.all_gather(torch.tensor([len(text)], dtype=torch.int64, device=comm.device)).flatten().tolist()
    row = torch.zeros(max(sizes), dtype=torch.uint8)
    row[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    rows = comm.all_gather(row.to(comm.device)).cpu()
    return [json.loads(bytes(row[:size].numpy())) for row, size in zip(rows, sizes, strict=True)]


def raise_together(comm: Communicator, problem: str) -> None:
    """Shares why workers cannot go on from their states (empty: they can). Collective over the world.

    Raises:
        CheckpointError: one cannot; on all workers.
    """
    told = gather_json(comm, problem)
    ranks = [str(rank) for rank, why in enumerate(told) if why]
    if ranks:
        where = f"on rank {', '.join(ranks)}: " if comm.topology.world_size > 1 else ""
        raise CheckpointError(f"{where}{next(filter(None, told))}")


ROLL_CALL: Calls = (Traffic("all_gather", "world", 3 * torch.int64.itemsize),)
"""The call of `roll_call`, `check_fingerprint` and `differing_fields` where all ranks are at the same place."""


def sent_by_comparison(count: int, scope: Scope = "world") -> Calls:
    """The call of `disagreeing` and `differing_tensors`: both ends of the range of `count` numbers."""
    return (Traffic("all_reduce", scope, 2 * count * torch.int64.itemsize),) if count else ()


def sent_by_share(tensors: Sequence[Tensor]) -> Calls:
    """The calls of `share` of tensors of one owner."""
    return tuple(Traffic("broadcast", "world", bucket.flat.nbytes) for bucket in pack(tensors, widen=False))


def sent_by_agree_on_tensors(count: int) -> Calls:
    """The calls of `agree_on_tensors` of `count` tensors that ranks hold equally."""
    return (*ROLL_CALL, *sent_by_comparison(count))


def sent_by_take_first() -> Calls:
    """The call of `take_first` where the last bits are equal."""
    return sent_by_comparison(1)


def _ranges(comm: Communicator, values: Sequence[int]) -> tuple[list[int], list[int]]:
    """The lowest and the highest value that any rank holds, at each index."""
    outside = [value for value in values if not 0 <= value < LIMIT]
    if outside:
        raise ValueError(f"{outside[0]} cannot be compared between ranks: values go from 0 to 2**{BITS} - 1")
    if not values:
        return [], []
    mine = torch.tensor(values, dtype=torch.int64, device=comm.device)
    ends = torch.cat([mine, -mine])
    comm.all_reduce(ends, "max")
    highest, lowest = ends.split(len(values))
    return (-lowest).tolist(), highest.tolist()
