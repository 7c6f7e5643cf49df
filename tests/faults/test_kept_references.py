"""Loops that keep references from before the weights were factored: parameter lists, hooks, averages, the model."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from abtrain import ABTraining, FixedRank, recipes
from abtrain.comm.communicator import Communicator, SingleProcess
from abtrain.comm.in_process import run_in_process
from abtrain.errors import CheckpointError, ConfigurationError, UsageError
from tests.cases import SCHEDULE, adamw, batch, build, largest_difference
from tests.faults.loops import AB, OUTER, Loop
from tests.gloo import run_gloo

Act = Callable[[Any], object]


def factored_loop(kind: str = "mlp", **options: Any) -> tuple[Loop, list[nn.Parameter]]:
    """A loop whose weights are currently factored, and the parameters that it kept from before."""
    model = build(kind)
    kept = list(model.parameters())
    loop = Loop(SingleProcess(), recipes.ab(15, **{**SCHEDULE, "warmup_steps": 0}, sigma_cutoff=0.2), model, **options)
    return loop, kept


def backward(model: nn.Module, kind: str = "mlp", step: int = 0) -> None:
    x, y = batch(kind, 0, step)
    F.cross_entropy(model(x), y).backward()


def live_norm(model: nn.Module) -> float:
    return float(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))


def test_a_kept_parameter_reads_as_the_weight() -> None:
    loop, kept = factored_loop()
    W, p = loop.model.state_dict()["0.weight"], kept[0]
    assert isinstance(p, nn.Parameter) and p.shape == (16, 10) and p.numel() == 160 and p.dtype == torch.float64
    assert p.requires_grad and p.is_leaf and p in {p} and hash(p) == id(p)
    for read in (p.detach(), p.data, p.clone(), p + 0, p.view(-1).view(16, 10), torch.stack([p])[0]):
        assert torch.equal(read, W)
    assert torch.equal(p.norm(), W.norm()) and type(p * 2) is type(p.data - W) is Tensor
    assert torch.equal(torch._foreach_norm(kept)[0], W.norm())
    assert nn.utils.parameters_to_vector(kept).shape == (sum(p.numel() for p in kept),)
    for copied in (copy.deepcopy(p), copy.copy(p)):
        assert type(copied) is nn.Parameter and torch.equal(copied, W)
    loop.ab.close()
    assert type(p) is nn.Parameter and not p.__dict__ and loop.model[0].weight is p


WRITES: dict[str, Act] = {
    "a mask": lambda p: p.data.mul_(0.5),
    "a copy": lambda p: p.copy_(torch.zeros(16, 10)),
    "an addition": lambda p: p.add_(1.0),
    "to a row": lambda p: p.detach()[0].zero_(),
    "to an item": lambda p: p.data.__setitem__(0, 1.0),
    "to a view": lambda p: p.view(-1).zero_(),
    "of new data": lambda p: setattr(p, "data", torch.zeros(16, 10)),
    "of a list": lambda p: torch._foreach_mul_([p], 0.5),
    "by initialisation": lambda p: nn.init.zeros_(p),
    "as output": lambda p: torch.add(torch.ones(16, 10), 1.0, out=p.data),
    "that freezes": lambda p: p.requires_grad_(False),
    "of requires_grad": lambda p: setattr(p, "requires_grad", False),
    "of a hook": lambda p: p.register_hook(print),
    "of a later hook": lambda p: p.register_post_accumulate_grad_hook(print),
    "that retains": lambda p: p.retain_grad(),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writing_to_a_kept_parameter_is_an_error(write: Act) -> None:
    loop, kept = factored_loop()
    before = copy.deepcopy(loop.model.state_dict())
    with (
        torch.no_grad(),
        pytest.raises(UsageError, match=r"currently factored .* before a factored phase.*exclude"),
    ):
        write(kept[0])
    assert largest_difference(before, loop.model.state_dict()) == 0


CLIPS: dict[str, Act] = {
    "norm": lambda kept: nn.utils.clip_grad_norm_(kept, 1e-3),
    "norm of one": lambda kept: [nn.utils.clip_grad_norm_(p, 1e-5) for p in kept],
    "foreach": lambda kept: nn.utils.clip_grad_norm_(kept, 1e-3, foreach=True),
    "value": lambda kept: nn.utils.clip_grad_value_(kept, 1e-5),
    "by hand": lambda kept: [p.grad.mul_(1e-5) for p in kept],
    "by setting": lambda kept: [setattr(p, "grad", p.grad * 1e-5) for p in kept],
}


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
@pytest.mark.parametrize("kind", ["mlp", "conv", "attention"])
def test_gradients_of_kept_parameters_are_clipped(kind: str, clip: Act) -> None:
    loop, kept = factored_loop(kind)
    for _ in range(2):
        backward(loop.ab, kind)
        assert live_norm(loop.model) > 1e-2
        assert float(nn.utils.get_total_norm([p.grad for p in kept])) == pytest.approx(live_norm(loop.model))
        clip(kept)
        assert live_norm(loop.model) <= 1.01e-3


def test_a_kept_gradient_is_that_of_the_factors_and_shares_their_memory() -> None:
    loop, kept = factored_loop()
    p, layer = kept[0], loop.model[0]
    assert p.grad is None
    backward(loop.model)
    A, B = layer.weight_A.grad, layer.weight_B.grad
    expected = [gradient.flatten() for gradient in (A, B) if gradient is not None]
    assert torch.equal(p.grad, torch.cat(expected)) and p.grad is p.grad
    backward(loop.model)
    torch.testing.assert_close(p.grad, 2 * torch.cat(expected))
    with pytest.raises(UsageError, match=r"gradient of shape \(16, 10\) was set .* one vector of shape"):
        p.grad = torch.zeros(16, 10)
    p.grad = None
    assert layer.weight_A.grad is None and layer.weight_B.grad is None and p.grad is None


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_loop_over_kept_parameters_that_clips_trains_as_one_over_live_ones(set_to_none: bool) -> None:
    def run(parameters: Callable[[Loop, list[nn.Parameter]], Any]) -> dict[str, Tensor]:
        loop, kept = factored_loop()
        while not loop.ab.finished:
            backward(loop.ab, step=loop.ab.steps_done)
            parameters(loop, kept)
            loop.optimizer.step()
            loop.optimizer.zero_grad(set_to_none=set_to_none)
            loop.ab.step()
        return loop.ab.dense_state_dict()

    by_kept = run(lambda loop, kept: nn.utils.clip_grad_norm_(kept, 0.1))
    by_live = run(lambda loop, kept: loop.ab.clip_grad_norm_(0.1))
    assert largest_difference(by_kept, by_live) < 1e-12


def test_clipping_by_the_engine_returns_the_norm_that_was() -> None:
    loop, _ = factored_loop()
    backward(loop.ab)
    before = live_norm(loop.model)
    assert float(loop.ab.clip_grad_norm_(1e-3)) == pytest.approx(before)
    assert live_norm(loop.model) == pytest.approx(1e-3, rel=1e-2)
    assert float(loop.ab.clip_grad_norm_(1.0, norm_type=float("inf"))) < 1e-3


def clip_kept(comm: Communicator) -> tuple[list[float], dict[str, Tensor]]:
    model = build("mlp")
    kept, norms = list(model.parameters()), []
    optimizer = adamw(model.parameters())
    ab = ABTraining(model, optimizer, AB, communicator=comm)
    while not ab.finished:
        x, y = batch("mlp", comm.rank, ab.steps_done)
        F.cross_entropy(ab(x), y).backward()
        nn.utils.clip_grad_norm_(kept, 1e-3)
        norms.append(live_norm(model))
        optimizer.step()
        optimizer.zero_grad()
        ab.step()
    return norms, ab.dense_state_dict()


@pytest.mark.parametrize("group_size", [1, 2])
def test_kept_parameters_are_clipped_where_gradients_are_shared(group_size: int) -> None:
    (norms, one), (_, other) = run_gloo(2, clip_kept, group_size=group_size)
    assert len(norms) == AB.total_steps and max(norms) <= 1.01e-3
    assert largest_difference(one, other) == 0


# Averages of weights, as people write them.


def by_hand(average: list[Tensor], kept: list[nn.Parameter]) -> None:
    for mine, its in zip(average, kept, strict=True):
        mine.mul_(0.9).add_(its.data, alpha=0.1)


def by_foreach(average: list[Tensor], kept: list[nn.Parameter]) -> None:
    torch._foreach_lerp_(average, kept, 0.1)


def by_difference(average: list[Tensor], kept: list[nn.Parameter]) -> None:
    for mine, its in zip(average, kept, strict=True):
        mine.sub_(0.1 * (mine - its))


@pytest.mark.parametrize("update", [by_hand, by_foreach, by_difference])
def test_an_average_over_kept_parameters_is_that_of_the_dense_weights(update: Callable[..., None]) -> None:
    loop, kept = factored_loop()
    average = [p.clone().detach() for p in kept]
    ema = loop.ab.ema(0.9)
    while not loop.ab.finished:
        loop.step()
        with torch.no_grad():
            update(average, kept)
        ema.update()
    state = ema.state_dict()
    for mine, name in zip(average, ("0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"), strict=True):
        torch.testing.assert_close(mine, state[name])
    build("mlp").load_state_dict(state)


@pytest.mark.parametrize("multi", [True, False])
def test_an_averaged_model_is_right_or_says_what_to_do(multi: bool) -> None:
    recipe = recipes.ab(15, **SCHEDULE, sigma_cutoff=0.2)
    model = nn.Sequential(*(nn.Linear(10, 10, bias=False) for _ in range(3))).double()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9) if multi else None)
    loop = Loop(SingleProcess(), recipe, model)
    while not loop.ab.finished:
        loop.step()
        factored = bool(loop.ab._model.records)
        before = copy.deepcopy(average.module.state_dict())
        if factored:
            with pytest.raises(UsageError, match=r"combined with other tensors.*state_dict\(\).*ABTraining\.ema"):
                average.update_parameters(loop.model)
            assert largest_difference(before, average.module.state_dict()) == 0
        else:
            average.update_parameters(loop.model)


def test_parameters_of_a_factored_model_can_be_counted_and_summed() -> None:
    loop, _ = factored_loop()
    assert sum((p.square().sum() for p in loop.model.parameters()), torch.zeros(())) > 0
    assert all(torch.isfinite(p.mean() + p.abs().max()) for p in loop.model.parameters())
    for p in loop.model.parameters():
        p.requires_grad_(True)
    assert nn.utils.parameters_to_vector(loop.model.parameters()).ndim == 1
    loop.model.float().double()
    loop.step()


def test_an_average_can_be_saved_and_gone_on_from() -> None:
    loop, _ = factored_loop()
    ema = loop.ab.ema(0.5)
    loop.step()
    ema.update()
    saved, other = ema.state_dict(), loop.ab.ema(0.5)
    other.load_state_dict(saved)
    assert largest_difference(saved, other.state_dict()) == 0
    with pytest.raises(CheckpointError, match=r"0\.weight"):
        other.load_state_dict({**saved, "0.weight": torch.zeros(2)})


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(ConfigurationError, match="0 <= decay < 1"):
        factored_loop()[0].ab.ema(decay)


def test_averages_of_halves_are_kept_in_float32_and_counters_follow() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ema = ABTraining(model, optimizer, recipes.ddp(4)).ema(0.999)
    model[1].num_batches_tracked.add_(3)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    before = ema.state_dict()["0.weight"]
    ema.update()
    assert ema.state_dict()["0.weight"].dtype == torch.float32
    torch.testing.assert_close(ema.state_dict()["0.weight"] - before, torch.full((4, 4), 1e-3), rtol=0.2, atol=1e-4)
    assert ema.state_dict()["1.num_batches_tracked"] == 3


# Hooks on weights.


@pytest.mark.parametrize(("kind", "name"), [("mlp", "2.weight"), ("conv", "0.weight"), ("attention", "head.weight")])
def test_a_hook_on_a_weight_sees_its_gradient_at_every_step(kind: str, name: str) -> None:
    model = build(kind)
    shapes = []
    weight = model.get_parameter(name)
    handle = weight.register_hook(lambda gradient: shapes.append(gradient.shape))
    ab_loop = Loop(SingleProcess(), AB, model)
    for step in range(AB.total_steps):
        backward(ab_loop.ab, kind, step)
        ab_loop.optimizer.step()
        ab_loop.optimizer.zero_grad()
        ab_loop.ab.step()
    assert shapes == [weight.shape] * AB.total_steps
    handle.remove()
    backward(model, kind)
    assert len(shapes) == AB.total_steps


def hooked_loop(hook: Callable[[Tensor], Tensor | None]) -> Loop:
    model = build("mlp")
    model[2].weight.register_hook(hook)
    return Loop(SingleProcess(), recipes.ab_outer(9, every=3, warmup_steps=0, rank_rule=FixedRank(3)), model)


def test_a_gradient_that_a_hook_returns_flows_on_to_both_factors() -> None:
    plain, doubled = hooked_loop(lambda gradient: None), hooked_loop(lambda gradient: 2 * gradient)
    for loop in (plain, doubled):
        backward(loop.ab)
    for letter in "AB":
        one, other = (getattr(loop.model[2], f"weight_{letter}").grad for loop in (plain, doubled))
        torch.testing.assert_close(2 * one, other)


def test_a_hook_is_called_once_for_each_backward_pass() -> None:
    calls: list[Tensor] = []
    loop = hooked_loop(calls.append)  # type: ignore[arg-type]  # returns None
    model, (x, y) = loop.model, batch("mlp", 0, 0)
    (F.cross_entropy(model(x), y) + F.cross_entropy(model(2 * x), y)).backward()
    assert len(calls) == 1
    losses = [F.cross_entropy(model(x), y) for x in (x, 2 * x)]
    for loss in losses:
        loss.backward()
    assert len(calls) == 3
    torch.testing.assert_close(calls[1] + calls[2], calls[0])
    with torch.no_grad():
        model(x)
    backward(model)
    assert len(calls) == 4


def test_a_weight_with_a_hook_follows_its_factors_whoever_writes_them() -> None:
    loop = hooked_loop(lambda gradient: None)
    layer, x = loop.model[2], batch("mlp", 0, 0)[0]
    before = loop.model(x)
    layer.weight_A.data.mul_(2.0)
    torch.testing.assert_close(layer.weight, loop.model.state_dict()["2.weight"])
    assert not torch.equal(loop.model(x), before)
    with torch.no_grad():
        layer.weight_A.mul_(2.0)
    with pytest.raises(RuntimeError, match="changed between the forward pass and its backward pass"):
        before.sum().backward()


def test_a_hook_that_was_removed_is_called_no_more() -> None:
    model, calls = build("mlp"), []
    handle = model[2].weight.register_hook(calls.append)
    loop = Loop(SingleProcess(), recipes.ab(15, **{**SCHEDULE, "warmup_steps": 0}), model)
    loop.step()
    handle.remove()
    loop.step()
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["0.weight", "2.weight"])
def test_a_hook_after_accumulation_is_called_once_with_the_kept_parameter(name: str) -> None:
    model = build("mlp")
    weight, seen = model.get_parameter(name), []
    weight.register_post_accumulate_grad_hook(lambda p: seen.append((p is weight, p.grad is not None)))
    loop = Loop(SingleProcess(), recipes.ab_outer(9, every=3, warmup_steps=3, rank_rule=FixedRank(3)), model)
    loop.run()
    assert seen == [(True, True)] * 9


def hooks_on_ranks(comm: Communicator) -> tuple[list[int], int]:
    model, counts = build("mlp"), [0, 0]

    def count(place: int) -> None:
        counts[place] += 1

    model[0].weight.register_hook(lambda gradient: count(0))
    model[2].weight.register_post_accumulate_grad_hook(lambda p: count(1))
    Loop(comm, AB, model).run()
    return counts, AB.total_steps


def test_hooks_are_called_on_ranks_that_share_gradients() -> None:
    for counts, steps in run_gloo(2, hooks_on_ranks, group_size=2):
        assert counts == [steps, steps]


# The end of it.


@pytest.mark.parametrize("kind", ["mlp", "conv", "attention"])
def test_a_closed_model_and_its_optimizer_are_plain_again(kind: str) -> None:
    model = build(kind)
    attributes = [set(vars(module)) for module in model.modules()]
    types, kept = [type(module) for module in model.modules()], list(model.parameters())
    optimizer = adamw(model.parameters())
    ab = ABTraining(model, optimizer, recipes.ab(15, **{**SCHEDULE, "warmup_steps": 0}, sigma_cutoff=0.2))
    backward(ab, kind)
    optimizer.step()
    optimizer.zero_grad()
    ab.step()
    weights, rate = copy.deepcopy(model.state_dict()), optimizer.param_groups[0]["lr"]
    ab.close()
    ab.close()
    assert largest_difference(weights, model.state_dict()) == 0
    assert [type(module) for module in model.modules()] == types
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert all(one is other for one, other in zip(model.parameters(), kept, strict=True))
    assert all(type(p) is nn.Parameter and not p.__dict__ and not p._post_accumulate_grad_hooks for p in kept)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in kept]
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    assert optimizer.param_groups[0]["lr"] == rate
    backward(model, kind)
    optimizer.step()


def test_a_closed_engine_says_so() -> None:
    loop, _ = factored_loop()
    loop.ab.close()
    for use in (lambda: loop.ab(torch.zeros(1, 10).double()), loop.ab.step, loop.ab.state_dict):
        with pytest.raises(UsageError, match="was closed: build it again"):
            use()
    with torch.no_grad():
        loop.ab(torch.zeros(1, 10).double())


@pytest.mark.parametrize(("steps", "warns"), [(8, False), (10, True), (14, True), (12, False)])
def test_closing_during_a_round_reports_that_groups_differ(
    steps: int, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def work(comm: Communicator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        loop = Loop(comm, OUTER)
        loop.run(until=steps)
        with loop.ab.merged() as model:
            average = copy.deepcopy(model.state_dict())
        loop.ab.close()
        return average, copy.deepcopy(loop.model.state_dict())

    with caplog.at_level(logging.WARNING, logger="abtrain"):
        (average, one), (same, other) = run_in_process(2, work)
    assert ("each worker has a different model" in caplog.text) is warns
    assert largest_difference(average, same) == 0
    assert (largest_difference(one, other) > 0) is warns


def test_a_new_engine_continues_training_after_close() -> None:
    loop, _ = factored_loop()
    loop.step()
    loop.ab.close()
    again = ABTraining(loop.model, loop.optimizer, recipes.ab(15, **SCHEDULE, sigma_cutoff=0.2))
    backward(again)
    loop.optimizer.step()
    again.step()
    assert again.steps_done == 1
