"""Models, optimizers and loops that differ between workers or change: told before anything is averaged."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils._pytree import tree_map

from abtrain import ABTraining, recipes, weights_digest
from abtrain.comm.communicator import Communicator
from abtrain.comm.in_process import run_in_process
from abtrain.errors import ConfigurationError, RanksDisagreeError, UsageError
from abtrain.recipes.recipe import Recipe
from tests.cases import SCHEDULE, batch, build
from tests.faults.loops import Loop, told
from tests.gloo import run_gloo

AB = recipes.ab(15, **SCHEDULE, sigma_cutoff=0.2)
RECIPES = {"ddp": recipes.ddp(12), "local_sgd": recipes.local_sgd(12, every=4), "ab": AB}


def freeze_another(model: nn.Module, rank: int) -> None:
    model.get_parameter("0.bias" if rank == 1 else "2.bias").requires_grad_(False)


def freeze_one_more(model: nn.Module, rank: int) -> None:
    model.get_parameter("5.weight").requires_grad_(rank != 1)


def channels_last(model: nn.Module, rank: int) -> None:
    if rank == 1:
        model.to(memory_format=torch.channels_last)


def transposed(model: nn.Module, rank: int) -> None:
    if rank == 1:
        weight = model.get_parameter("5.weight")
        weight.data = weight.data.T.contiguous().T


UNLIKE: dict[str, tuple[Callable[[nn.Module, int], None], str]] = {
    "different ones frozen": (freeze_another, "model.0.bias.requires_grad is True on rank 0"),
    "one more frozen": (freeze_one_more, "model.5.weight.requires_grad is True on rank 0"),
    "channels last": (channels_last, "model.0.weight.strides is '(18, 9, 3, 1)' on rank 0"),
    "a transposed weight": (transposed, "model.5.weight.strides is '(24, 1)' on rank 0"),
}


def build_unlike(comm: Communicator, recipe: str, kind: str) -> str:
    """The message that this worker gets."""
    model = build("conv", torch.float32)
    UNLIKE[kind][0](model, comm.rank)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(RanksDisagreeError) as error:
        ABTraining(model, optimizer, RECIPES[recipe], communicator=comm)
    assert not optimizer._optimizer_step_pre_hooks  # nothing is left on it
    return str(error.value)


@pytest.mark.parametrize("kind", UNLIKE)
@pytest.mark.parametrize("recipe", RECIPES)
def test_models_that_differ_in_layout_or_training(recipe: str, kind: str) -> None:
    messages = run_in_process(3, lambda comm: build_unlike(comm, recipe, kind))
    assert len(set(messages)) == 1 and UNLIKE[kind][1] in messages[0] and "on rank 1" in messages[0]


@pytest.mark.parametrize("kind", UNLIKE)
def test_models_that_differ_in_layout_or_training_in_processes(kind: str) -> None:
    """DDP alone would abort, or average elements that do not belong together."""
    messages = run_gloo(3, build_unlike, "ddp", kind)
    assert len(set(messages)) == 1 and UNLIKE[kind][1] in messages[0] and "on rank 1" in messages[0]


def test_memory_formats_that_differ_in_name_only() -> None:
    """The strides of dimensions of one element say nothing about the order of elements."""

    def work(comm: Communicator) -> None:
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4, 2))
        if comm.rank == 1:
            model.to(memory_format=torch.channels_last)
        ABTraining(model, torch.optim.SGD(model.parameters(), lr=0.1), recipes.ddp(4), communicator=comm)

    run_in_process(2, work)


OPTIMIZERS: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], Callable[[Any], torch.optim.Optimizer], str]] = {
    "learning rate": (
        lambda p: torch.optim.AdamW(p, lr=1e-2),
        lambda p: torch.optim.AdamW(p, lr=2e-2),
        "param_groups[0].lr is 0.01 on rank 0 and 0.02 on rank 1",
    ),
    "learning rate as a tensor": (
        lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.5)),
        lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.25)),
        "param_groups[0].lr is 0.5 on rank 0 and 0.25 on rank 1",
    ),
    "decay": (
        lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.0),
        lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1),
        "param_groups[0].weight_decay is 0.0 on rank 0 and 0.1 on rank 1",
    ),
    "betas": (
        lambda p: torch.optim.Adam(p, betas=(0.9, 0.999)),
        lambda p: torch.optim.Adam(p, betas=(0.9, 0.99)),
        "param_groups[0].betas[1] is 0.999 on rank 0 and 0.99 on rank 1",
    ),
    "momentum of the second group": (
        lambda p: torch.optim.SGD([{"params": p[:2]}, {"params": p[2:], "momentum": 0.9}], lr=0.1),
        lambda p: torch.optim.SGD([{"params": p[:2]}, {"params": p[2:], "momentum": 0.8}], lr=0.1),
        "param_groups[1].momentum is 0.9 on rank 0 and 0.8 on rank 1",
    ),
    "who belongs to which group": (
        lambda p: torch.optim.SGD([{"params": p[:2]}, {"params": p[2:]}], lr=0.1),
        lambda p: torch.optim.SGD([{"params": p[:3]}, {"params": p[3:]}], lr=0.1),
        "param_groups[0].parameters",
    ),
    "a flag": (
        lambda p: torch.optim.Adam(p, amsgrad=False),
        lambda p: torch.optim.Adam(p, amsgrad=True),
        "param_groups[0].amsgrad is False on rank 0 and True on rank 1",
    ),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_optimizers_with_different_settings(recipe: str, kind: str) -> None:
    most, odd, words = OPTIMIZERS[kind]

    def work(comm: Communicator) -> None:
        model = build("mlp", torch.float32)
        make = odd if comm.rank == 1 else most
        ABTraining(model, make(list(model.parameters())), RECIPES[recipe], communicator=comm)

    for error in told(2, work):
        assert isinstance(error, RanksDisagreeError) and words in str(error)


HARMLESS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "a number of numpy": lambda p: torch.optim.AdamW(p, lr=np.float64(0.01)),
    "a tensor": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01, dtype=torch.float64)),
    "a list": lambda p: torch.optim.AdamW(p, lr=0.01, betas=[0.9, 0.999]),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("kind", HARMLESS)
def test_settings_that_say_the_same_are_no_difference(kind: str) -> None:
    def work(comm: Communicator) -> None:
        make = HARMLESS[kind] if comm.rank else lambda p: torch.optim.AdamW(p, lr=0.01)
        model = build("mlp", torch.float32)
        ABTraining(model, make(model.parameters()), AB, communicator=comm)

    run_in_process(2, work)


def test_what_a_scheduler_or_a_loop_adds_to_groups_is_its_own() -> None:
    def work(comm: Communicator) -> None:
        model = build("mlp", torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=1 if comm.rank else 1.0)
        if comm.rank == 1:
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
            optimizer.param_groups[0]["mine"] = "worker 1"
        ABTraining(model, optimizer, AB, communicator=comm)

    run_in_process(2, work)


def test_the_order_of_an_optimizers_parameters_does_not_matter() -> None:
    def work(comm: Communicator) -> None:
        model = build("mlp", torch.float32)
        parameters = list(model.parameters())
        optimizer = torch.optim.SGD(parameters[::-1] if comm.rank else parameters, lr=0.1)
        ABTraining(model, optimizer, AB, communicator=comm)

    run_in_process(2, work)


def lower_the_rate(loop: Loop) -> None:
    loop.optimizer.param_groups[0]["lr"] *= 0.5


def change_betas(loop: Loop) -> None:
    loop.optimizer.param_groups[0]["betas"] = (0.8, 0.9)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lower_the_rate, "param_groups[0].lr is 0.01 on rank 0 and 0.005 on rank 1"),
        (change_betas, "param_groups[0].betas[0] is 0.9 on rank 0 and 0.8 on rank 1"),
    ],
)
def test_changes_on_one_worker_are_reported_at_the_next_merge(change: Callable[[Loop], None], words: str) -> None:
    def work(comm: Communicator) -> None:
        loop = Loop(comm, AB)
        loop.run(6)  # during the group phase, which ends after step 7
        if comm.rank == 1:
            change(loop)
        loop.run()

    for error in told(2, work):
        assert isinstance(error, RanksDisagreeError)
        assert words in str(error)


@pytest.mark.parametrize("change", [lower_the_rate, change_betas])
def test_changes_where_gradients_are_shared_are_reported_at_the_next_phase(change: Callable[[Loop], None]) -> None:
    def work(comm: Communicator) -> None:
        loop = Loop(comm, AB)
        loop.run(8)  # during the rebound, which ends after step 9
        x, y = batch("mlp", comm.rank, 8)
        F.cross_entropy(loop.ab(x), y).backward()
        loop.optimizer.step()
        if comm.rank == 1:
            change(loop)
        loop.ab.step()

    for error in told(2, work):
        assert isinstance(error, RanksDisagreeError) and "workers differ at step 9, phase group" in str(error)


def test_different_settings_may_be_intended() -> None:
    """Then weights are compared as ever, and nothing else of the optimizer's is looked at."""

    def work(comm: Communicator, resumes: bool) -> str:
        model = build("mlp")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2 * (1 + comm.rank), weight_decay=0.1 * comm.rank)
        recipe = recipes.local_sgd(24, every=4, delay=2)
        ab = ABTraining(model, optimizer, recipe, communicator=comm, same_settings=False)
        while not ab.finished:
            x, y = batch("mlp", comm.rank, ab.steps_done)
            F.cross_entropy(ab(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            ab.step()
            if resumes and ab.steps_done % 5 == 0:
                ab.load_state_dict(copy.deepcopy(ab.state_dict()))
        return weights_digest(ab.dense_state_dict())

    ends = [run_in_process(3, lambda comm, r=resumes: work(comm, r)) for resumes in (False, True)]
    assert len(set(ends[0] + ends[1])) == 1


def test_settings_that_an_optimizer_changes_itself_are_no_difference() -> None:
    """A step that a gradient scaler skips on one worker leaves such a count there."""

    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            self.param_groups[0]["k"] = self.param_groups[0].get("k", 0) + 1
            return super().step(closure)

    def work(comm: Communicator) -> None:
        loop = Loop(comm, AB)
        loop.optimizer.param_groups[0]["k"] = comm.rank
        loop.run()

    run_in_process(2, work)


def stranger(loop: Loop) -> None:
    loop.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 3, dtype=torch.float64))]})


def registered_later(loop: Loop) -> None:
    loop.model.register_parameter("late", nn.Parameter(torch.ones(2, 3, dtype=torch.float64)))
    loop.optimizer.add_param_group({"params": [loop.model.get_parameter("late")]})


def thawed(loop: Loop) -> None:
    loop.model.get_parameter("0.bias").requires_grad_(True)


def frozen_later(loop: Loop) -> None:
    loop.model.get_parameter("2.bias").requires_grad_(False)


def pruned(loop: Loop) -> None:
    prune.random_unstructured(loop.model.get_submodule("2"), "bias", 0.5)


def parametrized(loop: Loop) -> None:
    parametrize.register_parametrization(loop.model.get_submodule("4"), "bias", nn.Identity())


def set_again(loop: Loop) -> None:
    loop.model.get_submodule("2").bias = nn.Parameter(loop.model.get_parameter("2.bias").detach().clone())


def deleted(loop: Loop) -> None:
    loop.model.get_submodule("2").register_parameter("bias", None)


def taken_out(loop: Loop) -> None:
    del loop.optimizer.param_groups[0]["params"][-1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (stranger, r"1 parameters that the model did not have .*shapes \(2, 3\)\), so workers would not share them"),
        (registered_later, r"1 parameters that the model did not have .*shapes \(2, 3\)\)"),
        (thawed, "were unfrozen after ABTraining was built, so workers do not share them: 0.bias"),
        (taken_out, "parameters that workers share are no longer in the optimizer: 4.bias"),
        (frozen_later, "were frozen after ABTraining was built: 2.bias"),
        (pruned, "the model no longer has these parameters: 2.bias. Pruning, weight norm"),
        (parametrized, "the model no longer has these parameters: 4.bias"),
        (set_again, "the model no longer has these parameters: 2.bias"),
        (deleted, "the model no longer has these parameters: 2.bias"),
    ],
)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("workers", [1, 2])
def test_an_optimizer_that_trains_other_parameters_than_workers_share(
    recipe: str, change: Callable[[Loop], None], words: str, workers: int
) -> None:
    def work(comm: Communicator) -> None:
        model = build("mlp")
        model.get_parameter("0.bias").requires_grad_(False)
        loop = Loop(comm, RECIPES[recipe], model)
        loop.run(5)
        change(loop)
        before = [(p, p.detach().clone()) for p in model.parameters()]
        with pytest.raises(UsageError, match=words):
            loop.step()
        # It is told before the step, on every worker that it happens to.
        assert all(torch.equal(p, value) for p, value in before)

    run_in_process(workers, work)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_second_optimizer_step_without_a_training_step(recipe: str, workers: int) -> None:
    def work(comm: Communicator) -> None:
        loop = Loop(comm, RECIPES[recipe])
        x, y = batch("mlp", comm.rank, 0)
        F.cross_entropy(loop.ab(x), y).backward()
        loop.optimizer.step()
        before = [p.detach().clone() for p in loop.model.parameters()]
        with pytest.raises(UsageError, match=r"optimizer.step\(\) was called again before ab.step\(\)"):
            loop.optimizer.step()
        assert all(map(torch.equal, loop.model.parameters(), before))

    run_in_process(workers, work)


def expanded_buffer(model: nn.Module) -> None:
    model.register_buffer("x", torch.ones(1).expand(6))


def expanded_parameter(model: nn.Module) -> None:
    model.register_parameter("x", nn.Parameter(torch.ones(1).expand(6)))


@pytest.mark.parametrize("change", [expanded_buffer, expanded_parameter])
def test_expanded_tensors_are_refused(change: Callable[[nn.Module], None]) -> None:
    def work(comm: Communicator) -> None:
        model = build("mlp")
        change(model)
        Loop(comm, recipes.ddp(3), model)

    for error in told(2, work):
        assert isinstance(error, ConfigurationError) and "so they cannot be written one by one: x" in str(error)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_step_that_a_gradient_scaler_skips_moves_nothing(kind: Any, fused: bool) -> None:
    """Nor does it decay factors under the preconditioner."""
    model = build("mlp", torch.float32)
    optimizer = kind(model.parameters(), lr=1e-2, weight_decay=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    recipe = recipes.ab_outer(20, every=4, warmup_steps=4, sigma_cutoff=0.3, damping=0.1)
    ab = ABTraining(model, optimizer, recipe, grad_scaler=scaler)
    for step in range(10):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        x, y = batch("mlp", 0, step, torch.float32)
        bad = step in (6, 9)
        scaler.scale(F.cross_entropy(ab(x), y) * (math.inf if bad else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if bad:
            assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        ab.step()
    assert ab.rank_history


def long_recipes() -> list[Recipe]:
    steps = 10**7
    return [
        recipes.local_sgd(steps, every=20, rebound_steps=5),
        recipes.ab(steps, warmup_steps=10, ab_steps=6, rebound_steps=3),
        recipes.ab_outer(steps, refactor_every=1),
    ]


@pytest.mark.parametrize("recipe", long_recipes(), ids=lambda recipe: recipe.name)
@pytest.mark.timeout(20)
def test_a_long_recipe_is_built_at_once(recipe: Recipe) -> None:
    model = build("mlp", torch.float32)
    ABTraining(model, torch.optim.SGD(model.parameters(), lr=0.1), recipe)


def test_doubtful_settings_are_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    run_in_process(4, lambda comm: Loop(comm, recipes.local_sgd(8, every=4)) and None, group_size=4)
    assert caplog.text.count("group_size=4 makes one group of all 4 workers") == 1
    assert "Use group_size=1" in caplog.text


@pytest.mark.parametrize("logged", [True, False], ids=["logging", "no logging"])
def test_the_start_says_who_belongs_together(
    logged: bool, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from abtrain.engine import beginning

    caplog.set_level("INFO")
    monkeypatch.setattr(beginning, "is_set_up", lambda: logged)
    run_in_process(4, lambda comm: Loop(comm, AB) and None, group_size=2)
    line = (
        "4 workers in 2 groups of 2; traffic between groups: gradients at every step (warmup, rebound) and merges "
        "every 4 steps (group)"
    )
    assert (caplog.text.count(line), capsys.readouterr().err.count(line)) == ((1, 0) if logged else (0, 1))


class Quantised(Tensor):
    """Whole numbers and a scale that pose as a float32 weight, as quantised weights do."""

    @staticmethod
    def __new__(cls, numbers: Tensor, scale: float) -> Any:
        return Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=torch.float32)  # type: ignore[attr-defined]

    def __init__(self, numbers: Tensor, scale: float) -> None:
        self.numbers, self.scale = numbers, scale

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].numbers, args[0].scale)

        def plain(value: Any) -> Any:
            return value.numbers.float() * value.scale if isinstance(value, cls) else value

        return function(*tree_map(plain, args), **tree_map(plain, kwargs or {}))


class Adapted(nn.Module):
    """A frozen quantised weight, and a trained layer beside it."""

    def __init__(self, trained: bool = False, shift: int = 0) -> None:
        super().__init__()
        weight = Quantised((torch.arange(50).view(5, 10) % 7 - 3 + shift).to(torch.int8), 0.01)
        self.base, self.net = nn.Parameter(weight, requires_grad=trained), build("mlp", torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = F.linear(x, self.base) + self.net(x)
        return y


def train_adapted(comm: Communicator, model: nn.Module) -> str:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ab = ABTraining(model, optimizer, recipes.local_sgd(8, every=4), communicator=comm)
    while not ab.finished:
        x, y = batch("mlp", comm.rank, ab.steps_done, torch.float32)
        F.cross_entropy(ab(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        ab.step()
    return weights_digest(ab.dense_state_dict())


def test_frozen_weights_of_a_class_of_their_own_work() -> None:
    assert len(set(run_in_process(2, lambda comm: train_adapted(comm, Adapted())))) == 1


def test_those_that_differ_or_are_trained_are_refused() -> None:
    differ = told(2, lambda comm: train_adapted(comm, Adapted(shift=comm.rank)))
    assert all(isinstance(one, RanksDisagreeError) and "differ between workers: base" in str(one) for one in differ)
    trained = told(2, lambda comm: train_adapted(comm, Adapted(trained=True)))
    assert all(isinstance(one, ConfigurationError) and "base (Quantised)" in str(one) for one in trained)


@pytest.mark.parametrize("recipe", RECIPES)
def test_trained_parameters_that_the_optimizer_does_not_hold(recipe: str) -> None:
    """As with one optimizer for matrices and another one for the rest."""

    def work(comm: Communicator) -> None:
        model = build("mlp", torch.float32)
        matrices = [p for p in model.parameters() if p.ndim == 2]
        ABTraining(model, torch.optim.SGD(matrices, 0.1), RECIPES[recipe], communicator=comm)

    for error in told(2, work):
        assert isinstance(error, ConfigurationError)
        assert "these parameters require gradients, but are in no optimizer: 0.bias, 2.bias, 4.bias" in str(error)


@pytest.mark.parametrize("optimizer", [None, [], "adamw", object()], ids=["None", "a list", "a name", "an object"])
def test_an_object_that_is_no_optimizer(optimizer: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"pass a torch.optim.Optimizer, or a list of optimizers"):
        ABTraining(build("mlp"), optimizer, AB)


def test_an_optimizer_that_cannot_follow_factors() -> None:
    model = build("mlp")
    with pytest.raises(ConfigurationError, match="LBFGS keeps one flat copy"):
        ABTraining(model, torch.optim.LBFGS(model.parameters()), AB)
    ABTraining(model, torch.optim.LBFGS(model.parameters()), recipes.ddp(3))


def test_gradient_accumulation_has_one_way() -> None:
    model = build("mlp")
    ab = ABTraining(model, torch.optim.SGD(model.parameters(), 0.1), recipes.ddp(3))
    assert ab.require_backward_grad_sync
    with pytest.raises(UsageError, match=r"with ab.no_sync\(\):"):
        ab.require_backward_grad_sync = False
