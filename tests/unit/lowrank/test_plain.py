"""Plain models compute what factored ones do, and hold nothing of abtrain."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from abtrain import FixedRank
from abtrain.lowrank.classify import classify
from abtrain.lowrank.plain import to_plain
from abtrain.lowrank.surgery import factorize_
from abtrain.lowrank.svd import MatrixShape, decompose
from abtrain.recipes.factoring import Factoring


def factored(model: nn.Module, k: int = 2) -> nn.Module:
    for treatment in classify(model, Factoring(FixedRank(k))):
        if treatment.kind == "factored":
            W = MatrixShape(torch.Size(treatment.shape)).to_matrix(model.get_parameter(treatment.name).detach())
            factorize_(model, treatment.name, decompose(W, FixedRank(k)))
    return model


def conv(**options: Any) -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 8, 3, **options), nn.ReLU())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.out = nn.Linear(16, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(x, x, x, need_weights=False)[0])


class Block(nn.TransformerEncoderLayer):
    pass


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 8, bias=False)), (5, 12)),
    "one layer": (lambda: nn.Linear(12, 20), (5, 12)),
    "wide": (lambda: nn.Linear(30, 10), (5, 30)),
    "conv": (conv, (2, 4, 9, 9)),
    "strided": (lambda: conv(stride=2, padding=1, dilation=2, bias=False), (2, 4, 9, 9)),
    "reflecting": (lambda: conv(padding=1, padding_mode="reflect"), (2, 4, 9, 9)),
    "same": (lambda: conv(padding="same"), (2, 4, 9, 9)),
    "conv1d": (lambda: nn.Conv1d(6, 10, 5), (2, 6, 12)),
    "conv3d": (lambda: nn.Conv3d(3, 9, 2), (2, 3, 4, 4, 4)),
    "grouped": (lambda: nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 12, 1)), (2, 8, 5, 5)),
    "attention": (Attention, (2, 3, 16)),
    "transformer": (lambda: nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), (2, 3, 16)),
    "transformer's subclass": (lambda: Block(16, 2, 32, dropout=0.0, batch_first=True), (2, 3, 16)),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_linear_layers_of_a_transformer_become_two_layers_and_the_rest_is_said(caplog: Any) -> None:
    model = factored(nn.TransformerEncoder(Block(16, 2, 32, batch_first=True), 2, enable_nested_tensor=True)).eval()
    plain = to_plain(model)
    assert [type(getattr(layer, name)) for layer in plain.layers for name in ("linear1", "linear2")] == (
        [nn.Sequential] * 4
    )
    assert [one.message for one in caplog.records] == [
        "to_plain: 4 weights stay dense, such as layers.0.self_attn.in_proj_weight: MultiheadAttention cannot compute "
        "with factors. They take 2,048 parameters instead of 384"
    ]
    x, padded = torch.randn(3, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 5])
    with torch.no_grad():
        outputs = [one(x, src_key_padding_mask=padded)[~padded] for one in (plain, model)]
    torch.testing.assert_close(*outputs)


def test_a_dense_copy_of_a_model_without_factors_is_said(caplog: Any) -> None:
    to_plain(nn.Linear(4, 5))
    (told,) = caplog.messages
    assert told.startswith(
        "to_plain returns a dense copy, since the model has no factored weights. Perhaps ab.close() "
    )
    assert "abtrain.load(model, path)" in told and "ab.describe()" in told


def test_a_factored_model_can_be_exported_and_saved() -> None:
    model, x = factored(Attention()).eval(), torch.randn(2, 3, 16)
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (x,)), file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(x), model(x))


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("training", [True, False])
def test_it_computes_the_same_without_abtrain(kind: str, training: bool) -> None:
    torch.manual_seed(0)
    make, shape = CASES[kind]
    model = factored(make().double()).train(training)
    x = torch.randn(shape, dtype=torch.float64)
    expected = model(x)
    plain = to_plain(model)
    assert {type(module).__module__.split(".")[0] for module in plain.modules()} <= {"torch", __name__.split(".")[0]}
    torch.testing.assert_close(plain(x), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert plain.training is training and all(parameter.requires_grad for parameter in plain.parameters())
    file = io.BytesIO()
    torch.save(plain, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(x), plain(x), rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(plain)(x), plain(x), rtol=0, atol=0)


def test_weights_with_a_factored_form_become_two_layers() -> None:
    plain = to_plain(factored(nn.Sequential(nn.Linear(12, 20), nn.Conv2d(4, 8, 3))))
    assert [[type(layer) for layer in two] for two in plain] == [[nn.Linear] * 2, [nn.Conv2d] * 2]
    assert sum(p.numel() for p in plain[0].parameters()) == 2 * (12 + 20) + 20


def test_it_can_be_exported() -> None:
    model = factored(Attention()).eval()
    x = torch.randn(2, 3, 16)
    exported = torch.export.export(to_plain(model), (x,)).module()
    torch.testing.assert_close(exported(x), model(x))


def test_factors_that_are_larger_than_their_weight_are_multiplied() -> None:
    plain = to_plain(factored(nn.Sequential(nn.Linear(6, 6)), k=5))
    assert isinstance(plain[0], nn.Linear)


def test_modules_whose_weight_is_read_can_stay_dense() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(12, 20)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.inner.weight.T

    model, x = factored(Head()), torch.randn(3, 12)
    torch.testing.assert_close(to_plain(model, dense=["inner"])(x), model(x))
    with pytest.raises(AttributeError, match="weight"):
        to_plain(model)(x)


def test_hooks_of_a_layer_stay() -> None:
    model, seen = factored(nn.Sequential(nn.Linear(12, 20))), []
    model[0].register_forward_hook(lambda module, args, output: seen.append(type(module)))
    to_plain(model)(torch.randn(2, 12))
    assert seen == [nn.Sequential]


def test_the_random_numbers_of_the_loop_are_not_used() -> None:
    model = factored(nn.Sequential(nn.Linear(12, 20)))
    before = torch.get_rng_state()
    to_plain(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_dense_model_is_copied() -> None:
    model = nn.Linear(4, 5)
    plain = to_plain(model)
    assert type(plain) is nn.Linear and plain.weight is not model.weight
    assert torch.equal(plain.weight, model.weight)
