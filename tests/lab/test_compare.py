"""A run of a comparison, as the lab runs it."""

from pathlib import Path

import pytest

from abtrain.commands.compare.runs import outcome, plan_runs, run_in_lab
from abtrain.commands.lab import Lab
from tests.unit.commands.made_up import requested

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
pytest.importorskip("sklearn")

pytestmark = pytest.mark.alone


def test_a_run_is_done_once_and_says_what_came_out(tmp_path: Path) -> None:
    line = (
        "ddp",
        "--task",
        "digits-mlp",
        "--nodes",
        "2",
        "--rate",
        "200mbit",
        "--more-rates",
        "50mbit",
        "--steps",
        "4",
    )
    comparison = requested([*line, "--seeds", "1", "--out", str(tmp_path)])
    task = plan_runs(comparison)[-2]
    assert str(task) == "ddp, seed 0, 50mbit" and not task.done
    with Lab(comparison.lab) as lab:
        run_in_lab(task, lab)
        assert lab.rates == [50 * 10**6] * 2
    assert task.done
    result = outcome(task)
    # Two workers: a ring sends every byte of the payload once.
    assert result.payload < result.wire_bytes < 1.1 * result.payload + 50_000
    assert result.top1 is not None and result.seconds > 0.95 * 8 * result.payload / task.rate
    assert result.curve[-1][0] <= result.seconds + 1
