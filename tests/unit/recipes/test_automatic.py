"""A recipe that chooses by what is measured."""

from __future__ import annotations

from dataclasses import replace

import pytest

from abtrain import recipes
from abtrain.errors import ConfigurationError
from abtrain.recipes.automatic import MOST_WAITING, Circumstances, Row, choose, chosen, completed, frontier, in_words
from abtrain.recipes.recipe import Recipe
from abtrain.recipes.sync import GradientSync


def here(megabits: float, parameters: float = 1e6, step: float = 0.05, shares_gradients: bool = True) -> Circumstances:
    """Four workers, each on a link of this rate."""
    return Circumstances(step, 1.5 * 32 * parameters / (1e6 * megabits), 1e-4, shares_gradients=shares_gradients)


def test_a_fast_link_is_used_at_every_step() -> None:
    row = choose(here(100_000))
    assert row.options == {"every": 1, "wire": "fp32", "delay": 0}
    assert choose(here(100_000, shares_gradients=False)).every > 1


def test_slower_links_carry_less() -> None:
    shares = [choose(here(megabits)).share for megabits in (100_000, 1000, 100, 20, 5, 0.01)]
    assert shares == sorted(shares, reverse=True) and shares[-1] < shares[0] / 300


def test_of_the_rows_that_are_fast_enough_the_one_with_the_least_loss_is_taken() -> None:
    for megabits in (100_000, 1000, 100, 20, 5):
        row = choose(here(megabits))
        better = [one for one in frontier() if one.above < row.above]
        assert row.waiting(here(megabits)) <= MOST_WAITING
        assert all(one.waiting(here(megabits)) > MOST_WAITING for one in better)


def test_a_link_that_is_too_slow_for_all_gets_the_row_that_waits_least() -> None:
    slow = here(1e-4)
    assert choose(slow).waiting(slow) == min(row.waiting(slow) for row in frontier())


def test_a_run_has_several_rounds() -> None:
    slow = here(1e-4)
    assert choose(slow).every == max(row.every for row in frontier()) > 10
    assert choose(replace(slow, steps=100)).every <= 10
    assert choose(replace(slow, steps=3, shares_gradients=False)).every == 6


def test_a_budget_bounds_the_bytes() -> None:
    assert choose(here(100_000), budget=0.5).wire == "bf16"
    assert all(choose(here(100_000), budget).share <= budget for budget in (0.3, 0.01, 0.005))


def test_hidden_merges_wait_only_for_what_steps_do_not_cover() -> None:
    row = Row(every=20, wire="ternary", delay=10, bits=1.6, above=0.0)
    assert row.waiting(Circumstances(step=0.1, reduce=20 * 0.9)) == 0.0  # 0.45 s for each half, behind five steps
    assert row.waiting(Circumstances(step=0.1, reduce=20 * 1.2)) == pytest.approx(0.2 / 20 / (0.2 / 20 + 0.1))


def test_workers_of_uneven_steps_wait_for_each_other_less_often() -> None:
    rows = [Row(every, "ternary", 0, 1.6, 0.0) for every in (4, 16)]
    shares = [row.waiting(Circumstances(step=0.1, reduce=0.0, uneven=0.02)) for row in rows]
    assert shares == [pytest.approx(wait / (0.1 + wait)) for wait in (0.01, 0.005)]
    assert Row(1, "fp32", 0, 32, 0.0).waiting(Circumstances(0.1, 0.0, uneven=0.02)) == pytest.approx(0.02 / 0.12)


def test_gradients_hide_behind_the_backward_pass_of_accelerators_alone() -> None:
    row = Row(1, "fp32", 0, 32, 0.0)
    assert row.waiting(Circumstances(step=0.1, reduce=0.05)) == 0
    assert row.waiting(Circumstances(step=0.1, reduce=0.05, hides=0.0)) == pytest.approx(0.05 / 0.15)


def test_what_a_merge_computes_is_not_hidden() -> None:
    row = Row(every=20, wire="ternary", delay=10, bits=1.6, above=0.0)
    assert row.waiting(Circumstances(step=0.1, reduce=0.0, computing=0.2)) == pytest.approx(0.01 / 0.11)


def test_rows_are_recipes_without_rebuilding_what_has_run() -> None:
    whole = recipes.auto(2000)
    assert whole.choice is not None and whole.chooses_at == 20
    for row in frontier():
        recipe = completed(whole, row.options)
        assert recipe.choice is None and recipe.prologue == whole.prologue and recipe.total_steps == 2000
        assert chosen(recipe) == row.options
        assert recipes.from_text(recipes.write("auto", row.options), 2000) == recipe


def test_short_runs_are_data_parallel() -> None:
    recipe: Recipe = recipes.auto(9)
    assert recipe.choice is None and isinstance(recipe.cycle[0].sync, GradientSync)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 20}, "every given without wire, delay: give all three, or none"),
        ({"budget": 1e-9}, "is not a number of at least .* the smallest share"),
        ({"budget": float("nan")}, "is not a number of at least"),
        ({"every": 1, "wire": "bf16", "delay": 2}, "delay=2 has no effect with every=1"),
        ({"every": 1, "wire": "ternary", "delay": 0}, "unknown wire format 'ternary' for gradients"),
        ({"every": 20, "wire": "ternary", "delay": 20}, "delay=20 is not smaller than every=20"),
    ],
)
def test_bad_options_are_told(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        recipes.build("auto", 2000, **options)


def test_the_choice_is_told_with_its_reasons() -> None:
    where = here(100)
    text = in_words(choose(where), where)
    assert "a step takes 50 ms" in text and "adding up all parameters between groups would take 480 ms" in text
