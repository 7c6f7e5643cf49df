"""Loops of other people: what they change between steps, and how they save and look."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, AdamW
from torch.optim.lr_scheduler import ExponentialLR

from abtrain import ABTraining, FixedRank, recipes
from abtrain.comm.communicator import Communicator
from abtrain.comm.in_process import run_in_process
from abtrain.errors import CheckpointError, ConfigurationError, RanksDisagreeError, UsageError
from abtrain.recipes.recipe import Recipe
from tests.cases import SCHEDULE, batch, build, sgd
from tests.faults.loops import Loop, told
from tests.faults.optimizers import Accumulating, ByHand, Lookahead, Masters, ScheduleFree
from tests.faults.test_optimizers import LOCAL, OUTER, PAPER, reread


def backward(ab: ABTraining, scale: float = 1.0) -> None:
    x, y = batch("mlp", ab.communicator.rank, ab.steps_done)
    (F.cross_entropy(ab(x), y) * scale).backward()


def step(ab: ABTraining) -> None:
    backward(ab)
    for optimizer in ab.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    ab.step()


SCALED = recipes.ab_outer(8, every=2, warmup_steps=0, lr_rebound_steps=4, rank_rule=FixedRank(2), damping=0)
"""A recipe that multiplies learning rates in its first steps."""


def factored(recipe: Recipe = OUTER) -> ABTraining:
    model = build("mlp")
    ab = ABTraining(model, sgd(model.parameters()), recipe)
    while not ab.rank_history:
        step(ab)
    return ab


@pytest.mark.parametrize("where", ["post hook", "pre hook", "closure"])
def test_a_schedule_that_steps_inside_the_optimizers_step(where: str) -> None:
    model = nn.Linear(10, 5).double()
    optimizer = SGD(model.parameters(), 0.1)
    schedule = ExponentialLR(optimizer, 0.9)
    if where != "closure":
        register = optimizer.register_step_post_hook if where == "post hook" else optimizer.register_step_pre_hook
        register(lambda *_: schedule.step())
    ab = ABTraining(model, optimizer, SCALED)

    def closure() -> None:
        backward(ab)
        schedule.step()

    while not ab.finished:
        if where != "closure":
            backward(ab)
        optimizer.step(closure if where == "closure" else None)
        ab.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.9**8)


def test_a_rate_in_a_tensor_that_the_step_itself_changes() -> None:
    class Decaying(SGD):
        def step(self, closure: Any = None) -> None:
            super().step()
            self.param_groups[0]["lr"].mul_(0.9)

    model = build("mlp")
    rate = torch.tensor(0.1)
    optimizer = Decaying(model.parameters(), rate)
    ab = ABTraining(model, optimizer, SCALED)
    while not ab.finished:
        step(ab)
    assert optimizer.param_groups[0]["lr"] is rate and float(rate) == pytest.approx(0.1 * 0.9**8)


def test_state_of_a_wrapped_optimizer_follows_weights_into_their_factors() -> None:
    class Always(Accumulating):
        def step(self, closure: Any = None) -> None:
            self.optimizer.step(closure)

        def zero_grad(self, set_to_none: bool = True) -> None:
            self.optimizer.zero_grad(set_to_none)

    def work(comm: Communicator, wraps: bool) -> dict[str, Tensor]:
        def make(model: nn.Module) -> Any:
            optimizer = AdamW(model.parameters(), 1e-2)
            return Always(optimizer) if wraps else optimizer

        return Loop(comm, OUTER, make=make).run()

    ((bare,), (wrapped,)) = (run_in_process(1, lambda comm, wraps=w: work(comm, wraps)) for w in (False, True))
    assert all(torch.equal(bare[name], wrapped[name]) for name in bare)


@pytest.mark.parametrize(
    ("recipe", "frozen"),
    [(PAPER, "AB"), (OUTER, "AB"), (OUTER, "A"), (OUTER, "B")],
    ids=["paper", "outer", "outer, only A", "outer, only B"],
)
def test_a_factored_layer_that_is_frozen_is_named(recipe: Recipe, frozen: str) -> None:
    ab = factored(recipe)
    for letter in frozen:
        getattr(ab.module[2], f"weight_{letter}").requires_grad_(False)
    x, y = batch("mlp", 0, ab.steps_done)
    F.cross_entropy(ab.module(x), y).backward()
    with pytest.raises(UsageError, match=r"were frozen after ABTraining was built: 2\.weight"):
        ab.optimizer.step()


def test_a_toggle_of_all_parameters_leaves_roles_as_they_are() -> None:
    def work(comm: Communicator, toggles: bool) -> list[float]:
        loop = Loop(comm, recipes.ab(9, **SCHEDULE, rank_rule=FixedRank(2)))
        while not loop.ab.finished:
            if toggles:
                loop.model.requires_grad_(False)
                loop.model.requires_grad_(True)
            loop.step()
        return [float(p.sum()) for p in loop.ab.dense_state_dict().values()]

    assert run_in_process(2, lambda comm: work(comm, True)) == run_in_process(2, lambda comm: work(comm, False))


def test_one_optimizer_trains_while_the_parameters_of_the_other_are_frozen() -> None:
    model = build("mlp")
    first, second = SGD(model[0].parameters(), 0.05), SGD([*model[2].parameters(), *model[4].parameters()], 0.05)
    ab = ABTraining(model, [first, second], recipes.local_sgd(4, every=2))
    while not ab.finished:
        for optimizer, others in ((first, model[2:]), (second, model[:2])):
            others.requires_grad_(False)
            backward(ab)
            optimizer.step()
            optimizer.zero_grad()
            others.requires_grad_(True)
        ab.step()


@pytest.mark.parametrize("recipe", [recipes.local_sgd(8, every=2), OUTER], ids=["rounds", "outer"])
def test_a_module_that_is_replaced_is_named(recipe: Recipe) -> None:
    model = build("mlp")
    ab = ABTraining(model, sgd(model.parameters()), recipe)
    step(ab)
    model[2] = nn.Linear(16, 12).double()
    backward(ab)
    with pytest.raises(UsageError, match=r"the model no longer has these parameters: 2\.weight, 2\.bias"):
        ab.optimizer.step()


def test_a_module_that_is_added_is_named() -> None:
    model = build("mlp")
    ab = ABTraining(model, sgd(model.parameters()), recipes.local_sgd(8, every=2))
    step(ab)
    model.append(nn.Linear(5, 5).double())
    backward(ab)
    with pytest.raises(UsageError, match=r"were added to the model after .*: 5\.weight, 5\.bias"):
        ab.optimizer.step()


def test_param_groups_in_another_order_are_no_resume() -> None:
    def start(order: int) -> ABTraining:
        model = build("mlp")
        kinds = [[p for p in model.parameters() if (p.ndim == 2) == (kind == order)] for kind in range(2)]
        optimizer = SGD([{"params": kinds[0], "lr": 0.1}, {"params": kinds[1], "lr": 0.001}], 0.1)
        return ABTraining(model, optimizer, recipes.local_sgd(8, every=2))

    one, other = start(0), start(1)
    step(one)
    with pytest.raises(CheckpointError, match=r"param group 0 of the state, but is .*in it now: use the same groups"):
        other.load_state_dict(reread(one.state_dict()))


def test_parameters_named_like_factors_in_another_order_are_no_resume() -> None:
    def start(order: str) -> ABTraining:
        model = build("mlp")
        model.lora = nn.ParameterDict({name: nn.Parameter(torch.ones(2, 2)) for name in "AB"})
        rest = [p for name, p in model.named_parameters() if "lora" not in name]
        groups = [{"params": [model.lora[order[0]], *rest]}, {"params": [model.lora[order[1]]], "lr": 0.001}]
        return ABTraining(model, SGD(groups, 0.1), recipes.local_sgd(8, every=2))

    with pytest.raises(CheckpointError, match=r"'lora.A' is in param group 0 of the state, but is not in it now"):
        start("BA").load_state_dict(reread(start("AB").state_dict()))


@pytest.mark.parametrize("leaves_gradients", [False, True])
def test_a_replaced_optimizer_is_reported(leaves_gradients: bool) -> None:
    model = build("mlp")
    ab = ABTraining(model, sgd(model.parameters()), recipes.local_sgd(8, every=4))
    step(ab)
    another = sgd(model.parameters())
    with pytest.raises(UsageError, match=r"changed, but abtrain saw no call to step\(\) of SGD"):
        for _ in range(3):
            another.zero_grad()
            backward(ab)
            another.step()
            if not leaves_gradients:
                another.zero_grad()
            ab.step()


def test_lbfgs_is_refused_where_gradients_are_shared() -> None:
    def work(comm: Communicator) -> None:
        model = build("mlp")
        ABTraining(model, LBFGS(model.parameters()), recipes.ddp(4), communicator=comm)

    assert all(isinstance(e, ConfigurationError) and "LBFGS calls its closure" in str(e) for e in told(2, work))


def test_different_learning_rates_are_refused_where_gradients_are_shared() -> None:
    def work(comm: Communicator) -> None:
        model = build("mlp")
        optimizer = SGD(model.parameters(), 0.1 * (1 + comm.rank))
        ABTraining(model, optimizer, recipes.ddp(4), communicator=comm, same_settings=False)

    assert all(isinstance(e, RanksDisagreeError) and "param_groups[0].lr" in str(e) for e in told(2, work))


def test_an_overflow_that_a_scaler_leaves_out_stops_no_other_optimizer() -> None:
    def work(comm: Communicator) -> list[float]:
        model = build("mlp", torch.float32)
        first, second = SGD(model[0].parameters(), 0.05), SGD([*model[2].parameters(), *model[4].parameters()], 0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        ab = ABTraining(model, [first, second], recipes.ddp(4), communicator=comm, grad_scaler=scaler)
        while not ab.finished:
            x, y = batch("mlp", comm.rank, ab.steps_done, torch.float32)
            scaler.scale(F.cross_entropy(ab(x), y)).backward()
            if ab.steps_done == 1:
                model[0].weight.grad.fill_(float("inf"))
            for optimizer in (first, second):
                scaler.step(optimizer)
                optimizer.zero_grad()
            scaler.update()
            ab.step()
        return [scaler.get_scale(), float(model[4].weight.detach().sum())]

    one, other = run_in_process(2, work)
    assert one == other and one[0] == 2.0


class ByName(ByHand):
    """One running sum for all parameters, under a word; and the shape of each, as a tuple."""

    def begin(self, parameter: nn.Parameter) -> dict[str, Any]:
        return {"shape": parameter.shape, "step": 0}

    def use(self, state: dict[str, Any], gradient: Tensor) -> Tensor:
        if state["shape"] != gradient.shape:
            state |= {"shape": gradient.shape, "step": 0}
        state["step"] += 1
        everyone = self.state.setdefault("all", {"sum": 0.0})  # type: ignore[call-overload]
        everyone["sum"] += float(gradient.abs().mean())
        return gradient / (1 + everyone["sum"]) * (1 + 1 / state["step"])


def test_state_under_string_keys_and_tuples_is_equalized_and_resumed() -> None:
    def make(model: nn.Module) -> ByName:
        return ByName(model.parameters())

    def cut(comm: Communicator) -> dict[str, Tensor]:
        first = Loop(comm, LOCAL, make=make)
        first.run(11)
        second = Loop(comm, LOCAL, make=make)
        second.ab.load_state_dict(reread(first.ab.state_dict()))
        return second.run()

    one, other = run_in_process(2, lambda comm: Loop(comm, LOCAL, make=make).run())
    resumed, _ = run_in_process(2, cut)
    assert all(torch.equal(one[n], other[n]) and torch.equal(one[n], resumed[n]) for n in one)


def test_settings_that_a_loop_adds_to_its_groups_are_resumed() -> None:
    model = build("mlp")
    ab = ABTraining(model, AdamW(model.parameters(), 1e-2), recipes.local_sgd(8, every=2))
    ab.optimizer.param_groups[0] |= {"epoch": 3, "lr": torch.tensor(1e-2).numpy()[()]}
    step(ab)
    again = build("mlp")
    other = ABTraining(again, AdamW(again.parameters(), 1e-2), recipes.local_sgd(8, every=2))
    other.load_state_dict(reread(ab.state_dict()))
    assert other.optimizer.param_groups[0]["epoch"] == 3
    assert other.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2)


def test_a_schedule_free_optimizer_shows_all_workers_the_same_model() -> None:
    """In the middle of a round inside `merged()`, whenever it goes to its mode of evaluation, and at the end."""

    def work(comm: Communicator) -> list[float]:
        loop, shown = Loop(comm, recipes.local_sgd(8, every=4), make=lambda m: ScheduleFree(m.parameters())), []
        loop.run(6)
        before = loop.model[0].weight.detach().clone()
        with loop.ab.merged() as model:
            loop.optimizer.eval()
            shown.append(float(model[0].weight.detach().sum()))
        loop.optimizer.train()
        assert torch.equal(before, loop.model[0].weight)
        loop.run()
        loop.optimizer.eval()
        return [*shown, float(loop.model[0].weight.detach().sum())]

    one, other = run_in_process(2, work)
    assert one == other


@pytest.mark.parametrize("moves", [0.01, 0.2])
def test_slow_weights_are_known_however_far_the_first_step_goes(moves: float) -> None:
    def work(comm: Communicator) -> Tensor:
        model = nn.Linear(4, 4)
        nn.init.ones_(model.weight)
        nn.init.ones_(model.bias)
        optimizer = Lookahead(SGD(model.parameters(), moves), every=100)
        ab = ABTraining(model, optimizer, recipes.local_sgd(2, every=1), communicator=comm)
        ab(torch.full((1, 4), 1.0 + comm.rank)).sum().backward()
        optimizer.step()
        ab.step()
        return optimizer.state[model.weight]["slow"].mean() - model.weight.detach().mean()

    (one, other) = run_in_process(2, work)
    assert float(one) == pytest.approx(moves, abs=1e-5) and float(other) == pytest.approx(2 * moves, abs=1e-5)


def test_copies_that_an_optimizer_keeps_in_a_later_attribute_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    class Late(Masters):
        def step(self, closure: Any = None) -> None:
            if not hasattr(self, "masters"):
                self.masters = [p.detach().clone() for p in self.param_groups[0]["params"]]
            SGD.step(self)

    model = build("mlp")
    ab = ABTraining(model, Late(model.parameters()), recipes.local_sgd(8, every=2))
    with caplog.at_level(logging.WARNING, "abtrain"):
        step(ab)
    assert "Late keeps copies of the weights in its attribute 'masters'" in caplog.text


INSIDE_MERGED: dict[str, Callable[[Loop, Any], Any]] = {
    "forward": lambda loop, saved: loop.ab(batch("mlp", 0, 0)[0]),
    "step": lambda loop, saved: loop.ab.step(),
    "state": lambda loop, saved: loop.ab.state_dict(),
    "optimizer": lambda loop, saved: loop.optimizer.step(),
    "load": lambda loop, saved: loop.ab.load_state_dict(saved),
    "load dense": lambda loop, saved: loop.ab.load_dense_state_dict(loop.ab.dense_state_dict()),
    "close": lambda loop, saved: loop.ab.close(),
}


@pytest.mark.parametrize("what", INSIDE_MERGED)
def test_nothing_is_trained_saved_or_loaded_inside_merged(what: str) -> None:
    def work(comm: Communicator) -> None:
        loop = Loop(comm, recipes.local_sgd(8, every=4))
        loop.run(2)
        saved = reread(loop.ab.state_dict())
        backward(loop.ab)
        with loop.ab.merged():
            INSIDE_MERGED[what](loop, saved)

    assert all(isinstance(e, UsageError) and "leave the block first" in str(e) for e in told(2, work))


def test_a_frozen_parameter_moved_by_the_model_is_reported_with_the_remedy() -> None:
    def work(comm: Communicator) -> None:
        model = build("mlp")
        model[0].requires_grad_(False)
        ab = ABTraining(model, sgd([p for p in model.parameters() if p.requires_grad]), LOCAL, communicator=comm)
        while not ab.finished:
            step(ab)
            model[0].weight.data.mul_(0.9 + 0.01 * comm.rank)

    assert all("make it a buffer" in str(error) and "0.weight" in str(error) for error in told(2, work))
