"""What a worker computes in a merge is measured with a worker that imagines the others."""

import pytest

from abtrain.commands.plan import merge_bench
from abtrain.commands.plan.merge_bench import seconds_of_merge
from abtrain.recipes.merges import Outer
from abtrain.recipes.sync import WeightSync


@pytest.mark.parametrize("wire", ["fp32", "auto", "ternary"])
@pytest.mark.parametrize("delay", [0, 5])
def test_a_merge_of_any_kind_can_be_measured(
    wire: str, delay: int, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    sync = WeightSync(10, Outer(), wire, delay, fragments=2)
    assert seconds_of_merge(sync, 3, 1000) > 0
    assert seconds_of_merge(sync, 1, 1000) == 0
    # The user has asked for a forecast, and does not see that it contains a short training run.
    assert capfd.readouterr() == ("", "") and not caplog.records


def test_a_large_merge_takes_as_many_times_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_bench, "_MOST_NUMBERS", 500)
    sync = WeightSync(10, wire="int4")
    assert seconds_of_merge(sync, 2, 5000) == pytest.approx(10 * seconds_of_merge(sync, 2, 500))
