"""LR rebound: near zero after a change of shape, and never written over the schedule."""

import pytest
import torch
from torch import nn

from abtrain.engine.lr_rebound import LRRebound


def make(lr: float | torch.Tensor) -> tuple[nn.Linear, torch.optim.Optimizer, LRRebound]:
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    rebound = LRRebound()
    optimizer.register_step_pre_hook(lambda *_: rebound.scale(optimizer))
    optimizer.register_step_post_hook(lambda *_: rebound.put_back(optimizer))
    return model, optimizer, rebound


def moves(model: nn.Linear, optimizer: torch.optim.Optimizer, rebound: LRRebound, steps: int) -> list[float]:
    """How far steps of gradient 1 go, while the schedule's rate of 0.5 is left alone."""
    gone = []
    for _ in range(steps):
        before = model.weight.item()
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
        assert float(optimizer.param_groups[0]["lr"]) == 0.5
        gone.append(before - model.weight.item())
        rebound.advance()
    return gone


@pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5)])
def test_steps_are_scaled_and_the_schedule_is_not(lr: float | torch.Tensor) -> None:
    model, optimizer, rebound = make(lr)
    rebound.start(3)
    assert moves(model, optimizer, rebound, 5) == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5], abs=1e-6)
    assert lr == 0.5


def test_a_scheduler_beside_it_sees_its_own_values() -> None:
    plain_model, plain, _ = make(1.0)
    model, optimizer, rebound = make(1.0)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 10) for o in (plain, optimizer)]
    rebound.start(4)
    for _ in range(10):
        for net, opt in ((plain_model, plain), (model, optimizer)):
            net.weight.grad = torch.ones_like(net.weight)
            opt.step()
        for schedule in schedules:
            schedule.step()
        rebound.advance()
        assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"]


def test_a_step_that_raises_leaves_no_scaled_rate_behind() -> None:
    model, optimizer, rebound = make(1.0)
    rebound.start(1)

    def closure() -> float:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(closure)
    model.weight.grad = torch.ones_like(model.weight)
    before = model.weight.item()
    optimizer.step()
    assert before - model.weight.item() == pytest.approx(0.5)
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_a_scheduler_after_a_failed_step_continues_from_its_own_value() -> None:
    model, optimizer, rebound = make(1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    rebound.start(3)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    rebound.advance()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.5
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_without_a_climb_rates_stay() -> None:
    _, _, rebound = make(1.0)
    assert rebound.factor == 1.0
    rebound.start(5)
    assert rebound.factor == pytest.approx(1 / 6)
