import pytest

from abtrain.commands.compare.summary import expected_utilisation, rows, utilisations
from tests.unit.commands.made_up import outcome, outcomes


def test_means_deviations_and_ratios() -> None:
    found = {row.label: row for row in rows(outcomes(seeds=2), workers=4)}
    assert list(found) == ["solo", "ddp", "ddp:wire=bf16", "ab_outer", "ab:sigma_cutoff=0.3"]
    outer = found["ab_outer"]
    assert (outer.seeds, outer.top1, outer.loss) == (2, 90.5, 0.3)
    assert outer.top1_std == pytest.approx(0.5**0.5)
    assert outer.wire_ratio == pytest.approx(1e4 / 4e6)
    assert outer.seconds_ratio == pytest.approx(0.6) and outer.utilisation == pytest.approx(5 / 6)
    assert outer.ring_bytes == 1.5 * 6000 and outer.start_bytes == 100
    assert found["ddp"].seconds == 20.5 and found["ddp"].wire_ratio == 1
    assert found["ab:sigma_cutoff=0.3"].payload_by_phase == {"warmup": 400_000, "group": 50_000, "rebound": 150_000}


def test_a_single_seed_has_no_deviation_and_some_tasks_no_top1() -> None:
    made = [outcome(label, top1=None) for label in ("solo", "ddp", "ddp:wire=bf16")]
    row = rows(made, workers=2)[0]
    assert (row.top1, row.top1_std, row.loss_std) == (None, None, None)


def test_utilisation_at_every_rate() -> None:
    made = [
        outcome("solo", rate=10**8, seconds=5.0),
        outcome("ddp", rate=10**8, seconds=20.0),
        outcome("solo", rate=10**7, seconds=5.0),
        outcome("ddp", rate=10**7, seconds=50.0),
    ]
    assert utilisations(made)["ddp"] == [(10**7, 0.1), (10**8, 0.25)]


def test_utilisation_on_other_links() -> None:
    made = [
        outcome("solo", seconds=5.0, wire_bytes=0.0),
        # 10 s on the link, 8 of them waited for.
        outcome("ddp", seconds=20.0, wire_bytes=10 * 1e8 / 8, sync_seconds=8.0),
        outcome("ddp:wire=bf16"),
    ]
    ddp = rows(made, workers=2)[1]
    at = [expected_utilisation(ddp, 10**8, rate, wire_share=1.0) for rate in (10**7, 10**8, 2 * 10**8, 10**14)]
    assert at == pytest.approx([5 / 110, 5 / 20, 5 / 16, 5 / 12], rel=1e-4)
