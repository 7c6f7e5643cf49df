"""Agreement holds on every communicator, because it is built on the contract alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abtrain.comm import Communicator, SingleProcess, run_in_process
from abtrain.comm.stages import finish
from abtrain.consistency.agreement import (
    agree_on_tensors,
    check_equal,
    disagreeing,
    raise_together,
    roll_call,
    share,
)
from abtrain.errors import CheckpointError, RanksDisagreeError
from tests.unit.comm.worlds import WORLDS, World

on_every_communicator = pytest.mark.parametrize("world", WORLDS, ids=str)


def differ_at(comm: Communicator, at: list[int]) -> list[int]:
    values = [10**6, 0, 2**62 - 1, 5]
    for index in at:
        values[index] = (values[index] + comm.rank) % 2**62
    return disagreeing(comm, values)


@on_every_communicator
@pytest.mark.parametrize("at", [[], [0], [1, 3], [2]])
def test_disagreeing_finds_the_same_indexes_on_every_rank(world: World, at: list[int]) -> None:
    assert world.run(differ_at, at) == [at if world.world_size > 1 else []] * world.world_size


@settings(deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 2**62 - 1) | st.integers(0, 3)] * 3), max_size=6))
def test_disagreeing_is_exact(columns: list[tuple[int, int, int]]) -> None:
    expected = [i for i, column in enumerate(columns) if len(set(column)) > 1]
    results = run_in_process(3, lambda comm: disagreeing(comm, [column[comm.rank] for column in columns]))
    assert results == [expected] * 3


@pytest.mark.parametrize("value", [-1, 2**62])
def test_values_out_of_range_are_refused(value: int) -> None:
    with pytest.raises(ValueError, match=f"{value} cannot be compared"):
        disagreeing(SingleProcess(), [value])


def compare_places(comm: Communicator) -> None:
    check_equal(comm, {"step": 120, "phase": 2})
    if 1 in (comm.topology.n_groups, comm.topology.group_size):
        assert comm.meter.payload()["total"] == (24 if comm.topology.world_size > 1 else 0)
    if comm.topology.world_size == 1:
        return
    with pytest.raises(RanksDisagreeError) as disagreement:
        check_equal(comm, {"step": 120 + comm.rank, "phase": 2, "shapes": 7 - comm.rank})
    message = str(disagreement.value)
    for rank in range(comm.topology.world_size):
        assert f"{120 + rank} on rank {rank}" in message and f"{7 - rank} on rank {rank}" in message
    assert "phase" not in message
    assert "call ab.step() once for each optimizer step" in message
    with pytest.raises(RanksDisagreeError, match="different places of the program"):
        check_equal(comm, {"step": 1} if comm.rank else {"step": 1, "phase": 1})
    with pytest.raises(RanksDisagreeError, match=r"anchors differs between rank 0.* and rank 1"):
        check_equal(comm, {"anchors": 2**61 + (comm.rank == 1)})
    with pytest.raises(RanksDisagreeError, match="the same values in different orders"):
        check_equal(comm, {"options": {"a": 1, "b": 2} if comm.rank else {"b": 2, "a": 1}})
    check_equal(comm, {})


@on_every_communicator
def test_every_rank_learns_which_fields_differ(world: World) -> None:
    world.run(compare_places)


def tell(comm: Communicator) -> list[tuple[int, float]]:
    return finish(roll_call(comm, {"step": 3}, (2**62 - comm.rank, math.inf if comm.rank else math.nan)))


@on_every_communicator
def test_a_roll_call_tells_all_what_each_one_says(world: World) -> None:
    for rows in world.run(tell):
        assert [one for one, _ in rows] == [2**62 - rank for rank in range(world.world_size)]
        assert [str(other) for _, other in rows] == ["nan", *["inf"] * (world.world_size - 1)]


def compare_and_count(comm: Communicator) -> int:
    check_equal(comm, {"step": 3})
    assert disagreeing(comm, [comm.rank % 2, 7]) == [0]
    return int(comm.meter.payload()["between_groups"])


@pytest.mark.parametrize("form", ["threads", "gloo"])
def test_one_worker_of_each_group_compares_with_the_other_groups(form: str) -> None:
    """Else the messages between machines would grow with the workers of each."""
    of_first = 2 * 24 + 2 * 16
    assert World(form, 4, 2).run(compare_and_count) == [of_first, 0, of_first, 0]


def share_by_owner(comm: Communicator) -> None:
    n = comm.topology.world_size
    owners = [i % n for i in range(8)]
    dtypes = [torch.float32, torch.bool, torch.bfloat16, torch.complex64] * 2
    tensors = [torch.full((2, 3), 1 + comm.rank).to(dtype) for dtype in dtypes]
    tensors[0] = torch.nn.Parameter(tensors[0])
    tensors[4] = torch.full((3, 2), 1.0 + comm.rank).t()
    places = [t.data_ptr() for t in tensors]
    share(comm, tensors, owners)
    for tensor, owner, dtype in zip(tensors, owners, dtypes, strict=True):
        assert tensor.tolist() == torch.full((2, 3), 1 + owner).to(dtype).tolist()
    assert [t.data_ptr() for t in tensors] == places
    assert comm.meter.payload()["total"] == (2 * 6 * (4 + 1 + 2 + 8) if n > 1 else 0)


@on_every_communicator
def test_share_overwrites_each_tensor_with_its_owners(world: World) -> None:
    world.run(share_by_owner)


def test_sharing_needs_an_owner_for_each_tensor() -> None:
    with pytest.raises(ValueError, match="cannot share 1 tensors with 2 owners"):
        share(SingleProcess(), [torch.ones(1)], [0, 0])


def agree(comm: Communicator) -> None:
    named = {
        "same": torch.ones(3),
        "weight": torch.nn.Parameter(torch.full((2, 2), float(comm.rank))),
        "mask": torch.tensor([comm.rank == 0, True]),
        "count": torch.tensor(7),
        "nothing": torch.empty(0),
    }
    assert agree_on_tensors(comm, named) == (["weight", "mask"] if comm.topology.world_size > 1 else [])
    assert named["weight"].tolist() == [[0, 0], [0, 0]]
    assert named["mask"].tolist() == [True, True]
    assert agree_on_tensors(comm, named) == []
    assert agree_on_tensors(comm, {}) == []


@on_every_communicator
def test_ranks_agree_on_rank_0(world: World) -> None:
    world.run(agree)


def hold_other_models(comm: Communicator) -> None:
    odd = comm.rank == 1
    for words, tensors in {
        r"tensors.w is '\(2,\) of torch.float32' on rank 0.* and '\(3,\)": {"w": torch.ones(3 if odd else 2)},
        "tensors.w is .* of torch.float64' on rank 1": {
            "w": torch.ones(2, dtype=torch.float64 if odd else torch.float32)
        },
        r"names\[0\] is 'w' on rank 0.* and 'v' on rank 1": {"v" if odd else "w": torch.ones(2)},
        r"names\[2\] is absent on rank 0.* and 'w2' on rank 1": {
            f"w{i}": torch.ones(2) for i in range(3 if odd else 2)
        },
    }.items():
        if comm.topology.world_size > 1:
            with pytest.raises(RanksDisagreeError, match=f"{words}.*same model"):
                agree_on_tensors(comm, tensors)


@on_every_communicator
def test_other_models_cannot_be_made_to_agree(world: World) -> None:
    world.run(hold_other_models)


def test_every_problem_is_told_with_the_ranks_that_have_it() -> None:
    problems = ["the disk is full", "", "a file is damaged", "the disk is full"]

    def work(comm: Communicator) -> None:
        raise_together(comm, "")
        with pytest.raises(CheckpointError) as told:
            raise_together(comm, problems[comm.rank])
        assert str(told.value) == "on rank 0, 3: the disk is full; on rank 2: a file is damaged"

    run_in_process(4, work)
    with pytest.raises(CheckpointError, match=r"^a file is damaged$"):
        raise_together(SingleProcess(), problems[2])
