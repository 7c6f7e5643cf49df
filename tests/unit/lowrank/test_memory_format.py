"""Factored layers keep memory formats, and copy no activations in their forward pass."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from abtrain.lowrank.plain import to_plain
from abtrain.lowrank.surgery import factorize_
from abtrain.lowrank.svd import Factors, MatrixShape

FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
CONVOLUTIONS = {
    "3x3": nn.Conv2d(16, 24, 3, padding=1, bias=False),
    "tall": nn.Conv2d(4, 48, 3, bias=False),
    "1x1": nn.Conv2d(32, 16, 1, bias=False),
    "one channel": nn.Conv2d(1, 12, 3, bias=False),
}


def factored(dense: nn.Module) -> nn.Module:
    model = copy.deepcopy(dense)
    # A copy of a 1x1 kernel has other strides.
    model.get_parameter("weight").data = dense.get_parameter("weight").data
    shape = MatrixShape(dense.get_parameter("weight").shape)
    factorize_(model, "weight", Factors(torch.randn(shape.m, 3), torch.randn(3, shape.n)))
    return model


def largest_copy(model: nn.Module, x: Tensor) -> int:
    """The elements of the largest tensor that a forward pass copies."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True) as profiler:
        model(x)
    events = [event for event in profiler.events() or () if event.name == "aten::copy_"]
    return max((math.prod(event.input_shapes[0]) for event in events), default=0)


@pytest.mark.parametrize("of_input", FORMATS)
@pytest.mark.parametrize("of_weight", FORMATS)
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_a_convolution_keeps_the_memory_format(case: str, of_weight: str, of_input: str) -> None:
    dense = copy.deepcopy(CONVOLUTIONS[case])
    if of_weight == "channels last":
        dense = dense.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in the stubs
    x = torch.randn(2, dense.weight.shape[1], 12, 12).contiguous(memory_format=FORMATS[of_input])
    model = factored(dense)
    assert model(x).stride() == dense(x).stride()
    weights = [layer.weight for layer in to_plain(model).children()]
    assert all(weight.is_contiguous(memory_format=FORMATS[of_weight]) for weight in weights)


@pytest.mark.parametrize("layer", [*CONVOLUTIONS, "linear"])
def test_no_activation_is_copied(layer: str) -> None:
    dense = CONVOLUTIONS.get(layer, nn.Linear(16, 24))
    shape = (2, 50, 16) if layer == "linear" else (2, dense.weight.shape[1], 24, 24)
    x = torch.randn(shape)
    if x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    assert largest_copy(factored(dense), x) < x.numel()
