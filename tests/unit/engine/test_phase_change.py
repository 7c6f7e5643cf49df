"""Weights that are factored again: what ranks, momentum and residuals become."""

from __future__ import annotations

import torch.nn.functional as F

from abtrain import ABTraining, Energy, FixedRank, Phase, Recipe, WeightSync, recipes
from abtrain.comm.communicator import Communicator
from abtrain.comm.in_process import run_in_process
from abtrain.merging.carry_over import to_weight
from abtrain.recipes.factoring import Factoring
from tests.cases import adamw, batch, build


def run(comm: Communicator, recipe: Recipe) -> ABTraining:
    model = build("mlp")
    optimizer = adamw(model.parameters())
    ab = ABTraining(model, optimizer, recipe, communicator=comm)
    while not ab.finished:
        x, y = batch("mlp", comm.rank, ab.steps_done)
        F.cross_entropy(ab(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        ab.step()
    return ab


def test_refactoring_lets_ranks_fall_and_keeps_residuals_and_outer_momentum() -> None:
    def work(comm: Communicator) -> tuple[list[dict[str, int]], set[str], set[str]]:
        recipe = recipes.ab_outer(
            41,
            every=4,
            warmup_steps=8,
            refactor_every=2,
            rank_rule=Energy(0.9),
            optimizer_state="project",
            wire="int8",
            keep_dense_if_larger=False,
        )
        ab = run(comm, recipe)
        return (
            [entry["ranks"] for entry in ab.rank_history],
            set(ab._rounds.merger.momentum),
            set(ab._rounds.merger.residuals),
        )

    ranks, momentum, residuals = run_in_process(2, work)[0]
    assert len(ranks) == 5
    of_first = [entry["0.weight"] for entry in ranks]
    assert of_first == sorted(of_first, reverse=True) and of_first[-1] < of_first[0]
    assert {"0.weight.A", "0.weight.B"} <= momentum
    assert {"0.weight.A", "0.weight.B"} <= residuals


def test_a_reset_clears_outer_momentum_but_keeps_residuals() -> None:
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
        assert "0.weight" not in ab._rounds.merger.momentum and "0.weight.A" not in ab._rounds.merger.momentum
        A, B = model[0].weight_A.detach(), model[0].weight_B.detach()
        owed = to_weight(
            ab._rounds.merger.residuals["0.weight.A"], ab._rounds.merger.residuals["0.weight.B"], A.float(), B.float()
        )
        assert owed.norm() > 0

    run_in_process(2, work)


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
        assert ab._rounds.merger.residuals["0.weight"].shape == model[0].weight.shape
        return float(ab._rounds.merger.residuals["0.weight"].norm())

    assert all(owed > 0 for owed in run_in_process(2, work))
