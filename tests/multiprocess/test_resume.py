"""Resumed on real Gloo ranks: the bits of the run that was never stopped."""

from __future__ import annotations

import pytest

from abtrain.comm.communicator import Communicator
from tests.gloo import run_gloo
from tests.unit.engine.test_saved_state import RECIPES, stopped_and_resumed


def digest(comm: Communicator, name: str, stops: tuple[int, ...]) -> str:
    return str(stopped_and_resumed(comm, RECIPES[name], "adamw", stops)[0])


# Three workers add up gradients in an order that depends on DDP's buckets.
@pytest.mark.parametrize(("name", "workers"), [("ab", 3), ("ab_outer", 2), ("ab_outer refactored", 3), ("ab_outer", 3)])
def test_resumed_in_every_phase(name: str, workers: int) -> None:
    steps = RECIPES[name].total_steps
    whole = run_gloo(workers, digest, name, (), timeout=240)
    for first in (1, 2):
        resumed = run_gloo(workers, digest, name, tuple(range(first, steps, 4)), timeout=240)
        assert resumed == whole
