"""The prediction against the meter of the real engine, byte by byte."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from abtrain import ABTraining, Energy, FixedRank, GradientSync, Phase, Recipe, SigmaCutoff, WeightSync, recipes
from abtrain.comm.communicator import Communicator
from abtrain.comm.in_process import run_in_process
from abtrain.comm.topology import Topology
from abtrain.recipe import Factoring
from abtrain.study.payload import OptimizerShape, payload, payload_ratio, predict
from abtrain.study.shapes import assumed_shapes, ranks_for, shapes_of
from abtrain.study.wires import GRADIENT_WIRES, MERGE_WIRES
from abtrain.sync import GradientWire, Wire
from tests.cases import SCHEDULE, adamw, sgd
from tests.gloo import run_gloo

RANK_2 = {"rank_rule": FixedRank(2)}
LOCAL = {"every": 4}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("ddp", {}),
    "solo": ("solo", {}),
    "local_sgd": ("local_sgd", LOCAL),
    "local_sgd around": ("local_sgd", {"every": 4, "warmup_steps": 3, "rebound_steps": 2}),
    **{f"diloco {wire}": ("diloco", {**LOCAL, "wire": wire}) for wire in ("fp32", "bf16", "int8", "int4")},
    "ab": ("ab", {**SCHEDULE, **RANK_2}),
    "ab projecting": ("ab", {**SCHEDULE, **RANK_2, "optimizer_state": "project"}),
    "ab shared": ("ab", {**SCHEDULE, **RANK_2, "svd": "shared"}),
    "ab by cutoff": ("ab", {**SCHEDULE, "sigma_cutoff": 0.4}),
    "ab with dense weights": ("ab", {**SCHEDULE, "rank_rule": Energy(0.8), "keep_dense_if_larger": True}),
    "ab_no_groups": ("ab_no_groups", {**SCHEDULE, **RANK_2}),
    **{f"ab_outer {w}": ("ab_outer", {**LOCAL, **RANK_2, "warmup_steps": 8, "wire": w}) for w in ("fp32", "int4")},
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
    """What the meter of a whole run says, and the ranks of every decomposition."""
    opt = optimizer([p for p in model.parameters() if p.requires_grad])
    ab = ABTraining(model, opt, recipe, communicator=comm)
    dtype = next(model.parameters()).dtype
    for step in range(recipe.total_steps):
        generator = torch.Generator().manual_seed(100 * step + comm.rank)
        x = torch.randn(6, 2, 6, 6, generator=generator).to(dtype)
        F.cross_entropy(ab(x).float(), torch.randint(0, 5, (6,), generator=generator)).backward()
        opt.step()
        opt.zero_grad()
        ab.step()
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
        assert payload(stretches, topology) == counted
        assert sum(stretch.steps for stretch in stretches) == recipe.total_steps


@pytest.mark.parametrize("case", CASES)
def test_every_recipe_sends_what_is_predicted(case: str) -> None:
    name, options = CASES[case]
    compare(recipes.build(name, 17, **options), 3)


@pytest.mark.parametrize("case", ["ddp", "local_sgd around", "diloco int4", "ab", "ab projecting", "ab_outer int4"])
@pytest.mark.parametrize(("workers", "group_size"), [(4, 2), (2, 2), (1, 1)])
def test_groups_too(case: str, workers: int, group_size: int) -> None:
    name, options = CASES[case]
    compare(recipes.build(name, 17, **options), workers, group_size)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", ["ddp", "local_sgd around", "ab", "diloco int8", "ab_outer fp32"])
def test_other_dtypes_too(case: str, dtype: torch.dtype) -> None:
    name, options = CASES[case]
    compare(recipes.build(name, 13, **options), 2, make=lambda: norm_net(dtype))


def test_another_optimizer_levels_less() -> None:
    compare(recipes.local_sgd(9, every=3, warmup_steps=2, rebound_steps=1), 2, optimizer=sgd)


def test_merges_of_more_than_one_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("comm.wire", "study.wires"):
        monkeypatch.setattr(f"abtrain.{module}.CAPACITY", 4096)
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


def test_every_wire_is_known() -> None:
    assert set(MERGE_WIRES) == set(get_args(Wire))
    assert set(GRADIENT_WIRES) == set(get_args(GradientWire))


def test_by_hand() -> None:
    """1,000,000 numbers, 4 workers: DDP's is the measure, and a merge in 8 bits every 20 steps is an 80th of it."""
    model, topology = assumed_shapes(1_000_000, 1000), Topology(4)
    full = payload(predict(recipes.ddp(100), model, topology), topology)
    assert full["by_phase"] == {"setup": 256 + 16, "full": 100 * 4_000_000}
    # 250,000 numbers a chunk, rounded up to blocks of 128, 1 byte each and a scale of 2 bytes a block.
    chunk = 250_112
    merge = 4 * (chunk + 2 * chunk // 128) + 256
    rare = payload(predict(recipes.diloco(100, every=20, wire="int8"), model, topology), topology)
    assert rare["by_phase"]["local"] == 5 * merge
    assert payload_ratio(rare["total"], model, 100) == pytest.approx(1 / 80, rel=0.02)


def test_ab_outer_by_hand() -> None:
    model, topology = assumed_shapes(1_000_000, 1000), Topology(4)
    ranks = ranks_for(model, 10)
    assert ranks == {"weight0": 50}
    recipe = recipes.ab_outer(1000, every=20, warmup_steps=200, wire="fp32")
    by_phase = payload(predict(recipe, model, topology, ranks), topology)["by_phase"]
    assert by_phase["warmup"] == 10 * (4_000_000 + 256)
    assert by_phase["factors"] == 16 + 16 + 40 * (400_000 + 256)


def test_build_is_not_needed_to_predict_a_large_model() -> None:
    model = assumed_shapes(7_000_000_000, 4096)
    total = payload(predict(recipes.ddp(10, wire="bf16"), model, Topology(64)), Topology(64))["total"]
    assert payload_ratio(total, model, 10) == pytest.approx(0.5, rel=1e-6)
