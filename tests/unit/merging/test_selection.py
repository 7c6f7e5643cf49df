"""Who trains which factor."""

from typing import get_args

import pytest

from abtrain import recipes
from abtrain.comm.topology import Topology
from abtrain.commands.plan.payload import idle_factors
from abtrain.merging.selection import trained_by, trained_factors
from abtrain.recipes.recipe import Position
from abtrain.recipes.sync import Trains

SIX_IN_PAIRS = Topology(6, 2)


def factored(trains: Trains, round_: int = 0) -> Position:
    """Returns a position in a group phase with rounds of 2 steps."""
    return recipes.ab(40, warmup_steps=4, ab_steps=8, every=2, rebound_steps=4, trains=trains).at(4 + 2 * round_)


@pytest.mark.parametrize(
    ("trains", "round_", "by_rank"),
    [
        ("all", 0, ["all"] * 6),
        ("b", 0, ["B"] * 6),
        ("a_or_b", 0, ["A"] * 4 + ["B"] * 2),
        ("a_then_b", 0, ["A"] * 6),
        ("a_then_b", 1, ["B"] * 6),
    ],
)
def test_who_trains_what(trains: Trains, round_: int, by_rank: list[str]) -> None:
    assert [trained_factors(factored(trains, round_), SIX_IN_PAIRS, rank) for rank in range(6)] == by_rank


def test_roles_depend_on_the_factor() -> None:
    by_factor = trained_by(factored("a_or_b"), SIX_IN_PAIRS, ["1.weight.A", "1.weight.B"])
    assert by_factor == {"1.weight.A": [True] * 4 + [False] * 2, "1.weight.B": [False] * 4 + [True] * 2}
    assert trained_by(factored("all"), SIX_IN_PAIRS, ["1.weight.A"]) == {}


@pytest.mark.parametrize("trains", get_args(Trains))
def test_factors_that_nobody_trains_are_idle(trains: Trains) -> None:
    everybody = {"all": set(), "b": {"A"}, "a_or_b": set(), "a_then_b": {"B"}}
    assert idle_factors(factored(trains), SIX_IN_PAIRS, range(6)) == everybody[trains]
    alone = {"all": set(), "b": {"A"}, "a_or_b": {"A"}, "a_then_b": {"B"}}
    assert idle_factors(factored(trains), SIX_IN_PAIRS, [5]) == alone[trains]
