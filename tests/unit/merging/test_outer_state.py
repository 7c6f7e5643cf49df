"""What a merge knows before anything is sent, how large the changes are, and from where workers go on meanwhile."""

import math

import pytest
import torch
from torch import Tensor

from abtrain.merging.held import Held
from abtrain.merging.outer_state import OuterState
from abtrain.merging.sent import steps_alone
from abtrain.merging.store import Store
from abtrain.recipes.merges import Mean, MergeRule, Outer, TrainedOnly


def largest(before: Tensor, after: Tensor, residual: Tensor | None = None) -> float:
    held, state = Held({"weight": before.clone()}), OuterState()
    state.anchor(held)
    if residual is not None:
        state.residuals["weight"] = residual
    held["weight"].copy_(after)
    (batch,) = held.batches()
    found = state.largest(batch, held)
    known = state.largest(batch, held, state.change(batch, held))
    assert math.isfinite(found) == math.isfinite(known)
    return found


@pytest.mark.parametrize("scale", [0.0, 2.0**-140, 1e-3, 1.0, 1e15])
def test_moderate_changes_are_bounded(scale: float) -> None:
    before, after, residual = scale * torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    found = largest(before, after, residual)
    assert (after - before).abs().max() + residual.abs().max() <= found * (1 + 1e-5) + 2.0**-100
    assert found <= 1e20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_changes_are_known_exactly(dtype: torch.dtype) -> None:
    before, after = torch.full((1000,), 1e30, dtype=dtype), torch.full((1000,), 1e30, dtype=dtype)
    after[7] = -(2.0**110)
    residual = torch.full((1000,), 2.0**109)
    expected = (after.float() - before.float()).abs().max() + residual.max()
    assert largest(before, after, residual) == pytest.approx(float(expected), rel=1e-6)
    assert largest(before, before) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_has_no_bound(value: float) -> None:
    before, after = torch.zeros(1000), torch.zeros(1000)
    after[500] = value
    assert not math.isfinite(largest(before, after))


@pytest.mark.parametrize("merged_before", [False, True])
def test_during_a_hidden_merge_a_worker_goes_on_from_its_own_outer_step(merged_before: bool) -> None:
    before, after, M = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    held, state = Held({"weight": before.clone()}), OuterState()
    state.anchor(held)
    if merged_before:
        state.momentum["weight"] = M.clone()
    (batch,) = held.batches()
    stepped = state.stepped_alone(batch, Store.of(Held({"weight": after})), Outer(lr=0.7, momentum=0.9))
    D = after - before
    expected = before + 0.7 * (D + 0.9 * (D + 0.9 * M if merged_before else D))
    torch.testing.assert_close(stepped, expected)
    assert not merged_before or torch.equal(state.momentum["weight"], M)


@pytest.mark.parametrize(("rule", "alone"), [(Mean(), False), (TrainedOnly(), False), (Outer(), True)])
def test_only_outer_steps_lead_away_from_a_workers_own_weights(rule: MergeRule, alone: bool) -> None:
    assert steps_alone(rule) is alone
