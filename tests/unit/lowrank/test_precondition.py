"""Steps of factors in coordinates of the weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from abtrain.lowrank.model import FactoredModel
from abtrain.lowrank.optimizers import Optimizers
from abtrain.lowrank.precondition import Preconditioner
from abtrain.lowrank.surgery import factorize_
from abtrain.lowrank.svd import Factors, decompose
from abtrain.lowrank.weight import FactoredWeight
from abtrain.optim import Muon
from abtrain.recipes.rank_rules import FixedRank
from tests.faults.optimizers import EarlyMasters, Masters

Optim = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def record_of(split: Tensor | None = None) -> FactoredWeight:
    """A factored 12 x 8 weight of rank 3; with `split` T its factors are A T and T^-1 B."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12, bias=False, dtype=torch.float64))
    A, B = decompose(model[0].weight.detach(), FixedRank(3))
    if split is not None:
        A, B = A @ split, torch.linalg.solve(split, B)
    return factorize_(model, "0.weight", Factors(A, B))


def step(record: FactoredWeight, make: Optim, damping: float, steps: int = 1) -> Tensor:
    """The change of W in steps along a fixed gradient G of W."""
    G = torch.randn(12, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    before = record.weight()
    optimizer = make([record.A, record.B])
    preconditioner = Preconditioner(Optimizers(optimizer), damping)
    preconditioner.refresh([record])
    for _ in range(steps):
        record.A.grad, record.B.grad = G @ record.B.detach().T, record.A.detach().T @ G
        preconditioner.before_step(optimizer, [record])
        optimizer.step()
        preconditioner.after_step(optimizer)
    return record.weight() - before


def test_with_gradient_descent_it_is_scaled_gd() -> None:
    record = record_of()
    A, B = record.A.detach().clone(), record.B.detach().clone()
    step(record, lambda p: torch.optim.SGD(p, lr=0.1), damping=0.2)
    G = torch.randn(12, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for factor, start, gradient, gram in (
        (record.A, A, (G @ B.T).T, B @ B.T),
        (record.B, B, A.T @ G, A.T @ A),
    ):
        damped = gram + 0.2 * gram.diagonal().mean() * torch.eye(3)
        moved = torch.linalg.solve(damped, gradient)
        torch.testing.assert_close(factor.detach(), start - 0.1 * (moved.T if factor is record.A else moved))


def test_a_step_of_the_weight_does_not_depend_on_the_split() -> None:
    """Rotations keep Adam from it, since it goes by single numbers; lengths of columns do not."""
    split = torch.diag(torch.tensor([0.1, 3.0, 20.0], dtype=torch.float64))
    for make in (lambda p: torch.optim.SGD(p, lr=1e-4), lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=0.0)):
        plain, other = (step(record_of(T), make, damping=1e-9, steps=3) for T in (None, split))
        torch.testing.assert_close(other, plain, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("make", [Masters, EarlyMasters])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_steps_of_master_weights_are_preconditioned(make: Any, dtype: torch.dtype) -> None:
    """The master weights move as factors in float32 would, and the factors are their rounded values."""

    def stepped(make: Any, dtype: torch.dtype) -> tuple[list[nn.Parameter], Any]:
        A, B = (factor.to(torch.bfloat16).to(dtype) for factor in decompose(W, FixedRank(3)))
        record = factorize_(nn.Sequential(nn.Linear(8, 12, bias=False, dtype=dtype)), "0.weight", Factors(A, B))
        factors = [record.A, record.B]
        optimizer = make(factors, lr=0.05)
        preconditioner = Preconditioner(Optimizers(optimizer), 0.1, 2.0)
        preconditioner.refresh([record])
        for gradients in steps:
            record.A.grad, record.B.grad = (gradient.to(dtype) for gradient in gradients)
            preconditioner.before_step(optimizer, [record])
            optimizer.step()
            preconditioner.after_step(optimizer)
        return factors, optimizer

    torch.manual_seed(0)
    W = torch.randn(12, 8)
    steps = [[torch.randn(shape).bfloat16() for shape in ((12, 3), (3, 8))] for _ in range(4)]
    wanted, _ = stepped(torch.optim.SGD, torch.float32)
    factors, optimizer = stepped(make, dtype)
    for factor, want in zip(factors, wanted, strict=True):
        master = optimizer.state[factor]["master"]
        # Gradients are rounded to the dtype of factors after they have been preconditioned.
        tolerance = 1e-5 if dtype == torch.float64 else 2e-3
        torch.testing.assert_close(master, want.detach(), rtol=tolerance, atol=tolerance)
        assert torch.equal(master.to(dtype), factor)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Muon, Muon, torch.optim.Adafactor])
def test_the_weight_decays_at_the_rate_of_a_dense_one(kind: Any) -> None:
    record = record_of()
    W = record.weight()
    optimizer = kind([record.A, record.B], lr=0.01, weight_decay=0.1)
    preconditioner = Preconditioner(Optimizers(optimizer), 0.1)
    preconditioner.refresh([record])
    record.A.grad, record.B.grad = torch.zeros_like(record.A), torch.zeros_like(record.B)
    preconditioner.before_step(optimizer, [record])
    optimizer.step()
    preconditioner.after_step(optimizer)
    torch.testing.assert_close(record.weight(), W * (1 - 0.01 * 0.1), rtol=1e-6, atol=0)


def test_a_factor_of_zeros_and_a_missing_gradient_are_left_alone() -> None:
    record = record_of()
    with torch.no_grad():
        record.B.zero_()
    optimizer = torch.optim.SGD([record.A, record.B], lr=0.1)
    preconditioner = Preconditioner(Optimizers(optimizer), 0.1)
    preconditioner.refresh([record])
    record.A.grad = torch.ones_like(record.A)
    preconditioner.before_step(optimizer, [record])
    preconditioner.after_step(optimizer)
    torch.testing.assert_close(record.A.grad, torch.ones_like(record.A))
    assert record.B.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_preconditioned_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12, bias=False, dtype=dtype))
    record = factorize_(model, "0.weight", decompose(model[0].weight.detach(), FixedRank(3)))
    optimizer = torch.optim.SGD([record.A, record.B], lr=0.1)
    preconditioner = Preconditioner(Optimizers(optimizer), 0.1)
    preconditioner.refresh([record])
    record.A.grad, record.B.grad = torch.ones_like(record.A), torch.ones_like(record.B)
    preconditioner.before_step(optimizer, [record])
    assert torch.isfinite(record.A.grad).all() and record.A.grad.dtype == dtype
    preconditioner.after_step(optimizer)


@pytest.mark.parametrize("kind", [torch.optim.Muon, Muon])
def test_muon_steps_factors_as_it_would_without_a_preconditioner(kind: Any) -> None:
    moved = []
    for damping in (0.0, 0.1):
        record = record_of()
        optimizer = kind([record.A, record.B], lr=0.01, weight_decay=0.0)
        preconditioner = Preconditioner(Optimizers(optimizer), damping)
        preconditioner.refresh([record])
        record.A.grad, record.B.grad = torch.ones_like(record.A), torch.eye(*record.B.shape, dtype=record.B.dtype)
        if damping:
            preconditioner.before_step(optimizer, [record])
        optimizer.step()
        preconditioner.after_step(optimizer)
        moved.append([record.A.detach(), record.B.detach()])
    torch.testing.assert_close(moved[1], moved[0])


def test_muons_momentum_follows_a_weight_as_if_there_were_no_damping() -> None:
    held = []
    for damping in (0.0, 0.1):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 12, bias=False))
        optimizer = Muon(model.parameters(), lr=0.01)
        factored = FactoredModel(model, Optimizers(optimizer), ["0.weight"], "project")
        model(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
        factored.factorize({"0.weight": decompose(model[0].weight.detach(), FixedRank(3))}, damping)
        momenta = [state["momentum_buffer"].clone() for state in optimizer.state.values()]
        factored.restore()
        held.append([*momenta, optimizer.state[model[0].weight]["momentum_buffer"]])
    assert len(held[0]) == 3 and all(momentum.any() for momentum in held[0])
    torch.testing.assert_close(held[1], held[0])
