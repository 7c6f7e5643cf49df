"""Cost models against numbers worked out by hand, and against a ring that is run message by message."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abtrain.commands.plan.collectives import (
    ALL_REDUCES,
    ENVELOPE,
    LOCAL,
    RING_PARTS,
    Cluster,
    NodeLink,
    cost_of,
    hierarchical,
    ring,
    wire_bytes,
)
from abtrain.errors import ConfigurationError

FAST = NodeLink(100e6, 5e-4)
PER_FRAME = 66 * (1 + 1 / 16)


def test_wire_bytes_by_hand() -> None:
    """1448 bytes fill a frame of 1514; sixteen are answered by one of 66."""
    assert wire_bytes(1448) == 1514 + 66 / 16 + ENVELOPE
    assert wire_bytes(1449) == 1449 + 2 * PER_FRAME + ENVELOPE
    assert wire_bytes(2896, messages=2) == 2 * wire_bytes(1448)
    assert wire_bytes(0) == wire_bytes(10, messages=0) == 0
    assert wire_bytes(1e9) / 1e9 == pytest.approx(1514 / 1448 + 66 / 16 / 1448, rel=1e-4)


def test_ring_by_hand() -> None:
    """10 MB over 4 nodes: 6 rounds of 2.5 MB; 15 MB at 100 Mbit/s are 1.2 s and the headers' 5 %."""
    cost = ring(Cluster(4, FAST), 10e6)
    assert cost.wire == 6 * wire_bytes(2.5e6, RING_PARTS)
    assert cost.wire == pytest.approx(15e6 * 1.0484, rel=1e-3)
    assert cost.seconds == pytest.approx(6 * 5e-4 + 1.2 * 1.0484, rel=1e-3)


def test_hierarchical_by_hand() -> None:
    """Inside a node each of 4 workers passes on a quarter, 3 times before and 3 times after."""
    between = ring(Cluster(2, FAST), 4e6)
    cost = hierarchical(Cluster(2, FAST, per_node=4), 4e6)
    assert cost.wire == between.wire
    assert cost.seconds == pytest.approx(between.seconds + 6 * LOCAL.seconds(1e6))


def test_the_other_calls_by_hand() -> None:
    cluster = Cluster(4, FAST)
    gathered = cost_of("all_gather", cluster, 1e6)
    assert gathered.wire == 3 * wire_bytes(1e6, RING_PARTS)
    exchanged = cost_of("exchange", cluster, 3e6)
    assert exchanged.wire == wire_bytes(3e6, 3)
    assert exchanged.seconds == pytest.approx(3 * 5e-4 + 8 * exchanged.wire / 100e6)
    sent = cost_of("broadcast", cluster, 1e6)
    assert sent == (pytest.approx(2 * FAST.seconds(1e6)), pytest.approx(0.75 * wire_bytes(1e6)))


def test_nothing_leaves_a_node_that_is_alone() -> None:
    for call in ("all_reduce", "all_gather", "exchange", "broadcast"):
        cost = cost_of(call, Cluster(1, FAST, per_node=4), 1e6)  # type: ignore[arg-type]  # a call's name
        assert cost.wire == 0
        assert 0 < cost.seconds < 0.01
    assert cost_of("all_reduce", Cluster(1, FAST), 1e6) == (0, 0)


def test_what_leaves_a_node_in_an_exchange() -> None:
    """2 nodes of 2: each worker has a third for each other one, and two of those are elsewhere."""
    assert cost_of("exchange", Cluster(2, FAST, 2), 3e6).wire == wire_bytes(4e6, 4)


@settings(deadline=None)
@given(n=st.integers(2, 300), megabytes=st.floats(10, 1000))
def test_large_all_reduces_move_what_bandwidth_allows_at_least(n: int, megabytes: float) -> None:
    """2 (n-1)/n M on average (Patarasuk and Yuan), whatever the algorithm."""
    for algorithm in ALL_REDUCES:
        cost = cost_of("all_reduce", Cluster(n, FAST), megabytes * 1e6, algorithm)
        least = 2 * (n - 1) / n * megabytes * 1e6
        assert least <= cost.wire < 1.15 * least
        assert cost.seconds >= 8 * least / FAST.rate


@settings(deadline=None)
@given(rates=st.lists(st.sampled_from((1e7, 1e8, 1e9)), min_size=2, max_size=12))
def test_a_ring_goes_at_the_pace_of_its_slowest_link(rates: list[float]) -> None:
    """Message by message: a node sends on in a round what it got in the one before."""
    n, nbytes = len(rates), 1e6
    links = [NodeLink(rate, 1e-4) for rate in rates]
    done = [0.0] * n
    for _ in range(2 * (n - 1)):
        sent = [at + link.seconds(nbytes / n, RING_PARTS) for at, link in zip(done, links, strict=True)]
        done = [max(sent[i], sent[i - 1]) for i in range(n)]
    assert max(done) == pytest.approx(ring(Cluster(n, NodeLink(min(rates), 1e-4)), nbytes).seconds)


def test_a_cluster_that_cannot_be() -> None:
    with pytest.raises(ConfigurationError) as error:
        Cluster(0, NodeLink(-1, math.nan), per_node=0)
    assert len(error.value.problems) == 4


def test_part_of_a_cluster() -> None:
    cluster = Cluster(8, FAST, per_node=4)
    assert (cluster.part(2).nodes, cluster.part(2).per_node) == (1, 2)
    assert (cluster.part(8).nodes, cluster.part(8).per_node) == (2, 4)
