"""Recipes as data: positions of steps, and invalid settings."""

import dataclasses
import inspect
import itertools
import math
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abtrain import recipes
from abtrain.errors import ConfigurationError, UsageError
from abtrain.recipes.factoring import Factoring
from abtrain.recipes.merges import Mean
from abtrain.recipes.phase import Phase
from abtrain.recipes.rank_rules import FixedRank, SigmaCutoff
from abtrain.recipes.recipe import Recipe
from abtrain.recipes.sync import GradientSync, WeightSync


def names(recipe: Recipe) -> list[str]:
    return [recipe.at(step).phase.name for step in range(recipe.total_steps)]


def test_ab_follows_the_papers_guideline() -> None:
    recipe = recipes.ab(1200)
    assert [(p.name, p.steps) for p in recipe.phases] == [("warmup", 240), ("group", 40), ("rebound", 10)]
    assert recipe.lr_rebound_steps == 20
    assert names(recipe)[235:300] == ["warmup"] * 5 + ["group"] * 40 + ["rebound"] * 10 + ["group"] * 10


def test_the_last_phase_is_cut_off_and_still_merges() -> None:
    recipe = recipes.ab(100, warmup_steps=10, ab_steps=40, rebound_steps=10, lr_rebound_steps=5)
    last = recipe.at(99)
    assert (last.phase.name, last.cycle, last.step_in_phase, last.steps_in_phase) == ("group", 1, 39, 40)
    shorter = recipes.ab(75, warmup_steps=10, ab_steps=40, rebound_steps=10, lr_rebound_steps=5)
    last = shorter.at(74)
    assert (last.steps_in_phase, last.last, last.merges) == (15, True, True)


def test_local_sgd_merges_every_round_and_at_the_end() -> None:
    recipe = recipes.local_sgd(50, every=20)
    assert [step for step in range(50) if recipe.at(step).merges] == [19, 39, 49]


def test_local_sgd_on_the_schedule_of_ab() -> None:
    ab = recipes.ab(1200)
    same = recipes.local_sgd(1200, every=40, warmup_steps=240, rebound_steps=10)
    assert [step for step in range(1200) if ab.at(step).merges] == [s for s in range(1200) if same.at(s).merges]


def test_a_recipe_of_groups_alone_repeats_its_phase() -> None:
    recipe = recipes.ab(9, warmup_steps=0, ab_steps=3, rebound_steps=0)
    assert [p.cycle for p in recipe.runs()] == [0, 1, 2]


@given(
    total=st.integers(1, 400),
    warmup=st.integers(0, 60),
    ab_steps=st.integers(1, 50),
    rebound=st.integers(0, 20),
)
def test_positions_tile_the_run(total: int, warmup: int, ab_steps: int, rebound: int) -> None:
    if warmup >= total:
        return
    recipe = recipes.ab(total, warmup_steps=warmup, ab_steps=ab_steps, rebound_steps=rebound)
    runs = list(recipe.runs())
    assert sum(run.steps_in_phase for run in runs) == total
    for run, after in itertools.pairwise(runs):
        assert run.first and after.step == run.step + run.steps_in_phase
        assert recipe.at(after.step - 1).last
    assert recipe.at(total - 1).last


@pytest.mark.parametrize("step", [-1, 100, 1000])
def test_a_step_outside_the_recipe(step: int) -> None:
    with pytest.raises(
        UsageError, match=rf"no step {step} in recipe 'ddp': its 100 steps are 0 to 99. .* larger total_steps"
    ):
        recipes.ddp(100).at(step)


def test_all_problems_come_at_once() -> None:
    with pytest.raises(ConfigurationError) as caught:
        recipes.ab(100, ab_steps=0, rebound_steps=-1, lr_rebound_steps=True, sigma_cutoff=float("nan"), min_dim=0)
    text = "\n".join(caught.value.problems)
    for part in (
        "'group': steps=0",
        "'rebound': steps=-1",
        "lr_rebound_steps=True",
        "sigma_cutoff=nan",
        "min_dim=0",
    ):
        assert part in text
    assert len(caught.value.problems) >= 5


def test_all_problems_of_merges_come_at_once() -> None:
    sync = WeightSync(2**53 + 1, merge="mean", wire="int5", delay=-1, fragments=0)  # type: ignore[arg-type]
    found = "\n".join(sync.problems())
    for part in (
        f"every is too large: use at most {2**53}",
        "merge='mean' is unknown",
        "unknown wire format 'int5'",
        "and fp32 takes no REPLY",
        "delay=-1",
        "fragments=0",
    ):
        assert part in found


@pytest.mark.parametrize(
    "build_recipe",
    [
        lambda: recipes.local_sgd(100, warmup_steps=90, every=20),
        lambda: recipes.ab_outer(100, warmup_steps=90, every=20, refactor_every=3),
        lambda: Recipe("x", 10, cycle=(Phase("p", 100, sync=WeightSync(50)),)),
    ],
)
def test_a_round_that_the_end_of_the_run_cuts_off(build_recipe: Any) -> None:
    with pytest.raises(ConfigurationError, match="is longer than the 10 steps that are left for it"):
        build_recipe()


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        (Phase("p", 10, trains="b"), "needs factors"),
        (
            Phase("p", 10, weights="factored", trains="a_or_b", sync=GradientSync()),
            "needs merges: use trains='b', or a WeightSync",
        ),
        (Phase("p", 10, sync=WeightSync(11)), "every=11 is longer than the phase: use at most its 10 steps"),
        (Phase("p", 10, sync=WeightSync(0)), "every=0 is too small"),
        (Phase("p", 10, weights="thin"), "'full' or 'factored'"),  # type: ignore[arg-type]
    ],
)
def test_phases_that_cannot_be(phase: Phase, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Recipe("r", 100, cycle=(phase,), factoring=Factoring(SigmaCutoff()))


@pytest.mark.parametrize("name", recipes.RECIPES)
@pytest.mark.parametrize("total_steps", ["400", 0, 4e2])
def test_a_number_of_steps_that_cannot_be_is_one_problem(name: str, total_steps: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        recipes.build(name, total_steps)
    (problem,) = caught.value.problems
    assert problem.startswith(f"recipe {name!r}: total_steps={total_steps!r} is ")


def test_a_run_that_is_too_short_for_merges_is_shown_to_ddp() -> None:
    hint = "use at most its 10 steps, or the recipe ddp, which suits runs below 300 steps"
    with pytest.raises(ConfigurationError, match=hint):
        recipes.ab_outer(10)
    with pytest.raises(ConfigurationError, match=r"use at most its 10 steps$"):
        recipes.ab(100, ab_steps=10, every=20)
    with pytest.raises(ConfigurationError, match=r"use at most its 400 steps$"):
        recipes.local_sgd(400, every=500)


def test_recipes_that_cannot_be() -> None:
    with pytest.raises(ConfigurationError, match="the cycle is empty"):
        Recipe("r", 10)
    with pytest.raises(ConfigurationError, match="leaves none of the 10 total_steps"):
        recipes.ab(10, warmup_steps=10, ab_steps=2)
    with pytest.raises(ConfigurationError, match="needs a rank rule"):
        Recipe("r", 10, cycle=(Phase("p", 5, weights="factored"),))
    with pytest.raises(ConfigurationError, match="set refactor_every to at least 1"):
        recipes.ab_outer(100, rebound_steps=10)
    with pytest.raises(ConfigurationError, match="is not a rank rule: use one"):
        recipes.ab(1000, rank_rule=SigmaCutoff)
    alone = Phase("p", 5, weights="factored", sync=None)
    with pytest.raises(
        ConfigurationError, match="phase 'p' has no sync and cannot repeat: give it a sync, or 10 steps"
    ):
        Recipe("r", 10, cycle=(alone,), factoring=Factoring(SigmaCutoff()))
    assert Recipe("r", 5, cycle=(alone,), factoring=Factoring(SigmaCutoff())).at(4).last
    with pytest.raises(ConfigurationError, match="must be the only phase"):
        Recipe("r", 10, cycle=(Phase("p", 5, sync=None), Phase("q", 5)))


def test_unknown_names_come_with_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match=r"unknown recipe 'local_sdg': did you mean 'local_sgd'\?"):
        recipes.build("local_sdg", 10)
    with pytest.raises(ConfigurationError, match=r"no option 'sigma_cutof': did you mean 'sigma_cutoff'\?"):
        recipes.build("ab", 10, sigma_cutof=0.1)


def test_every_named_recipe_builds() -> None:
    for name in recipes.RECIPES:
        assert recipes.build(name, 600).name == name


def test_ab_local_is_ab_outer_with_means_after_short_rounds() -> None:
    recipe = recipes.ab_local(600)
    options = {"every": 6, "wire": "ternary", "outer_lr": 1.0, "outer_momentum": 0.0, "factor_lr": 1.0}
    assert recipe == dataclasses.replace(recipes.build("ab_outer", 600, **options), name="ab_local")
    assert [phase.sync for phase in recipe.phases] == [WeightSync(6, Mean(), "ternary")] * 2
    assert [phase.name for phase in recipes.ab_local(600, warmup_steps=0, every=3).phases] == ["factors"]


def test_ab_no_groups_is_ab_with_one_factor_and_shared_gradients() -> None:
    recipe = recipes.ab_no_groups(600, warmup_every=2, wire="bf16")
    same = recipes.ab(600, every=0, trains="b", warmup_every=2, wire="bf16")
    assert recipe == dataclasses.replace(same, name="ab_no_groups")
    assert [(phase.name, phase.trains, phase.sync) for phase in recipe.cycle] == [
        ("low_rank", "b", GradientSync()),
        ("rebound", "all", GradientSync()),
    ]
    with pytest.raises(
        ConfigurationError, match="phase 'low_rank': trains='a_or_b' needs merges: use trains='b', or a WeightSync"
    ):
        recipes.ab(600, every=0)
    with pytest.raises(ConfigurationError, match="every=False is not a whole number"):
        recipes.ab(600, every=False)


@pytest.mark.parametrize(
    ("name", "base", "fixed", "defaults"),
    [
        (
            "ab_local",
            "ab_outer",
            {"outer_lr", "outer_momentum"},
            {"every": 6, "wire": "ternary", "factor_lr": 1.0},
        ),
        ("ab_no_groups", "ab", {"every", "trains", "merge", "temperature"}, {}),
    ],
)
def test_a_preset_takes_the_options_of_its_recipe_but_the_fixed_ones(
    name: str, base: str, fixed: set[str], defaults: dict[str, Any]
) -> None:
    assert recipes.options_of(base).keys() - recipes.options_of(name).keys() == fixed
    shown, original = (inspect.signature(recipes.RECIPES[one]).parameters for one in (name, base))
    changed = {one: p.default for one, p in shown.items() if p != original[one]}
    assert changed == defaults
    assert recipes.RECIPES[name].__name__ == name and "name" not in recipes.options_of(base)
    for option in fixed:
        for build in (recipes.RECIPES[name], partial(recipes.build, name)):
            with pytest.raises(ConfigurationError, match=f"recipe '{name}' has no option '{option}'"):
                build(600, **{option: 1})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ab_no_groups", {"wire": "bogus"}, "unknown wire format 'bogus'"),
        ("ab_outer", {"warmup_wire": "int5", "warmup_every": 0}, "unknown wire format 'int5'"),
        ("ab_outer", {"refactor_every": -1}, "refactor_every=-1 is too small"),
        ("ab_local", {"warmup_delay": 6}, "phase 'warmup': delay=6 is not smaller than every=6"),
        ("ab_local", {"warmup_delay": -1, "warmup_steps": 0}, "warmup_delay=-1 is too small"),
        ("ab_local", {"rebound_every": -1}, "rebound_every=-1 is too small"),
        ("ab_local", {"every": 0}, "recipe 'ab_local': phase 'factors': every=0 is too small"),
        ("ab_local", {"warmup_steps": 9999}, "leaves none of the 600 total_steps"),
        ("local_sgd", {"temperature": -1.0}, "temperature=-1.0 is not a finite number above 0"),
        ("local_sgd", {"merge": []}, r"unknown merge rule \[\]"),
        ("local_sgd", {"warmup_every": -3}, "warmup_every=-3 is too small"),
        ("diloco", {"outer_lr": 10**400}, "outer_lr=1000+ is not a finite number"),
        ("ab", {"sigma_cutoff": math.nan, "rank_rule": "fixed:2"}, "sigma_cutoff=nan is not a finite number"),
        ("ddp", {"wire": "powersgd"}, "unknown wire format 'powersgd' for gradients"),
    ],
)
def test_bad_values_are_reported_even_where_they_are_ignored(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        recipes.build(name, 600, **options)


@pytest.mark.parametrize("name", recipes.RECIPES)
@pytest.mark.parametrize("steps", [10**400, None, "5", 0, -1, 2.5])
def test_an_invalid_number_of_steps_is_reported(name: str, steps: Any) -> None:
    with pytest.raises(ConfigurationError, match="total_steps"):
        recipes.build(name, steps)


@pytest.mark.parametrize("option", ["every", "warmup_steps", "refactor_every", "rebound_steps"])
@pytest.mark.parametrize("value", ["5", 10**400, 2.5])
def test_an_invalid_number_is_reported(option: str, value: Any) -> None:
    with pytest.raises(ConfigurationError):
        recipes.ab_outer(600, **{option: value})


def test_the_phase_that_needs_losses_is_known() -> None:
    assert recipes.ab(600, merge="weighted").phase_weighted_by_loss == "group"
    assert recipes.ab(600).phase_weighted_by_loss is None


@pytest.mark.parametrize(("k", "stays"), [(1, False), (18, False), (19, True), (40, True)])
def test_a_weight_stays_dense_unless_its_factors_save_a_tenth(k: int, stays: bool) -> None:
    """At rank 20, factors of a 40 x 40 weight have as many numbers as the weight."""
    assert Factoring(FixedRank(k), keep_dense_if_larger=True).stays_dense(k, 40, 40) is stays
    assert not Factoring(FixedRank(k)).stays_dense(k, 40, 40)
