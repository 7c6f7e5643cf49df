"""Phases that end by measurement, weights that are factored once they have settled, and factoring anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from abtrain import ABTraining, Energy, FixedRank, Phase, Recipe, WeightSync, recipes
from abtrain.comm.communicator import Communicator
from abtrain.comm.in_process import run_in_process
from abtrain.engine.spectrum_watch import Switch
from abtrain.errors import ConfigurationError
from abtrain.lowrank.tangent import to_factors, to_weight
from abtrain.recipes.factoring import Factoring
from abtrain.recipes.phase import Until
from tests.cases import adamw, batch, build


def run(comm: Communicator, recipe: Recipe) -> ABTraining:
    model = build("mlp")
    optimizer = adamw(model.parameters())
    ab = ABTraining(model, optimizer, recipe, communicator=comm)
    ab.phases = []  # type: ignore[attr-defined]
    while not ab.finished:
        x, y = batch("mlp", comm.rank, ab.steps_done)
        ab.phases.append(ab.position.phase.name)  # type: ignore[attr-defined,union-attr]
        F.cross_entropy(ab(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        ab.step()
    return ab


def options(**more: Any) -> dict[str, Any]:
    return {"every": 4, "mean_steps": 12, "mean_every": 2, "warmup_steps": 12, "rank_rule": FixedRank(3), **more}


def test_phases_end_at_the_first_merge_that_measures_little_enough() -> None:
    def work(comm: Communicator) -> tuple[list[str], list[dict[str, Any]], Recipe]:
        ab = run(comm, recipes.ab_outer(60, **options(agreement_below=2.0, drift_below=10.0)))
        return ab.phases, ab.decisions, ab.recipe  # type: ignore[attr-defined]

    results = run_in_process(3, work)
    phases, decisions, recipe = results[0]
    # The agreement is always below 2; a drift needs two merges to be known.
    assert phases == ["mean"] * 2 + ["warmup"] * 4 + ["factors"] * 54
    assert [(d["step"], d["ended"], d["measure"]) for d in decisions] == [
        (2, "mean", "agreement"),
        (6, "warmup", "spectrum_drift"),
    ]
    assert all(result == results[0] for result in results)
    # What was decided is data: the same recipe without measurement.
    assert [recipe.at(step).phase.name for step in range(60)] == phases
    assert not any(phase.until for phase in recipe.phases)


def test_a_measure_that_never_falls_leaves_the_lengths_as_they_were() -> None:
    def work(comm: Communicator) -> list[str]:
        return run(comm, recipes.ab_outer(60, **options(drift_below=1e-9))).phases  # type: ignore[attr-defined,no-any-return]

    assert run_in_process(2, work)[0] == ["mean"] * 12 + ["warmup"] * 12 + ["factors"] * 36


@pytest.mark.parametrize("wire", ["fp32", "int3", "ternary", "lowrank:2", "lowrank:2:int8"])
def test_the_agreement_is_that_of_the_changes_whatever_the_wire(wire: str) -> None:
    def work(comm: Communicator, same: bool) -> tuple[float, float]:
        """As measured, and the mean cosine of the workers' own changes."""
        model = build("mlp")
        optimizer = adamw(model.parameters())
        recipe = recipes.diloco(8, every=4, mean_steps=4, mean_every=4, agreement_below=1e-9, wire=wire)
        ab = ABTraining(model, optimizer, recipe, communicator=comm)
        start = torch.cat([p.detach().flatten() for p in model.parameters()])
        while ab.steps_done < 4:
            x, y = batch("mlp", 0 if same else comm.rank, ab.steps_done)
            F.cross_entropy(ab(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            changed = torch.cat([p.detach().flatten() for p in model.parameters()]) - start
            ab.step()
        assert ab._rounds.outcome is not None and ab._rounds.outcome.agreement is not None
        changes = comm.all_gather(changed)
        products = changes @ changes.T
        n = len(changes)
        truth = (products.sum() - products.trace()) / ((n - 1) * products.trace())
        return ab._rounds.outcome.agreement, float(truth)

    assert run_in_process(3, lambda comm: work(comm, True))[0][0] == pytest.approx(1.0)
    measured, truth = run_in_process(3, lambda comm: work(comm, False))[0]
    assert 0 < truth < 0.9
    assert measured == pytest.approx(truth, abs=0.05)


def test_a_weight_stays_dense_until_its_spectrum_has_settled() -> None:
    def work(comm: Communicator, settled: float) -> tuple[list[int], str]:
        recipe = recipes.ab_outer(24, **options(mean_steps=0, settled=settled))
        ab = run(comm, recipe)
        return [len(entry["ranks"]) for entry in ab.rank_history], str(ab.describe())

    few, text = run_in_process(2, lambda comm: work(comm, 1e-9))[0]
    assert few == [0]
    assert "its spectrum still drifts" in text
    assert run_in_process(2, lambda comm: work(comm, 1.0))[0][0] == [3]


def test_a_weight_that_stayed_dense_is_factored_once_it_has_settled(caplog: pytest.LogCaptureFixture) -> None:
    """Its spectrum is followed from merge to merge also while others are factors."""
    caplog.set_level("INFO", logger="abtrain")

    def work(comm: Communicator, settled: float) -> Any:
        settings = options(mean_steps=0, settled=settled, refactor_every=2, keep_dense_if_larger=False)
        return run(comm, recipes.ab_outer(60, **settings)).rank_history

    never = run_in_process(2, lambda comm: work(comm, 1e-9))[0]
    assert [entry["ranks"] for entry in never] == [{}] * len(never)
    drifts = [float(entry["dense"]["0.weight"].split(" by ")[1].split()[0]) for entry in never]
    assert len(set(drifts)) == len(drifts) > 2
    # Between the first drift and the smallest: dense at first, and factors later.
    then = run_in_process(2, lambda comm: work(comm, (drifts[0] + min(drifts)) / 2))[0]
    assert "0.weight" in then[0]["dense"]
    assert any("0.weight" in entry["ranks"] for entry in then)
    assert "step 12: 0.weight stays dense: its spectrum still drifts" in caplog.text


@pytest.mark.parametrize(
    "build_recipe",
    [
        lambda: recipes.ab(300, settled=0.1),
        lambda: recipes.ab_outer(300, settled=0.1, warmup_every=0),
        lambda: recipes.ab_outer(300, settled=0.1, warmup_delay=3),
        lambda: recipes.ab_outer(300, settled=0.1, warmup_steps=20),
    ],
)
def test_settled_needs_merges_to_be_measured_at(build_recipe: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"settled=0\.1 is measured from one merge"):
        build_recipe()
    recipes.ab(300, settled=0.1, warmup_every=10)


def test_a_weight_that_was_factored_is_measured_from_what_its_factors_made_of_it() -> None:
    """What the cut took from its spectrum is no drift."""

    def work(comm: Communicator) -> list[dict[str, Any]]:
        recipe = recipes.ab_outer(
            72, every=4, warmup_steps=12, refactor_every=2, rebound_steps=4, rank_rule=FixedRank(2), settled=0.5
        )
        return run(comm, recipe).rank_history

    history = run_in_process(2, work)[0]
    assert len(history) == 5
    assert all(set(entry["ranks"]) == set(history[0]["ranks"]) for entry in history)
    assert history[0]["ranks"]


def test_nothing_is_measured_once_no_weight_will_be_factored(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    observe = Switch.observe

    def spy(self: Switch, matrices: Any, *rest: Any) -> None:
        observe(self, lambda: measured.append(rest[1].step) or matrices(), *rest)  # type: ignore[func-returns-value]

    monkeypatch.setattr(Switch, "observe", spy)
    recipe = recipes.ab_outer(40, **options(mean_steps=0, settled=1e-9))
    run_in_process(2, lambda comm: run(comm, recipe).steps_done)
    assert measured == [4, 8, 12]


def test_a_phase_that_ends_early_may_leave_a_later_one_less_than_a_round() -> None:
    recipe = recipes.ab_outer(
        65,
        every=5,
        warmup_steps=40,
        drift_below=1e9,
        refactor_every=10,
        rebound_steps=20,
        rebound_every=10,
        rank_rule=FixedRank(3),
    )
    ab = run_in_process(2, lambda comm: run(comm, recipe))[0]
    assert ab.decisions[0]["step"] == 10
    assert ab.phases[-5:] == ["rebound"] * 5


def test_factoring_anew_lets_ranks_fall_and_keeps_what_is_owed_and_the_outer_momentum() -> None:
    def work(comm: Communicator) -> tuple[list[dict[str, int]], set[str], set[str]]:
        recipe = recipes.ab_outer(
            41, every=4, warmup_steps=8, refactor_every=2, rank_rule=Energy(0.9), optimizer_state="project", wire="int8"
        )
        ab = run(comm, recipe)
        return [entry["ranks"] for entry in ab.rank_history], set(ab._merger.momentum), set(ab._merger.residuals)

    ranks, momentum, residuals = run_in_process(2, work)[0]
    assert len(ranks) == 5
    of_first = [entry["0.weight"] for entry in ranks]
    assert of_first == sorted(of_first, reverse=True) and of_first[-1] < of_first[0]
    assert {"0.weight.A", "0.weight.B"} <= momentum
    assert {"0.weight.A", "0.weight.B"} <= residuals


def test_a_reset_starts_outer_momentum_anew_but_forgets_no_residual() -> None:
    def work(comm: Communicator) -> None:
        model = build("mlp")
        optimizer = adamw(model.parameters())
        settings = {"rank_rule": FixedRank(3), "wire": "int4", "optimizer_state": "reset"}
        recipe = recipes.ab_outer(20, every=4, warmup_steps=8, **settings)
        ab = ABTraining(model, optimizer, recipe, communicator=comm)
        while ab.steps_done < 8:
            x, y = batch("mlp", comm.rank, ab.steps_done)
            F.cross_entropy(ab(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            ab.step()
        assert "0.weight" not in ab._merger.momentum and "0.weight.A" not in ab._merger.momentum
        A, B = model[0].weight_A.detach(), model[0].weight_B.detach()
        owed = to_weight(ab._merger.residuals["0.weight.A"], ab._merger.residuals["0.weight.B"], A.float(), B.float())
        assert owed.norm() > 0

    run_in_process(2, work)


@given(st.integers(0, 2**16), st.integers(1, 4))
def test_factors_say_the_part_of_a_change_that_they_can(seed: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    A, B = draw(9, k), draw(k, 6)
    sayable = to_weight(draw(9, k), draw(k, 6), A, B)
    torch.testing.assert_close(to_weight(*to_factors(sayable, A, B), A, B), sayable, rtol=1e-6, atol=1e-6)
    E = draw(9, 6)
    said = to_weight(*to_factors(E, A, B), A, B)
    # A projection: what is left over is orthogonal to all that factors can say.
    assert abs(((E - said) * sayable).sum()) < 1e-6 * E.norm() * sayable.norm()


def test_until_needs_the_prologue_and_whole_merges() -> None:
    until = Until("agreement", 0.5)
    with pytest.raises(ConfigurationError, match="use until in the prologue only"):
        Recipe("r", 40, cycle=(Phase("p", 20, sync=WeightSync(5), until=until),))
    with pytest.raises(ConfigurationError, match="use a WeightSync without delay and fragments"):
        Recipe("r", 40, (Phase("q", 10, until=until),), (Phase("p", 20, sync=WeightSync(5)),))
    with pytest.raises(ConfigurationError, match="agreement below=-1 is not a finite number above 0"):
        recipes.diloco(40, mean_steps=10, mean_every=5, agreement_below=-1)
    with pytest.raises(ConfigurationError, match="give refactor_every"):
        recipes.ab_outer(100, rebound_steps=10)


def test_small_weights_stay_dense_by_their_share() -> None:
    recipe = recipes.ab(30, warmup_steps=2, ab_steps=4, min_share=0.2)
    text = str(ABTraining(model := build("mlp"), adamw(model.parameters()), recipe).describe())
    assert "14.25%" not in text and "below min_share=0.2" in text


def test_what_is_owed_of_one_factor_alone_follows_the_weight() -> None:
    """B alone is trained, so A has no residual when the two become a weight again."""

    def work(comm: Communicator) -> float:
        low = Phase("low", 4, "factored", "b", WeightSync(2, wire="int4"))
        full = Phase("full", 4, sync=WeightSync(4, wire="int4"))
        recipe = Recipe("r", 12, (Phase("start", 4),), (low, full), Factoring(FixedRank(3)))
        model = build("mlp")
        optimizer = adamw(model.parameters())
        ab = ABTraining(model, optimizer, recipe, communicator=comm)
        while ab.steps_done < 8:
            x, y = batch("mlp", comm.rank, ab.steps_done)
            F.cross_entropy(ab(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            ab.step()
        assert ab._merger.residuals["0.weight"].shape == model[0].weight.shape
        return float(ab._merger.residuals["0.weight"].norm())

    assert all(owed > 0 for owed in run_in_process(2, work))
