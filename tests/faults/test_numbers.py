"""Numbers that are not finite, odd weights, and decompositions that fail or differ. Workers are threads here."""

from __future__ import annotations

import copy
import math
import re
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abtrain import ABTraining, FixedRank, SigmaCutoff, recipes
from abtrain.comm.communicator import Communicator, SingleProcess
from abtrain.comm.in_process import run_in_process
from abtrain.comm.stages import finish
from abtrain.consistency.factors import agree_on_factors
from abtrain.errors import NonFiniteError
from abtrain.merging.wires.wire import make_wire
from abtrain.recipes.factoring import Factoring
from abtrain.recipes.recipe import Recipe
from tests.cases import SCHEDULE, batch, build, largest_difference, sgd
from tests.faults.loops import AB, HIDDEN, OUTER, Loop, told
from tests.gloo import run_gloo

SPOILS = {"NaN": math.nan, "Inf": math.inf}


@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("policy", ["stop", "drop_worker"])
def test_a_gradient_that_is_not_finite_stops_all_who_share_it(spoil: str, policy: str) -> None:
    def work(comm: Communicator) -> None:
        loop = Loop(comm, AB, on_nonfinite=policy)
        loop.run(1)
        before = copy.deepcopy(loop.model.state_dict())
        try:
            loop.step(SPOILS[spoil] if comm.rank == 1 else 1)
        finally:
            assert largest_difference(before, loop.model.state_dict()) == 0

    errors = told(3, work)
    assert {type(error) for error in errors} == {NonFiniteError} and errors[0].exit_code == 7
    assert all("at step 1 (" in str(error) and "they have changed no weight" in str(error) for error in errors)


@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize(("recipe", "at"), [(AB, 1), (AB, 5), (OUTER, 10), (HIDDEN, 15)], ids=str)
def test_a_step_by_such_a_gradient_can_be_left_out(
    spoil: str, recipe: Recipe, at: int, caplog: pytest.LogCaptureFixture
) -> None:
    def work(comm: Communicator) -> tuple[dict[str, Tensor], list[int]]:
        loop = Loop(comm, recipe, on_nonfinite="skip")
        loop.run(at)
        before = copy.deepcopy(loop.ab.dense_state_dict())
        loop.step(SPOILS[spoil] if comm.rank == 1 else 1)
        if recipe is AB and at == 1:
            assert largest_difference(before, loop.ab.dense_state_dict()) == 0
        return loop.run(), loop.ab.skipped_steps

    results = run_in_process(3, work)
    assert all(largest_difference(results[0][0], state) == 0 for state, _ in results)
    assert all(torch.isfinite(value).all() for value in results[0][0].values())
    # Where gradients are shared all leave the step out, elsewhere the one whose gradient it was.
    shared = recipe is AB and at == 1
    assert [skipped for _, skipped in results] == [[at] if shared or rank == 1 else [] for rank in range(3)]
    assert f"step {at} is skipped: its gradients are not finite" in caplog.text


def test_a_run_of_nothing_but_such_steps_ends() -> None:
    def work(comm: Communicator) -> None:
        loop = Loop(comm, recipes.ddp(100), on_nonfinite="skip")
        while not loop.ab.finished:
            loop.step(math.nan)

    assert all("the last 50 steps, up to step 49," in str(error) for error in told(2, work))


@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("policy", ["stop", "drop_worker", "skip"])
def test_a_weight_that_is_not_finite_is_never_averaged(spoil: str, policy: str) -> None:
    """On one worker alone, during a group phase."""

    def work(comm: Communicator) -> dict[str, Tensor]:
        loop = Loop(comm, AB, on_nonfinite=policy)
        loop.run(6)
        if comm.rank == 1:
            loop.model.get_parameter("0.bias").data[0] = SPOILS[spoil]
        return loop.run()

    if policy == "drop_worker":
        states = run_in_process(3, work)
        assert all(torch.isfinite(value).all() for state in states for value in state.values())
        assert all(largest_difference(states[0], state) == 0 for state in states)
    else:
        errors = told(3, work)
        assert {type(error) for error in errors} == {NonFiniteError}
        assert all(
            "the merge found NaN or infinity on rank 1 (" in str(error) and "0.bias" in str(error) for error in errors
        )


def test_a_weight_that_is_not_finite_is_never_factored() -> None:
    def work(comm: Communicator) -> None:
        loop = Loop(comm, recipes.ab(9, **{**SCHEDULE, "warmup_steps": 0}), poisoned())
        loop.run()

    assert all(isinstance(error, NonFiniteError) and "2.weight" in str(error) for error in told(2, work))


def poisoned() -> nn.Module:
    model = build("mlp")
    model.get_parameter("2.weight").data[0, 0] = math.nan
    return model


@pytest.mark.parametrize("failing", [(0,), (1,), (0, 1)], ids=str)
def test_an_svd_that_fails(failing: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """On one worker or on all, the weight stays dense on all."""
    svd = torch.linalg.svd

    def stubborn(W: Tensor, **options: Any) -> Any:
        if W.shape == (16, 12) and threading.current_thread().name in {f"rank {rank}" for rank in failing}:
            raise torch.linalg.LinAlgError("did not converge")
        return svd(W, **options)

    monkeypatch.setattr(torch.linalg, "svd", stubborn)

    def work(comm: Communicator) -> Any:
        loop = Loop(comm, recipes.ab(9, **SCHEDULE))
        return loop.run(), loop.ab.rank_history, str(loop.ab.describe())

    (one, history, text), (other, _, _) = run_in_process(2, work)
    assert set(history[0]["ranks"]) == {"0.weight", "4.weight"}
    assert re.search(r"2.weight +12x16  averaged  may be .*; dense in this cycle: its SVD did not converge", text)
    assert largest_difference(one, other) == 0


@pytest.mark.parametrize("svd", ["each", "shared"])
def test_singular_values_exactly_at_the_cutoff(svd: Any) -> None:
    """One worker's rounding keeps those that the others' drops: all take the owner's."""
    W = torch.diag(torch.tensor([1.0, 0.5, 0.25, 0.25, 0.1]))

    def work(comm: Communicator) -> Any:
        nudged = W * torch.tensor([1.0, 1.0, 1.0, 1 - 1e-6 * comm.rank, 1.0])
        return agree_on_factors(comm, {"w": nudged}, Factoring(SigmaCutoff(0.25), svd=svd))[0]["w"]

    factors = run_in_process(3, work)
    assert all(pair.k == 4 for pair in factors)
    assert all(torch.equal(pair.A, factors[0].A) and torch.equal(pair.B, factors[0].B) for pair in factors)


def orthogonal_run(comm: Communicator, svd: str) -> tuple[str, dict[str, Tensor], dict[str, Tensor]]:
    """Orthogonal weights have repeated singular values: every basis is a right one, and rounding chooses."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256, bias=False), nn.Tanh(), nn.Linear(256, 256, bias=False))
    for layer in (model[0], model[2]):
        nn.init.orthogonal_(layer.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    options = {**SCHEDULE, "warmup_steps": 1}
    ab = ABTraining(model, optimizer, recipes.ab(7, **options, svd=svd), communicator=comm)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(7):
        ab(torch.randn(4, 256)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ab.step()
    return f"{torch.get_num_threads()} {torch.backends.cpu.get_cpu_capability()}", start, ab.dense_state_dict()


def orthogonal_runs(comm: Communicator) -> list[tuple[str, dict[str, Tensor], dict[str, Tensor]]]:
    return [orthogonal_run(comm, svd) for svd in ("each", "shared")]


def test_processors_and_threads_that_differ() -> None:
    """Another instruction set and number of threads, in a process of its own."""
    plain = {"OMP_NUM_THREADS": "2", "ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}
    for (own, start, end), (others, _, other) in zip(
        *run_gloo(2, orthogonal_runs, environments=[{}, plain]), strict=True
    ):
        assert others.split() == ["2", "DEFAULT"] and own.split()[0] == "1"
        assert largest_difference(end, other) == 0
        # Nothing was learned (lr = 0), so whatever differs came from the merge.
        assert largest_difference(start, end) < 1e-4


UNLIKE: dict[str, Recipe] = {
    "int8": recipes.diloco(12, every=3, wire="int8"),
    "factored again": recipes.ab_outer(30, every=3, warmup_steps=6, rank_rule=FixedRank(8), refactor_every=2),
    "rebound": recipes.ab_outer(30, every=3, warmup_steps=6, rank_rule=FixedRank(8), refactor_every=2, rebound_steps=3),
    "the paper's, rebound merged": recipes.ab(
        24, warmup_steps=6, ab_steps=6, rebound_steps=4, rebound_every=2, rank_rule=FixedRank(8)
    ),
}


def trained(comm: Communicator, case: str) -> dict[str, Tensor]:
    """A model large enough for matrix products to be rounded in more than one way."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 80), nn.Tanh(), nn.Linear(80, 5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ab = ABTraining(model, optimizer, UNLIKE[case], communicator=comm)
    generator = torch.Generator().manual_seed(comm.rank)
    while not ab.finished:
        x, y = torch.randn(16, 64, generator=generator), torch.randint(0, 5, (16,), generator=generator)
        F.cross_entropy(ab(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        ab.step()
    return ab.factored_state_dict()


def all_trained(comm: Communicator) -> dict[str, dict[str, Tensor]]:
    return {case: trained(comm, case) for case in UNLIKE}


def test_products_computed_separately_are_equal_on_different_processors() -> None:
    other = {"OMP_NUM_THREADS": "1", "MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "default"}
    one, two = run_gloo(2, all_trained, environments=[{}, other])
    for case in UNLIKE:
        assert one[case].keys() == two[case].keys()
        assert all(torch.equal(one[case][name], two[case][name]) for name in one[case]), case


class Odd(nn.Module):
    """Weights that are tied, empty and complex."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.hidden = nn.Linear(6, 6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight
        self.empty = nn.Parameter(torch.zeros(0, 6))
        self.turn = nn.Parameter(torch.ones(6, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.hidden(self.embed(x)))
        h = torch.view_as_real(h * self.turn).sum(-1).to(h.dtype) + self.empty.sum()
        return self.head(h)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recipe", [AB, OUTER, HIDDEN], ids=["ab", "ab_outer", "hidden"])
def test_odd_weights(recipe: Recipe, dtype: torch.dtype) -> None:
    """They are trained, merged and saved, and all workers end with the same."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Odd())
        for part in (models[-1].embed, models[-1].hidden):
            part.to(dtype)
        models[-1].head.weight = models[-1].embed.weight

    def work(comm: Communicator) -> dict[str, Tensor]:
        model = models[comm.rank]
        optimizer = sgd(model.parameters())
        ab = ABTraining(model, optimizer, recipe, communicator=comm)
        generator = torch.Generator().manual_seed(comm.rank)
        for step in range(recipe.total_steps):
            x = torch.randint(0, 7, (8,), generator=generator)
            F.cross_entropy(ab(x).float(), x).backward()
            optimizer.step()
            optimizer.zero_grad()
            ab.step()
            if step == recipe.total_steps // 2:
                ab.load_state_dict(copy.deepcopy(ab.state_dict()))
        assert model.head.weight is model.embed.weight
        return {name: torch.view_as_real(t) if t.is_complex() else t for name, t in ab.dense_state_dict().items()}

    one, other = run_in_process(2, work)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(torch.isfinite(value).all() for value in one.values())


WIRES = ["fp32", "bf16", "int8", "int4", "int3", "ternary", "ternary:int3", "auto"]


@pytest.mark.parametrize("wire", WIRES)
def test_one_worker_alone_loses_nothing_on_any_wire(wire: str) -> None:
    numbers = {"w": torch.randn(32, 48, generator=torch.Generator().manual_seed(0)), "b": torch.tensor(0.1)}
    averages = finish(make_wire(wire, 1).average(numbers, SingleProcess()))
    assert all(torch.equal(averages.mean[name], tensor) for name, tensor in numbers.items())
    assert all(not error.any() for error in averages.error.values())


class Gated(nn.Module):
    """A layer whose gradient is exactly zero while its gate is shut, as that of a LoRA's A at first."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.gated, self.head = nn.Linear(16, 64), nn.Linear(64, 64), nn.Linear(64, 5)

    def forward(self, x: Tensor, gate: float) -> Tensor:
        h = torch.tanh(self.inner(x))
        y: Tensor = self.head(h + gate * self.gated(h))
        return y


def through_a_gate(comm: Communicator, rank: int, dtype: torch.dtype) -> list[float]:
    torch.manual_seed(0)
    model = Gated().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ab = ABTraining(model, optimizer, recipes.powersgd(14, rank=rank), communicator=comm)
    generator = torch.Generator().manual_seed(comm.rank)
    before = model.gated.weight.detach().clone()
    while not ab.finished:
        x, y = torch.randn(8, 16, generator=generator), torch.randint(0, 5, (8,), generator=generator)
        F.cross_entropy(ab(x.to(dtype), float(ab.steps_done >= 8)).float(), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        ab.step()
    assert not torch.equal(model.gated.weight, before)
    return [float(p.detach().double().sum()) for p in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_powersgd_of_a_gradient_of_zero(rank: int, dtype: torch.dtype) -> None:
    first, second = run_gloo(2, through_a_gate, rank, dtype)
    assert first == second and all(map(math.isfinite, first))


def test_factors_that_are_not_finite_end_the_run_by_name() -> None:
    """The preconditioner checks them before a merge does."""

    def work(comm: Communicator) -> None:
        loop = Loop(comm, OUTER)
        loop.run(8)  # the factored phase begins
        next(iter(loop.ab._model.factors().values())).data[0, 0] = math.nan
        loop.step()

    assert all(isinstance(error, NonFiniteError) and "factors of a weight" in str(error) for error in told(2, work))


@pytest.mark.parametrize("losses", [(math.inf, -math.inf), (1.7e308, 1.7e308)], ids=["infinities", "too large"])
def test_losses_that_cannot_be_added_up_are_not_finite(losses: tuple[float, float]) -> None:
    def work(comm: Communicator) -> None:
        loop = Loop(comm, recipes.local_sgd(4, every=2, merge="weighted"))
        while not loop.ab.finished:
            x, y = batch("mlp", comm.rank, loop.ab.steps_done)
            F.cross_entropy(loop.ab(x), y).backward()
            loop.optimizer.step()
            loop.ab.step(losses[loop.ab.steps_done % 2] if comm.rank == 1 else 1.0)

    assert all(isinstance(error, NonFiniteError) and "infinity on rank 1" in str(error) for error in told(2, work))


def test_a_weight_that_cannot_be_factored_at_the_start_leaves_the_optimizer_as_it_was() -> None:
    model = build("mlp")
    nn.init.constant_(model[2].weight, math.nan)
    optimizer = sgd(model.parameters())
    recipe = recipes.ab(9, warmup_steps=0, ab_steps=3, rebound_steps=0, sigma_cutoff=0.2)
    with pytest.raises(NonFiniteError):
        ABTraining(model, optimizer, recipe)
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
