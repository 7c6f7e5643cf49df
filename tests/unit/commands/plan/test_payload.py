"""The prediction against the meter of the real engine, byte by byte."""

from __future__ import annotations

from collections import Counter
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from abtrain import ABTraining, Energy, FixedRank, GradientSync, Phase, Recipe, SigmaCutoff, WeightSync, recipes
from abtrain.comm.communicator import Communicator
from abtrain.comm.in_process import run_in_process
from abtrain.comm.topology import Topology
from abtrain.commands.plan.payload import predict
from abtrain.commands.plan.shapes import assumed_shapes, ranks_for, shapes_of
from abtrain.commands.plan.stretches import turns
from abtrain.commands.plan.totals import over_links, payload, payload_ratio
from abtrain.consistency.optimizers import OptimizerShape
from abtrain.merging.wires.wire import make_wire
from abtrain.recipes.factoring import Factoring
from abtrain.recipes.merges import Mean
from abtrain.recipes.recipe import Position
from abtrain.recipes.sync import GradientWire, Trains
from abtrain.recipes.wires import CodeName
from tests.cases import SCHEDULE, adamw, sgd
from tests.gloo import run_gloo

RANK_2 = {"rank_rule": FixedRank(2)}
RANK_4 = {"rank_rule": FixedRank(4)}
"""Factors that are large enough to be sent as factors of their own."""
LOCAL = {"every": 4}
SHORT = {**SCHEDULE, **RANK_4}
OUTER = {**LOCAL, **RANK_4, "warmup_steps": 8}
WIRES = (*get_args(CodeName), "ternary:int3", "auto")
AROUND = {"every": 4, "warmup_steps": 3, "rebound_steps": 2}
BASES: dict[str, dict[str, Any]] = {"local_sgd": AROUND, "diloco": LOCAL, "ab": SHORT, "ab_outer": OUTER}
PACES = ({"delay": 1}, {"delay": 3}, {"fragments": 2}, {"fragments": 4}, {"delay": 3, "fragments": 3})
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("ddp", {}),
    "solo": ("solo", {}),
    "local_sgd": ("local_sgd", LOCAL),
    "local_sgd around": ("local_sgd", AROUND),
    **{f"{name} {wire}": (name, {**base, "wire": wire}) for name, base in BASES.items() for wire in WIRES},
    **{
        f"{name} {wire} {pace}": (name, {**BASES[name], **pace, "wire": wire})
        for name, wire in (("local_sgd", "fp32"), ("diloco", "int8"), ("ab_outer", "int4"))
        for pace in PACES
    },
    "local_sgd weighted": ("local_sgd", {**LOCAL, "merge": "weighted", "delay": 2}),
    "local_sgd around in merges": ("local_sgd", {**AROUND, "warmup_every": 2, "rebound_every": 1}),
    "ab": ("ab", {**SCHEDULE, **RANK_2}),
    "ab projecting": ("ab", {**SCHEDULE, **RANK_2, "optimizer_state": "project"}),
    "ab shared": ("ab", {**SCHEDULE, **RANK_2, "svd": "shared"}),
    "ab by cutoff": ("ab", {**SCHEDULE, "sigma_cutoff": 0.4}),
    "ab with dense weights": ("ab", {**SCHEDULE, "rank_rule": Energy(0.8), "keep_dense_if_larger": True}),
    "ab_no_groups": ("ab_no_groups", {**SCHEDULE, **RANK_2}),
    "ab in turns": ("ab", {**SHORT, "ab_steps": 5, "every": 2, "trains": "a_then_b"}),
    "ab in turns projecting": (
        "ab",
        {**SHORT, "ab_steps": 12, "every": 2, "trains": "a_then_b", "optimizer_state": "project", "wire": "int8"},
    ),
    "ab in turns from the start": (
        "ab",
        {**SHORT, "warmup_steps": 0, "ab_steps": 3, "trains": "a_then_b", "optimizer_state": "project"},
    ),
    "ab of B alone projecting": ("ab", {**SHORT, "warmup_every": 2, "trains": "b", "optimizer_state": "project"}),
    "ab of B alone from the start": (
        "ab",
        {**SHORT, "warmup_steps": 0, "ab_steps": 3, "trains": "b", "optimizer_state": "project"},
    ),
    "ab_local": ("ab_local", {**OUTER, "refactor_every": 2}),
    "ab of those who trained": ("ab", {**SHORT, "merge": "trained_only", "every": 3}),
    "ab in merges": ("ab", {**SHORT, "warmup_every": 2, "rebound_every": 1, "wire": "int4"}),
    "ab_no_groups in merges": ("ab_no_groups", {**SHORT, "warmup_every": 2, "rebound_every": 2, "wire": "bf16"}),
    "ab_outer refactored": ("ab_outer", {**OUTER, "refactor_every": 1}),
    "ab_outer refactored after merges": (
        "ab_outer",
        {**OUTER, "warmup_steps": 4, "refactor_every": 1, "rebound_steps": 2, "rebound_every": 1},
    ),
    "ab_outer refactored after ddp": (
        "ab_outer",
        {**OUTER, "warmup_steps": 4, "refactor_every": 1, "rebound_steps": 2, "rebound_every": 0, "delay": 2},
    ),
    "ab_outer after ddp": ("ab_outer", {**OUTER, "warmup_every": 0}),
    "ab_outer all hidden": ("ab_outer", {**OUTER, "delay": 2, "warmup_delay": 3, "warmup_every": 4}),
    "ab_outer after bf16": ("ab_outer", {**OUTER, "warmup_wire": "bf16"}),
    "ab_outer without a preconditioner": ("ab_outer", {**OUTER, "damping": 0.0}),
    "ab_outer excluding": ("ab_outer", {**LOCAL, **RANK_2, "exclude": ("0.*",), "wire": "int8"}),
}


def norm_net(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Convolutions, running statistics, a counter, a frozen weight and a wide enough Linear."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 16, 20), nn.Linear(20, 5)]
        model = nn.Sequential(*layers).to(dtype)
    model[4].weight.requires_grad_(False)
    return model


def run(comm: Communicator, model: nn.Module, recipe: Recipe, optimizer: Any = adamw) -> tuple[Any, Any]:
    """Returns the payload of a whole run, and the ranks of every decomposition."""
    opt = optimizer([p for p in model.parameters() if p.requires_grad])
    ab = ABTraining(model, opt, recipe, communicator=comm)
    dtype = next(model.parameters()).dtype
    for step in range(recipe.total_steps):
        generator = torch.Generator().manual_seed(100 * step + comm.rank)
        x = torch.randn(6, 2, 6, 6, generator=generator).to(dtype)
        loss = F.cross_entropy(ab(x).float(), torch.randint(0, 5, (6,), generator=generator))
        loss.backward()
        opt.step()
        opt.zero_grad()
        ab.step(loss)
    assert ab.recipe == recipe
    return comm.meter.payload(), [entry["ranks"] for entry in ab.rank_history]


def compare(recipe: Recipe, workers: int, group_size: int = 1, make: Any = norm_net, **options: Any) -> None:
    models = [make() for _ in range(workers)]
    shapes = shapes_of(models[0], recipe.factoring)
    optimizer = options.get("optimizer", adamw)
    results = run_in_process(workers, lambda comm: run(comm, models[comm.rank], recipe, optimizer), group_size)
    topology = Topology(workers, group_size)
    state = OptimizerShape(1, 0) if optimizer is sgd else OptimizerShape()
    for rank, (counted, ranks) in enumerate(results):
        stretches = predict(recipe, shapes, topology, ranks, state, rank)
        predicted = payload(stretches, topology, rank)
        if group_size == 1 or recipe.factoring is None:
            assert predicted == counted
        assert predicted["between_groups"] == counted["between_groups"]
        assert 0.75 * counted["within_groups"] <= predicted["within_groups"] <= counted["within_groups"]
        assert sum(stretch.steps for stretch in stretches) == recipe.total_steps


@pytest.mark.parametrize("case", CASES)
def test_every_recipe_sends_what_is_predicted(case: str) -> None:
    name, options = CASES[case]
    compare(recipes.build(name, 17, **options), 3)


GROUPED = (
    *("ddp", "local_sgd around", "diloco int4", f"diloco int8 {PACES[-1]}", "ab", "ab projecting"),
    *("ab in turns projecting", "ab_outer int4"),
)


@pytest.mark.parametrize("case", GROUPED)
@pytest.mark.parametrize(("workers", "group_size"), [(4, 2), (2, 2), (1, 1)])
def test_groups_too(case: str, workers: int, group_size: int) -> None:
    name, options = CASES[case]
    compare(recipes.build(name, 17, **options), workers, group_size)


@pytest.mark.parametrize("case", ["ab", "ab with dense weights", "ab_outer refactored"])
@pytest.mark.parametrize(("workers", "group_size"), [(4, 2), (3, 3), (2, 1)])
def test_groups_that_share_decompositions(
    case: str, workers: int, group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("abtrain.consistency.factors.SHARED_FROM", 1)
    name, options = CASES[case]
    compare(recipes.build(name, 17, **options), workers, group_size)


def test_shared_decompositions_add_nothing_between_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, topology, bytes_sent = recipes.build("ab", 17, **SHORT), Topology(4, 2), []
    for least in (1, 10**9):
        monkeypatch.setattr("abtrain.consistency.factors.SHARED_FROM", least)
        shapes = shapes_of(norm_net(), recipe.factoring)
        bytes_sent.append(payload(predict(recipe, shapes, topology, ranks_for(shapes, 1.5)), topology))
    shared, each = bytes_sent
    assert shared["between_groups"] == each["between_groups"]
    assert shared["within_groups"] > each["within_groups"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", ["ddp", "local_sgd around", "ab", "diloco int8", "diloco ternary", "ab_outer fp32"])
def test_other_dtypes_too(case: str, dtype: torch.dtype) -> None:
    name, options = CASES[case]
    compare(recipes.build(name, 13, **options), 2, make=lambda: norm_net(dtype))


def test_another_optimizer_levels_less() -> None:
    compare(recipes.local_sgd(9, every=3, warmup_steps=2, rebound_steps=1), 2, optimizer=sgd)


def test_merges_of_more_than_one_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("abtrain.merging.wires.direct.CAPACITY", 4096)
    compare(recipes.diloco(4, every=2, wire="int8"), 3)


def test_a_recipe_of_ones_own() -> None:
    settings = Factoring(SigmaCutoff(0.3))
    together = Phase("together", 2, "factored", "b", WeightSync(2, wire="int8"))
    compare(Recipe("own", 11, (Phase("first", 3, sync=WeightSync(2)),), (together, Phase("full", 1)), settings), 4, 2)


def _gradient_wire(comm: Communicator, wire: str) -> Any:
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 40), nn.Linear(40, 5), nn.BatchNorm1d(5))
    sync = GradientSync(wire, rank=3)  # type: ignore[arg-type]  # parametrized
    return run(comm, model, Recipe("one", 5, cycle=(Phase("full", 5, sync=sync),)))[0]


@pytest.mark.parametrize("wire", get_args(GradientWire))
def test_gradients_of_every_wire(wire: GradientWire) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 40), nn.Linear(40, 5), nn.BatchNorm1d(5))
    recipe = Recipe("one", 5, cycle=(Phase("full", 5, sync=GradientSync(wire, rank=3)),))
    counted = run_gloo(2, _gradient_wire, wire, timeout=240)[0]
    assert counted["by_phase"]["full"] > 0
    predicted = payload(predict(recipe, shapes_of(model), Topology(2)), Topology(2))
    assert predicted["by_phase"]["full"] == counted["by_phase"]["full"]


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("name", WIRES)
def test_a_wire_stops_as_often_as_it_says(name: str, workers: int) -> None:
    def stops(comm: Communicator) -> int:
        return sum(1 for _ in make_wire(name, workers).average({"w": torch.ones(8, 8)}, comm))

    assert run_in_process(workers, stops)[0] == make_wire(name, workers).stages(workers)


def test_a_worker_sends_about_as_much_however_many_they_are() -> None:
    numbers = [torch.empty(1_000_000, device="meta")]

    def sent(workers: int) -> int:
        """With its own average passed on to each of the others."""
        calls = [call for stage in make_wire("auto", workers).sends(numbers, workers) for call in stage]
        return sum(call.nbytes * (1 if call.call == "exchange" else workers - 1) for call in calls)

    two = sent(2)
    assert [sent(workers) / two for workers in (4, 8)] == pytest.approx([1.15, 1.04], abs=0.01)


def test_by_hand() -> None:
    """1,000,000 numbers, 4 workers: DDP's is the measure, and a merge in 8 bits every 20 steps is an 80th of it."""
    model, topology = assumed_shapes(1_000_000, 1000), Topology(4)
    full = payload(predict(recipes.ddp(100), model, topology), topology)
    assert full["by_phase"] == {"setup": 2 * 24 + 16, "full": 24 + 100 * 4_000_000 + 16}
    # 250,000 numbers a chunk, rounded up to blocks of 128, 1 byte each and a scale of 2 bytes a block.
    chunk = 250_112
    merge = 4 * (chunk + 2 * chunk // 128) + 24
    rare = payload(predict(recipes.diloco(100, every=20, wire="int8"), model, topology), topology)
    assert rare["by_phase"]["local"] == 24 + 5 * merge + 16
    assert payload_ratio(rare["total"], model.numel, 100) == pytest.approx(1 / 80, rel=0.02)


def test_ab_outer_by_hand() -> None:
    model, topology = assumed_shapes(1_000_000, 1000), Topology(4)
    ranks = ranks_for(model, 10)
    assert ranks == {"weight0": 50}
    recipe = recipes.ab_outer(1000, every=20, warmup_steps=200, wire="fp32")
    by_phase = payload(predict(recipe, model, topology, ranks), topology)["by_phase"]
    assert by_phase["warmup"] == 24 + 10 * (4_000_000 + 24) + 16
    # Ranks, checksums, what each worker multiplied out for itself, and settings.
    assert by_phase["factors"] == 3 * 16 + 24 + 40 * (400_000 + 24) + 16


@pytest.mark.parametrize("trains", ["all", "a_then_b"])
@pytest.mark.parametrize("fragments", [1, 2, 3])
def test_merges_of_a_run_are_those_of_its_steps(trains: Trains, fragments: int) -> None:
    for every, steps in ((3, 3), (3, 11), (4, 13), (5, 20), (5, 29)):
        sync = WeightSync(every, Mean(), fragments=fragments if trains == "all" else 1)
        phase = Phase("p", steps, "factored", trains, sync)
        positions = [Position(s, phase, 0, 1, s, steps) for s in range(steps)]
        found = list(turns(positions[0], sync))
        for turn in found:
            same = [p for p in positions if trains == "all" or p.turn == turn.position.turn]
            assert turn.steps == len(same)
            assert turn.merging == Counter(p.merging for p in same if p.merging and not p.last)
            assert turn.last == same[-1].last
        assert sum(turn.steps for turn in found) == steps


def test_build_is_not_needed_to_predict_a_large_model() -> None:
    model = assumed_shapes(7_000_000_000, 4096)
    total = payload(predict(recipes.ddp(10, wire="bf16"), model, Topology(64)), Topology(64))["total"]
    assert payload_ratio(total, model.numel, 10) == pytest.approx(0.5, rel=1e-6)


def test_gradients_within_a_machine_are_not_payload_over_links() -> None:
    topology = Topology(4, 2)
    sent = {
        name: over_links(payload(predict(recipe, shapes_of(norm_net(), None), topology, {}), topology), topology)
        for name, recipe in {"ddp": recipes.ddp(17), "diloco": recipes.diloco(17, every=5)}.items()
    }
    whole = 4 * shapes_of(norm_net(), None).numel * 17
    assert sum(sent["ddp"].values()) == pytest.approx(whole, rel=0.1)
    assert 0 < sum(sent["diloco"].values()) < 0.3 * whole
