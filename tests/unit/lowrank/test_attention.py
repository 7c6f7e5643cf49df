"""Attention with factored weights equals dense attention with the products of the factors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from abtrain.lowrank.surgery import factorize_
from abtrain.lowrank.svd import Factors, MatrixShape

WIDTH, HEADS, BATCH, LENGTH = 12, 3, 2, 5
WEIGHTS = ("in_proj_weight", "out_proj.weight")
FORBIDDEN = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[False] * LENGTH, [False] * (LENGTH - 2) + [True] * 2])
ADDED = torch.arange(BATCH * HEADS * LENGTH * LENGTH).reshape(-1, LENGTH, LENGTH).sin().double()

MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "boolean": {"attn_mask": FORBIDDEN},
    "causal": {"attn_mask": FORBIDDEN, "is_causal": True},
    "added": {"attn_mask": ADDED},
    "padding": {"key_padding_mask": PADDING},
    "both": {"attn_mask": FORBIDDEN, "key_padding_mask": PADDING, "is_causal": True},
}
LAYERS: dict[str, dict[str, Any]] = {
    "batch first": {"batch_first": True},
    "length first": {},
    "dropout": {"batch_first": True, "dropout": 0.5},
    "without bias": {"bias": False},
}


def pair(**options: Any) -> tuple[nn.MultiheadAttention, nn.MultiheadAttention]:
    """A dense module and a factored one with the same weights."""
    torch.manual_seed(0)
    dense = nn.MultiheadAttention(WIDTH, HEADS, **options).double()
    factored = copy.deepcopy(dense)
    for name in WEIGHTS:
        shape = MatrixShape(dense.get_parameter(name).shape)
        record = factorize_(factored, name, Factors(torch.randn(shape.m, 2).double(), torch.randn(2, shape.n).double()))
        dense.get_parameter(name).data = record.weight()
    return dense, factored


def outcome(module: nn.MultiheadAttention, *inputs: Tensor, **arguments: Any) -> list[Tensor]:
    """The output, and the gradients of the inputs."""
    leaves = {id(x): x.clone().requires_grad_() for x in inputs}
    torch.manual_seed(1)
    y = module(*(leaves[id(x)] for x in inputs), **{"need_weights": False, **arguments})[0]
    y.square().sum().backward()
    return [y, *(leaf.grad for leaf in leaves.values() if leaf.grad is not None)]


def tokens(module: nn.MultiheadAttention) -> Tensor:
    shape = (BATCH, LENGTH) if module.batch_first else (LENGTH, BATCH)
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(2)).double()


def unbuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MatrixShape, "to_tensor", lambda *_: pytest.fail("a dense weight was built"))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("layer", LAYERS)
def test_self_attention_never_builds_a_weight(
    layer: str, masks: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, factored = (module.train(training) for module in pair(**LAYERS[layer]))
    x = tokens(dense)
    expected = outcome(dense, x, x, x, **MASKS[masks])
    unbuilt(monkeypatch)
    torch.testing.assert_close(outcome(factored, x, x, x, **MASKS[masks]), expected)
    with torch.no_grad():
        torch.manual_seed(1)
        y, weights = factored(x, x, x, need_weights=False, **MASKS[masks])
    torch.testing.assert_close(y, expected[0])
    assert weights is None


def test_other_attention_is_that_of_pytorch() -> None:
    dense, factored = pair()
    x, other = tokens(dense), tokens(dense).flip(0)
    for inputs in ((x, other, other), (x, x, other), (x[:, 0],) * 3):
        torch.testing.assert_close(outcome(factored, *inputs), outcome(dense, *inputs))
    for one, expected in zip(factored(x, x, x), dense(x, x, x), strict=True):
        torch.testing.assert_close(one, expected)
    for options in ({"add_zero_attn": True}, {"add_bias_kv": True}):
        dense, factored = pair(**options)
        torch.testing.assert_close(outcome(factored, x, x, x), outcome(dense, x, x, x))


@pytest.mark.parametrize(
    "wrong",
    [{"is_causal": True}, {"attn_mask": FORBIDDEN[:2]}, {"key_padding_mask": PADDING[:, :2]}],
    ids=["no mask", "mask", "padding"],
)
def test_wrong_masks_get_the_error_of_pytorch(wrong: dict[str, Any]) -> None:
    dense, factored = pair()
    x, messages = tokens(dense), list[str]()
    for module in (dense, factored):
        with pytest.raises((RuntimeError, AssertionError)) as raised:
            module(x, x, x, need_weights=False, **wrong)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


def test_a_hook_of_a_weight_gets_its_gradient() -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(WIDTH, HEADS).double()
    seen = list[Tensor]()
    module.in_proj_weight.register_hook(seen.append)  # type: ignore[arg-type]  # it returns None
    factorize_(module, WEIGHTS[0], Factors(torch.randn(36, 2).double(), torch.randn(2, WIDTH).double()))
    outcome(module, *[tokens(module)] * 3)
    assert [tuple(gradient.shape) for gradient in seen] == [(36, WIDTH)]


def test_attention_is_compiled_as_one_graph() -> None:
    _, factored = pair(batch_first=True)
    x = tokens(factored)
    compiled = torch.compile(factored, backend="eager", fullgraph=True)
    torch.testing.assert_close(outcome(compiled, x, x, x, **MASKS["both"]), outcome(factored, x, x, x, **MASKS["both"]))
