"""Settings that workers compare before they train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from abtrain.comm.communicator import Communicator, SingleProcess
from abtrain.comm.in_process import run_in_process
from abtrain.consistency.agreement import check_equal
from abtrain.errors import RanksDisagreeError
from abtrain.recipes.factoring import Factoring
from tests.faults.loops import AB, told


class OwnRule:
    """A rank rule whose repr holds its address."""

    def __call__(self, singular_values: Sequence[float], m: int, n: int) -> int:
        return 1

    def problems(self) -> list[str]:
        return []


def test_equal_settings_cost_24_bytes() -> None:
    def work(comm: Communicator) -> int:
        # Neither an address nor the kind of a sequence is a difference.
        exclude: Any = ("0.*",) if comm.rank else ["0.*"]
        recipe = replace(AB, factoring=Factoring(OwnRule(), exclude=exclude))
        check_equal(comm, {"recipe": recipe, "on_nonfinite": "stop"})
        return int(comm.meter.payload()["total"])

    assert run_in_process(3, work) == [24] * 3


def test_one_worker_alone_agrees_with_itself() -> None:
    comm = SingleProcess()
    check_equal(comm, {"recipe": AB, "topology": comm.topology})
    assert comm.meter.payload()["total"] == 0


def test_a_few_differences_are_shown_and_the_others_counted() -> None:
    def work(comm: Communicator) -> None:
        check_equal(comm, dict.fromkeys("abcdefg", comm.rank), "they differ", "Mend it")

    for error in told(2, work):
        assert isinstance(error, RanksDisagreeError)
        assert str(error).startswith("they differ: a is 0 on rank 0 and 1 on rank 1; b is")
        assert str(error).endswith("; and 2 more. Mend it")


@pytest.mark.parametrize(("field", "value"), [("abtrain", "0.0.1"), ("torch", "1.13")])
def test_versions_that_differ(field: str, value: str) -> None:
    def work(comm: Communicator) -> None:
        versions = {"abtrain": "0.1.0", "torch": "2.10"}
        check_equal(comm, versions | ({field: value} if comm.rank else {}))

    assert all(f"{field} is" in str(error) and f"{value}' on rank 1" in str(error) for error in told(2, work))
