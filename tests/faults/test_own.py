"""Tensors that the model tells DDP to ignore are each worker's own, under every recipe."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from abtrain import ABTraining, FixedRank, Recipe, recipes
from abtrain.checkpoint import store as checkpoint
from abtrain.comm.communicator import Communicator
from abtrain.comm.in_process import run_in_process
from abtrain.commands.plan.payload import predict
from abtrain.commands.plan.shapes import shapes_of
from abtrain.commands.plan.totals import payload as predicted
from abtrain.commands.train.resizing import resized
from abtrain.errors import ConfigurationError, NonFiniteError, RanksDisagreeError
from abtrain.lowrank.classify import classify
from tests.cases import SCHEDULE, batch, build, largest_difference, sgd
from tests.faults.loops import told
from tests.gloo import run_gloo

RECIPES = {
    "ddp": recipes.ddp(8),
    "local_sgd": recipes.local_sgd(8, every=4, delay=2),
    "ab": recipes.ab(15, **SCHEDULE, rank_rule=FixedRank(2)),
    "ab_outer": recipes.ab_outer(12, every=4, warmup_steps=4, rank_rule=FixedRank(2), wire="int8"),
}
OWN = ["bias", "tail.weight", "count", "norm.running_mean"]


class Model(nn.Module):
    """Has shared and own tensors of every kind, among them a parameter of the root module."""

    def __init__(self, own: Any = OWN) -> None:
        super().__init__()
        self.net = build("mlp", torch.float32)
        self.norm = nn.BatchNorm1d(5)
        # The generator is one for all threads.
        self.tail = nn.utils.skip_init(nn.Linear, 5, 5)
        self.tail.load_state_dict({"weight": torch.linspace(-1, 1, 25).view(5, 5), "bias": torch.zeros(5)})
        self.bias = nn.Parameter(torch.zeros(5))
        self.register_buffer("count", torch.zeros(3))
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, own)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.tail(self.norm(self.net(x))) + self.bias
        return y


def start(comm: Communicator, recipe: Recipe, model: nn.Module | None = None, **options: Any) -> Any:
    model = Model() if model is None else model
    optimizer = sgd(model.parameters())
    return model, optimizer, ABTraining(model, optimizer, recipe, communicator=comm, **options)


def go(comm: Communicator, ab: ABTraining, optimizer: Any, until: int | None = None) -> None:
    while not ab.finished and ab.steps_done != until:
        x, y = batch("mlp", comm.rank, ab.steps_done, torch.float32)
        F.cross_entropy(ab(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        ab.step()


def trained(comm: Communicator, recipe: Recipe, **options: Any) -> dict[str, Tensor]:
    model, optimizer, ab = start(comm, recipe, **options)
    model.count.fill_(comm.rank)
    go(comm, ab, optimizer)
    return ab.dense_state_dict()


def check_own(states: list[dict[str, Tensor]]) -> None:
    for name in states[0]:
        equal = torch.equal(states[0][name], states[1][name])
        # Under DDP the statistics of the last pass stay each worker's own too.
        assert equal == (name not in OWN) or name == "norm.running_var", name


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_worker_trains_its_own_and_shares_the_rest(recipe: str) -> None:
    check_own(run_in_process(2, lambda comm: trained(comm, RECIPES[recipe])))


@pytest.mark.parametrize("recipe", ["ddp", "ab"])
@pytest.mark.parametrize("find_unused_parameters", [False, True])
def test_on_gloo_likewise(recipe: str, find_unused_parameters: bool) -> None:
    check_own(run_gloo(2, trained_on_gloo, RECIPES[recipe], find_unused_parameters))


def trained_on_gloo(comm: Communicator, recipe: Recipe, find_unused_parameters: bool) -> dict[str, Tensor]:
    return trained(comm, recipe, find_unused_parameters=find_unused_parameters)


def test_own_tensors_are_not_compared_at_the_start() -> None:
    """They may have other values and other shapes on each worker."""

    def work(comm: Communicator) -> tuple[float, tuple[int, ...]]:
        model = Model()
        model.bias.data.fill_(comm.rank)
        model.register_buffer("count", torch.zeros(3 + comm.rank))
        start(comm, recipes.local_sgd(8, every=4), model)
        return model.bias[0].item(), tuple(model.count.shape)

    assert run_in_process(2, work) == [(0, (3,)), (1, (4,))]


@pytest.mark.parametrize("recipe", RECIPES)
def test_own_tensors_are_saved_and_resumed_by_each_worker(recipe: str) -> None:
    def work(comm: Communicator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        _, optimizer, ab = start(comm, RECIPES[recipe])
        go(comm, ab, optimizer, 6)
        saved = ab.state_dict()
        _, again_optimizer, again = start(comm, RECIPES[recipe])
        again.load_state_dict({**saved, "model": {**saved["model"]}})
        go(comm, ab, optimizer)
        whole = ab.dense_state_dict()
        go(comm, again, again_optimizer)
        return whole, again.dense_state_dict()

    for whole, again in run_in_process(2, work):
        assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_checkpoints_hold_what_is_own_and_other_workers_may_take_it_over(tmp_path: Path) -> None:
    recipe = recipes.local_sgd(8, every=4)

    def first(comm: Communicator) -> dict[str, Tensor]:
        model, optimizer, ab = start(comm, recipe)
        go(comm, ab, optimizer, 4)
        model.count.fill_(comm.rank)
        checkpoint.save(tmp_path, 4, ab.state_dict(), comm, resizable=True)
        ab.load_state_dict(checkpoint.latest(tmp_path, comm).states[0])  # type: ignore[union-attr]
        return {name: tensor.clone() for name, tensor in ab.dense_state_dict().items()}

    left = run_in_process(2, first)

    def go_on(comm: Communicator) -> dict[str, Tensor]:
        _, _, ab = start(comm, recipe)
        former = checkpoint.latest(tmp_path, comm)
        assert former is not None
        ab.load_state_dict(resized(former.states, comm.rank, recipe))
        return ab.dense_state_dict()

    for rank, state in enumerate(run_in_process(3, go_on)):
        assert largest_difference(state, left[rank % 2]) == 0


def test_a_description_shows_what_is_own() -> None:
    _, _, ab = start(None, recipes.ab(30, **SCHEDULE))  # type: ignore[arg-type]
    text = str(ab.describe())
    own = [line for line in text.splitlines() if "in _ddp_params_and_buffers_to_ignore" in line]
    assert [line.split()[0] for line in own] == ["bias", "tail.weight", "count", "norm.running_mean"]
    assert ab.describe().parameters["own"] == 5 + 25


def test_a_tied_parameter_is_own_by_any_of_its_names() -> None:
    model = build("mlp", torch.float32)
    model.twin = nn.Linear(16, 12)  # type: ignore[assignment]
    model.twin.weight = model[2].weight  # type: ignore[index,union-attr]
    model._ddp_params_and_buffers_to_ignore = ["twin.weight"]  # type: ignore[assignment]
    assert {t.name for t in classify(model, None) if t.kind == "own"} == {"2.weight"}


def test_names_of_nothing_are_refused() -> None:
    with pytest.raises(
        ConfigurationError, match=r"'nets\.0\.bias' is neither a parameter nor a buffer: did you mean 'net\."
    ):
        start(None, recipes.ddp(8), Model(["nets.0.bias"]))  # type: ignore[arg-type]


def test_different_lists_are_reported_at_the_start() -> None:
    errors = told(2, lambda comm: start(comm, recipes.local_sgd(8, every=4), Model(OWN[: 3 + comm.rank])))
    for error in errors:
        assert isinstance(error, RanksDisagreeError)
        assert "_ddp_params_and_buffers_to_ignore is 'bias, " in str(error)


def test_an_own_parameter_may_be_trained_by_nobody_or_by_another_optimizer() -> None:
    def work(comm: Communicator) -> bool:
        model = Model()
        optimizer = sgd([p for name, p in model.named_parameters() if name not in OWN])
        ab = ABTraining(model, optimizer, recipes.ab(15, **SCHEDULE), communicator=comm)
        go(comm, ab, optimizer, 2)
        model.bias.requires_grad_(False)
        go(comm, ab, optimizer)
        return ab.finished

    assert run_in_process(2, work) == [True, True]


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_an_own_gradient_that_is_not_finite_concerns_its_worker_alone(policy: Any) -> None:
    def work(comm: Communicator) -> tuple[bool, bool, list[int]]:
        model, optimizer, ab = start(comm, recipes.ddp(4), on_nonfinite=policy)
        x, y = batch("mlp", comm.rank, 0, torch.float32)
        F.cross_entropy(ab(x), y).backward()
        if comm.rank:
            model.bias.grad.fill_(math.nan)
        optimizer.step()
        optimizer.zero_grad()
        ab.step()
        return bool(model.bias.isfinite().all()), bool(model.tail.bias.isfinite().all()), ab.skipped_steps

    assert run_in_process(2, work) == [(True, True, []), (policy == "skip", True, [])]


def test_in_a_group_an_own_gradient_that_is_not_finite_concerns_its_worker_alone() -> None:
    def work(comm: Communicator) -> tuple[bool, list[int]]:
        model, optimizer, ab = start(comm, recipes.local_sgd(4, every=2), on_nonfinite="skip")
        x, y = batch("mlp", comm.rank, 0, torch.float32)
        F.cross_entropy(ab(x), y).backward()
        if comm.rank == 1:
            model.bias.grad.fill_(math.nan)
        optimizer.step()
        optimizer.zero_grad()
        ab.step()
        go(comm, ab, optimizer)
        return bool(model.bias.isfinite().all()), ab.skipped_steps

    assert run_in_process(4, work, group_size=2) == 4 * [(True, [])]


def test_the_forecast_of_payload_leaves_own_tensors_out() -> None:
    recipe = RECIPES["local_sgd"]

    def work(comm: Communicator) -> Any:
        _, optimizer, ab = start(comm, recipe)
        go(comm, ab, optimizer)
        return comm.meter.payload(), comm.topology

    sent, topology = run_in_process(2, work)[0]
    assert sent == predicted(predict(recipe, shapes_of(Model()), topology), topology)


def test_shared_gradients_that_are_not_finite_are_named_with_the_rank_that_brought_them() -> None:
    def work(comm: Communicator) -> None:
        _, optimizer, ab = start(comm, recipes.ddp(4))
        x, y = batch("mlp", comm.rank, 0, torch.float32)
        F.cross_entropy(ab(x * math.nan if comm.rank else x), y).backward()
        optimizer.step()

    other, whose = (str(error) for error in told(2, work))
    assert "at step 0 (net.0.weight, net.0.bias, net.2.weight, net.2.bias and 5 more), produced by a worker" in other
    assert "produced by rank 1 (which has NaN or infinity in buffer norm.running_var)" in whose


def test_on_gloo_the_rank_is_reported_too() -> None:
    other, whose = run_gloo(2, gradients_break)
    assert "produced by a worker other than rank 0" in other and "produced by rank 1" in whose


def gradients_break(comm: Communicator) -> str:
    _, optimizer, ab = start(comm, recipes.ddp(4))
    x, y = batch("mlp", comm.rank, 0, torch.float32)
    (F.cross_entropy(ab(x), y) * (math.inf if comm.rank else 1.0)).backward()
    with pytest.raises(NonFiniteError) as error:
        optimizer.step()
    return str(error.value)


@pytest.mark.parametrize("recipe", ["ddp", "local_sgd", "ab"])
@pytest.mark.parametrize("shapes", [(8, 3), (3, 8)], ids=str)
def test_a_buffer_that_grows_on_one_worker_is_named(recipe: str, shapes: tuple[int, int]) -> None:
    def work(comm: Communicator) -> None:
        model, optimizer, ab = start(comm, RECIPES[recipe], Model(["bias"]))
        go(comm, ab, optimizer, 1)
        model.count = torch.zeros(shapes[comm.rank])
        go(comm, ab, optimizer)

    for error in told(2, work):
        assert isinstance(error, RanksDisagreeError)
        assert "count is " in str(error) and "(8,) of torch.float32" in str(error)


def test_a_buffer_that_differs_in_shape_after_the_last_pass_is_named_at_the_end_of_the_phase() -> None:
    for error in run_gloo(2, buffer_shrinks):
        assert "step 8, end of phase full: workers have different buffers: count is (2,)" in error


def buffer_shrinks(comm: Communicator) -> str:
    model, optimizer, ab = start(comm, recipes.ddp(8), Model(["bias"]))
    go(comm, ab, optimizer, 7)
    ab(batch("mlp", comm.rank, 7, torch.float32)[0]).sum().backward()
    if comm.rank == 0:
        model.count = torch.zeros(2)
    optimizer.step()
    with pytest.raises(RanksDisagreeError) as error:
        ab.step()
    return str(error.value)


def test_on_gloo_a_buffer_that_grows_on_all_workers_is_shared_on() -> None:
    assert run_gloo(2, buffer_grows) == [[0.0] * 8] * 2


def buffer_grows(comm: Communicator) -> list[float]:
    model, optimizer, ab = start(comm, recipes.ddp(8), Model(["bias"]))
    go(comm, ab, optimizer, 1)
    model.count = torch.full((8,), float(comm.rank))
    go(comm, ab, optimizer)
    count: list[float] = model.count.tolist()
    return count


@pytest.mark.parametrize("recipe", ["ddp", "local_sgd", "ab"])
def test_a_buffer_that_grows_equally_on_all_workers_stays_shared(recipe: str, caplog: pytest.LogCaptureFixture) -> None:
    def work(comm: Communicator) -> list[float]:
        model, optimizer, ab = start(comm, RECIPES[recipe], Model(["bias"]))
        go(comm, ab, optimizer, 1)
        model.count = torch.full((8,), float(comm.rank))
        go(comm, ab, optimizer)
        return model.count.tolist()

    assert run_in_process(2, work) == [[0.0] * 8] * 2
    assert ("count is (8,)" in caplog.text) == (recipe != "local_sgd")
