import pytest
from hypothesis import given
from hypothesis import strategies as st

from abtrain.comm.topology import Topology, default_group_size, topology_problems
from abtrain.errors import ConfigurationError

sizes = st.tuples(st.integers(1, 8), st.integers(1, 8))


@given(sizes)
def test_groups_cut_the_world_into_consecutive_ranks(groups_and_size: tuple[int, int]) -> None:
    n_groups, group_size = groups_and_size
    topology = Topology(n_groups * group_size, group_size)
    assert topology.n_groups == n_groups
    assert [rank for group in topology.groups for rank in group] == list(range(topology.world_size))
    for index, group in enumerate(topology.groups):
        assert len(group) == group_size
        assert {topology.group_of(rank) for rank in group} == {index}


@pytest.mark.parametrize(
    ("world_size", "group_size", "roles"),
    [(4, 1, "AABB"), (4, 2, "AABB"), (3, 1, "AAB"), (6, 2, "AAAABB"), (2, 1, "AB")],
)
def test_the_first_half_of_the_groups_trains_a(world_size: int, group_size: int, roles: str) -> None:
    topology = Topology(world_size, group_size)
    for cycle in (0, 1):
        assert "".join(topology.role(rank, cycle) for rank in range(world_size)) == roles


def test_one_group_alone_takes_turns() -> None:
    assert [Topology(2, 2).role(0, cycle) for cycle in range(4)] == ["A", "B", "A", "B"]


@pytest.mark.parametrize(
    ("world_size", "group_size", "says"),
    [(0, 1, "at least 1"), (4, 0, "at least 1"), (2, 4, "among 1, 2"), (6, 4, "among 1, 2, 3, 6")],
)
def test_impossible_sizes_are_refused_with_a_remedy(world_size: int, group_size: int, says: str) -> None:
    assert len(topology_problems(world_size, group_size)) == 1
    with pytest.raises(ConfigurationError, match=says):
        Topology(world_size, group_size)


@pytest.mark.parametrize(
    ("machines", "size"),
    [([7], 1), ([7, 7, 7, 7], 1), ([7, 8, 9], 1), ([7, 7, 9, 9], 2), ([9, 9, 7, 7, 8, 8], 2), ([7, 9, 7, 9], 1)],
    ids=["alone", "one machine", "a worker each", "two each", "in any order", "dealt out in turn"],
)
def test_a_group_is_a_machine_where_there_are_several(machines: list[int], size: int) -> None:
    assert default_group_size(machines) == size


@pytest.mark.parametrize(("machines", "sizes"), [([1, 1, 2], "1,"), ([1, 1, 1, 1, 2, 2], "1 or 2,")])
def test_machines_with_different_numbers_of_workers(machines: list[int], sizes: str) -> None:
    with pytest.raises(ConfigurationError, match=f"set group_size to {sizes}"):
        default_group_size(machines)
