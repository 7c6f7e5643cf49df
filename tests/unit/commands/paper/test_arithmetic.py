"""The paper's formulas beside its values."""

from __future__ import annotations

import pytest

from abtrain.commands.paper.arithmetic import (
    CLOSE,
    ecr,
    ecr_rows,
    epoch_seconds,
    full_share,
    guideline_share,
    iterations,
    scaled_traffic,
)
from abtrain.commands.paper.published import (
    AB,
    DDP,
    NO_GROUPS,
    RESNET,
    SCHEDULES,
    TABLE2_GLOBAL,
    TABLE2_LOCAL,
    VGG,
    VIT,
    PublishedSchedule,
)

PARAMETERS = {VIT: 86_567_656, RESNET: 25_557_032}
EXCEPTIONS = {
    (RESNET, AB),
    (RESNET, "OIALR"),
    (RESNET, "DLRT"),
    (VGG, AB),
    (VGG, "OIALR"),
    (VGG, "DLRT"),
}


def test_ecr_is_the_papers_but_for_the_named_exceptions() -> None:
    found = ecr_rows()
    assert len(found) == 15
    for row in found:
        if (row.method.model, row.method.name) in EXCEPTIONS:
            assert not row.reached and row.remark
        else:
            assert row.reached and row.difference is not None and abs(row.difference) <= CLOSE


def test_ecr_by_hand() -> None:
    assert ecr(25, 75, 2.0) == 37.5
    assert ecr(25, 75, 1.27) == pytest.approx(15.94, abs=0.01)


def test_the_guideline_keeps_a_good_third_of_the_steps_in_full_rank() -> None:
    assert guideline_share() == pytest.approx(0.36)
    assert full_share(SCHEDULES[RESNET]) == pytest.approx(0.28)
    assert full_share(PublishedSchedule(total=100, warmup=20, cycle=10, rebound=2)) == pytest.approx(0.36)
    # The last cycle is cut off in its group phase.
    assert full_share(PublishedSchedule(total=95, warmup=20, cycle=10, rebound=2)) == pytest.approx(34 / 95)


def test_scaled_traffic_of_vit_on_two_nodes_is_the_papers() -> None:
    there = TABLE2_LOCAL[VIT, DDP, 2]
    assert there.traffic is not None and there.minutes is not None
    value = scaled_traffic(PARAMETERS[VIT], iterations(2), epoch_seconds(there.minutes.mean))
    assert value == pytest.approx(there.traffic.mean, rel=0.03)


def test_scaled_traffic_of_resnet_is_below_the_papers() -> None:
    for nodes in (2, 4, 8, 16, 32):
        there = TABLE2_LOCAL[RESNET, DDP, nodes]
        assert there.traffic is not None and there.minutes is not None
        value = scaled_traffic(PARAMETERS[RESNET], iterations(nodes), epoch_seconds(there.minutes.mean))
        assert value < 0.85 * there.traffic.mean


def test_scaled_traffic_is_not_above_the_port() -> None:
    assert scaled_traffic(1e12, 300, 1) == 25.0


def test_the_tables_are_complete() -> None:
    for table, nodes in ((TABLE2_LOCAL, (2, 4, 8, 16, 32)), (TABLE2_GLOBAL, (4, 8, 16, 32))):
        assert set(table) == {(m, method, n) for m in (VIT, RESNET) for method in (AB, NO_GROUPS, DDP) for n in nodes}
