"""Gradients that are added up in blocks of rows are those of F.linear, however PyTorch computes gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

from abtrain.lowrank import blocks
from abtrain.lowrank.blocks import linear

Linear = Callable[[Tensor, Tensor], Tensor]
ROWS = 600
SHAPES = [(1024, 5), (5, 1024)]
Differentiate = Callable[[Linear, Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def mkl_and_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_MKL", True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


def x_and_factor(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x, factor = torch.randn(2, ROWS // 2, shape[1]), torch.randn(shape)
    return x.double().requires_grad_(), factor.double().requires_grad_()


def in_blocks(y: Tensor) -> bool:
    return type(y.grad_fn).__name__ == "_InBlocksBackward"


def loss(multiply: Linear, x: Tensor, factor: Tensor) -> Tensor:
    return multiply(x, factor).square().sum()


def once(multiply: Linear, x: Tensor, factor: Tensor) -> Tensor:
    of_x, of_factor = torch.autograd.grad(loss(multiply, x, factor), (x, factor))
    return torch.cat([of_x.flatten(), of_factor.flatten()])


def of_a_plain_sum(multiply: Linear, x: Tensor, factor: Tensor) -> Tensor:
    """The gradient of the output is one number, expanded to its shape."""
    (of_factor,) = torch.autograd.grad(multiply(x, factor).sum(), factor)
    return of_factor


def twice(multiply: Linear, x: Tensor, factor: Tensor) -> Tensor:
    first = torch.autograd.grad(loss(multiply, x, factor), (x, factor), create_graph=True)
    of_x, of_factor = torch.autograd.grad(sum((g.square().sum() for g in first), torch.zeros(())), (x, factor))
    return torch.cat([of_x.flatten(), of_factor.flatten()])


def of_each_sample(multiply: Linear, x: Tensor, factor: Tensor) -> Tensor:
    rows = x.detach().repeat(1, 2, 1)  # each sample alone has enough rows for blocks
    result: Tensor = vmap(grad(lambda F_, x_: loss(multiply, x_, F_)), in_dims=(None, 0))(factor.detach(), rows)
    return result


def forward_over_reverse(multiply: Linear, x: Tensor, factor: Tensor) -> Tensor:
    of_factor = grad(lambda one: loss(multiply, x.detach(), one))
    tangent: Tensor = jvp(of_factor, (factor.detach(),), (torch.ones_like(factor),))[1]
    return tangent


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch.func.jvp uses it
@pytest.mark.parametrize("differentiate", [once, of_a_plain_sum, twice, of_each_sample, forward_over_reverse])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_a_linear_layer(shape: tuple[int, int], differentiate: Differentiate) -> None:
    x, factor = x_and_factor(shape)
    assert in_blocks(linear(x, factor))
    torch.testing.assert_close(differentiate(linear, x, factor), differentiate(F.linear, x, factor))


@pytest.mark.parametrize("shape", SHAPES)
def test_one_graph_for_any_number_of_rows(shape: tuple[int, int]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True, dynamic=True)
    x, factor = x_and_factor(shape)
    torch.testing.assert_close(once(compiled, x, factor), once(F.linear, x, factor))
    more = x.detach().repeat(2, 1, 1).requires_grad_()
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(once(compiled, more, factor), once(F.linear, more, factor))


def test_threads_share_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    x, factor = x_and_factor(SHAPES[0])
    torch.testing.assert_close(once(linear, x, factor), once(F.linear, x, factor))


def test_where_there_are_no_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, factor = x_and_factor(SHAPES[0])
    assert not in_blocks(linear(x[:, :100], factor))  # few rows
    assert not in_blocks(linear(x, factor[:500]))  # not wide
    assert not in_blocks(linear(torch.ones(ROWS, 300).double(), torch.ones(2000, 300, requires_grad=True).double()))
    assert not in_blocks(linear(x, factor.detach()))
    with torch.autocast("cpu", torch.bfloat16):
        assert not in_blocks(linear(x.float(), factor.float()))
    monkeypatch.setattr(blocks, "_MKL", False)
    assert not in_blocks(linear(x, factor))


def test_exported_programs_need_no_operator_of_this_package() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = torch.nn.Parameter(torch.randn(1024, 5))

        def forward(self, x: Tensor) -> Tensor:
            return linear(x, self.factor)

    with torch.enable_grad():
        program = torch.export.export(Layer(), (torch.randn(ROWS, 5),))
    assert "linear" in program.graph_module.code and "InBlocks" not in program.graph_module.code


@pytest.mark.parametrize("shape", SHAPES)
def test_multiplications_are_counted(shape: tuple[int, int]) -> None:
    counted = []
    for multiply in (linear, F.linear):
        with FlopCounterMode(display=False) as counter:
            once(multiply, *x_and_factor(shape))
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] == 3 * 2 * ROWS * shape[0] * shape[1]
