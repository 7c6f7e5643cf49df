"""The multiplications of a training step with factored Linear layers, and the gradients in each order of products."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from abtrain.lowrank.layers import LowRankLinear
from abtrain.lowrank.products import best_order
from abtrain.lowrank.surgery import factorize_
from abtrain.lowrank.svd import Factors

ROWS, SMALL, LARGE = 1500, 24, 96
MOST = SMALL * LARGE // (SMALL + LARGE)  # the largest rank whose factors are smaller
TRAINED = {"all": (True, True), "A": (True, False), "B": (False, True)}


def block(k: int, trains: str) -> tuple[nn.Sequential, nn.Sequential]:
    """An MLP block with dense and with factored layers of equal weights."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(SMALL, LARGE), nn.GELU(), nn.Linear(LARGE, SMALL)).double()
    factored = copy.deepcopy(dense)
    for place in (0, 2):
        pair = Factors(torch.randn(LARGE, k).double(), torch.randn(k, SMALL).double())
        record = factorize_(factored, f"{place}.weight", pair)
        for factor, wanted in zip(record.factors, TRAINED[trains], strict=True):
            factor.requires_grad_(wanted)
        dense[place].weight.data = record.weight()
    return dense, factored


def multiplications(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(x).square().sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("trains", TRAINED)
@pytest.mark.parametrize("k", [2, MOST // 2, MOST - 2, MOST])
def test_a_step_takes_hardly_more_multiplications_than_a_dense_one(k: int, trains: str) -> None:
    dense, factored = block(k, trains)
    x = torch.randn(ROWS, SMALL).double()
    assert multiplications(factored, x) <= 1.05 * multiplications(dense, x)


@pytest.mark.parametrize(("k", "order"), [(2, "factors"), (MOST // 2, "gradient"), (MOST, "rebuilt")])
def test_each_order_is_the_fastest_somewhere(k: int, order: str) -> None:
    x, inner, outer = torch.randn(ROWS, SMALL), torch.randn(k, SMALL), torch.randn(LARGE, k)
    assert best_order(x, inner.requires_grad_(), outer.requires_grad_()) == order
    assert best_order(x[:2], inner, outer) == "factors"
    with torch.no_grad():
        assert best_order(x, inner, outer) == "factors"


@pytest.mark.parametrize(("trains", "compiled"), [*((trains, False) for trains in TRAINED), ("all", True)])
@pytest.mark.parametrize(("k", "rows"), [(MOST, 2), (MOST // 2, ROWS), (MOST, ROWS)])
def test_gradients_are_those_of_the_product(k: int, rows: int, trains: str, compiled: bool) -> None:
    dense, factored = block(k, trains)
    x = torch.randn(rows, SMALL).double()
    if compiled:
        torch._dynamo.reset()
        factored.compile(backend="aot_eager", fullgraph=True)
    outputs = factored(x), dense(x)
    torch.testing.assert_close(*outputs)
    for y in outputs:
        y.square().sum().backward()
    for place in (0, 2):
        layer, G = factored[place], dense[place].weight.grad
        assert isinstance(layer, LowRankLinear)
        record = layer._abtrain_weights["weight"]
        G = G.T if record.matrix_shape.transposed else G
        for factor, expected in ((record.A, G @ record.B.T), (record.B, record.A.T @ G)):
            if factor.requires_grad:
                torch.testing.assert_close(factor.grad, expected)
            else:
                assert factor.grad is None
