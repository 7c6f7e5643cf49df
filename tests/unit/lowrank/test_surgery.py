"""Weights of a live model become factors and come back, and the model computes the same."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from abtrain import FixedRank, SigmaCutoff
from abtrain.errors import UsageError
from abtrain.lowrank.classify import owner
from abtrain.lowrank.layers import LowRankConv2d, LowRankLinear
from abtrain.lowrank.surgery import factorize_, restore_
from abtrain.lowrank.svd import MatrixShape, decompose
from abtrain.lowrank.weight import FactoredWeight
from abtrain.recipes.factoring import RankRule

ALL = SigmaCutoff(0.0)


class Attention(nn.Module):
    def __init__(self, **options: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


CASES = {
    "linear_wide": (nn.Linear(12, 7), (3, 5, 12), "weight"),
    "linear_tall": (nn.Linear(7, 12, bias=False), (3, 7), "weight"),
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1, stride=2), (2, 4, 9), "weight"),
    "conv2d": (nn.Conv2d(3, 8, (3, 2), padding="same", dilation=2), (2, 3, 8, 9), "weight"),
    "conv2d_tall": (nn.Conv2d(2, 40, 3), (2, 2, 8, 8), "weight"),
    "conv2d_reflect": (
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect", bias=False),
        (2, 3, 6, 6),
        "weight",
    ),
    "conv3d": (nn.Conv3d(2, 5, 2), (2, 2, 4, 4, 4), "weight"),
    "grouped": (nn.Conv2d(4, 8, 3, groups=2), (2, 4, 6, 6), "weight"),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 5), "weight"),
    "in_proj": (Attention(), (2, 5, 12), "attention.in_proj_weight"),
    "out_proj": (Attention(), (2, 5, 12), "attention.out_proj.weight"),
    "bilinear": (nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), (4, 6), "1.weight"),
}
IN_FACTORED_FORM = {
    "linear_wide",
    "linear_tall",
    "conv1d",
    "conv2d",
    "conv2d_tall",
    "conv2d_reflect",
    "conv3d",
    "bilinear",
}


def factored(model: nn.Module, name: str, rule: RankRule = ALL) -> FactoredWeight:
    weight = model.get_parameter(name).detach()
    return factorize_(model, name, decompose(MatrixShape(weight.shape).to_matrix(weight), rule))


@pytest.mark.parametrize("case", CASES)
def test_the_function_is_kept_and_comes_back(case: str) -> None:
    model, shape, name = copy.deepcopy(CASES[case])
    model.double()
    x = torch.randn(shape, dtype=torch.float64)
    before, types = model(x), [type(module) for module in model.modules()]
    parameters = dict(model.named_parameters())
    weight = parameters[name].detach().clone()

    record = factored(model, name)
    torch.testing.assert_close(model(x), before)
    torch.testing.assert_close(record.weight(), weight)
    module, attribute = owner(model, name)
    torch.testing.assert_close(getattr(module, attribute), weight)

    restored = restore_(record)
    torch.testing.assert_close(model(x), before)
    assert [type(module) for module in model.modules()] == types
    assert restored is parameters[name]
    assert [(n, id(p)) for n, p in model.named_parameters()] == [(n, id(p)) for n, p in parameters.items()]


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_the_factors_are_those_of_the_product(case: str) -> None:
    model, shape, name = copy.deepcopy(CASES[case])
    model.double()
    x = torch.randn(shape, dtype=torch.float64)
    dense = copy.deepcopy(model)
    record = factored(model, name, FixedRank(2))
    with torch.no_grad():
        dense.get_parameter(name).copy_(record.weight())
    model(x).square().sum().backward()
    dense(x).square().sum().backward()
    G = record.matrix_shape.to_matrix(dense.get_parameter(name).grad)  # type: ignore[arg-type]
    torch.testing.assert_close(record.A.grad, G @ record.B.T)
    torch.testing.assert_close(record.B.grad, record.A.T @ G)


@pytest.mark.parametrize("case", sorted(IN_FACTORED_FORM))
def test_factored_layers_never_build_the_dense_weight(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, shape, name = copy.deepcopy(CASES[case])
    factored(model, name, FixedRank(2))
    monkeypatch.setattr(MatrixShape, "to_tensor", lambda *_: pytest.fail("the dense weight was built"))
    model(torch.randn(shape)).sum().backward()


def test_the_dense_weight_is_freed_while_its_factors_live() -> None:
    model = nn.Sequential(nn.Linear(64, 64), Attention())
    for name in ("0.weight", "1.attention.in_proj_weight"):
        storage = weakref.ref(model.get_parameter(name).untyped_storage())
        factored(model, name, FixedRank(1))
        gc.collect()
        assert storage() is None or storage().nbytes() == 0  # type: ignore[union-attr]


def test_factored_layers_are_of_the_classes_that_they_stand_for() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Conv2d(2, 3, 3), nn.ConvTranspose2d(2, 3, 3))
    for i in range(3):
        factored(model, f"{i}.weight")
    assert type(model[0]) is LowRankLinear
    assert type(model[1]) is LowRankConv2d
    assert isinstance(model[0], nn.Linear) and isinstance(model[2], nn.ConvTranspose2d)
    assert "rank=4" in repr(model[0]) and "rank=2" in repr(model[2])


def test_modules_of_one_kind_share_their_factored_class() -> None:
    twins = [nn.ConvTranspose2d(2, 3, 3), nn.ConvTranspose2d(2, 5, 3)]
    for twin in twins:
        factored(twin, "weight")
    assert type(twins[0]) is type(twins[1])


@pytest.mark.parametrize("order", ["qkv", "vkq", "kqv"])
def test_several_weights_of_one_module_come_back_in_any_order(order: str) -> None:
    model = nn.MultiheadAttention(12, 3, kdim=6, vdim=4).double()
    q, k, v = (torch.randn(5, 2, size, dtype=torch.float64) for size in (12, 6, 4))
    before, names = model(q, k, v)[0], [name for name, _ in model.named_parameters()]
    attributes = dict(model.__dict__)
    records = {letter: factored(model, f"{letter}_proj_weight") for letter in "qkv"}
    torch.testing.assert_close(model(q, k, v)[0], before)
    for letter in order:
        restore_(records[letter])
        torch.testing.assert_close(model(q, k, v)[0], before)
    assert [name for name, _ in model.named_parameters()] == names
    assert type(model) is nn.MultiheadAttention
    assert model.__dict__.keys() == attributes.keys()


def test_another_weight_of_a_linear_layer_leaves_its_own_alone() -> None:
    layer = nn.Linear(6, 6)
    layer.extra_weight = nn.Parameter(torch.randn(8, 8))
    own, extra = layer.weight.detach().clone(), layer.extra_weight.detach().clone()
    records = [factored(layer, name) for name in ("extra_weight", "weight")]
    torch.testing.assert_close(layer.extra_weight, extra)
    torch.testing.assert_close(layer.weight, own)
    for record in records:
        restore_(record)
    assert type(layer) is nn.Linear


def test_a_factored_weight_cannot_be_replaced_unnoticed() -> None:
    layer = nn.ConvTranspose2d(2, 3, 3)
    factored(layer, "weight")
    with pytest.raises(UsageError, match=r"a ConvTranspose2d cannot be set: this weight is .* option exclude"):
        layer.weight = nn.Parameter(torch.zeros(2, 3, 3, 3))


def test_hooks_and_references_to_the_module_stay_valid() -> None:
    layer = nn.Linear(6, 4)
    model = nn.ModuleDict({"head": layer})
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    record = factored(model, "head.weight")
    assert model["head"] is layer
    model["head"](torch.randn(2, 6))
    restore_(record)
    model["head"](torch.randn(2, 6))
    assert len(calls) == 2


def test_transformer_encoder_in_eval_mode_reads_the_weight() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        before = layer(x)
        for name in (
            "linear1.weight",
            "linear2.weight",
            "self_attn.in_proj_weight",
            "self_attn.out_proj.weight",
        ):
            factored(layer, name)
        torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-5)


def test_autocast_runs_the_factors_in_half() -> None:
    model = nn.Linear(16, 8)
    factored(model, "weight")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(torch.randn(4, 16)).dtype == torch.bfloat16


class Router(nn.Module):
    """Reads its weight where autocast is on, and computes in float32 where it is off."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        W = self.weight
        with torch.autocast("cpu", enabled=False):
            return x.float() @ W.T


@pytest.mark.parametrize("module", [nn.Linear(8, 8), Router(), nn.ConvTranspose2d(2, 3, 3)], ids=lambda m: str(m)[:6])
def test_a_weight_that_is_read_under_autocast_has_its_own_dtype(module: nn.Module) -> None:
    factored(module, "weight", FixedRank(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weight = module.weight
        assert isinstance(weight, torch.Tensor) and weight.dtype == torch.float32
        if isinstance(module, Router):
            module(torch.randn(3, 8)).sum().backward()


def test_a_factored_layer_in_a_float32_region_computes_in_float32() -> None:
    layer, x = nn.Linear(16, 8), torch.randn(4, 16)
    factored(layer, "weight", FixedRank(3))
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("case", ["linear_wide", "grouped", "in_proj"])
def test_compiled_modules_compute_as_eager_ones_in_either_form(case: str, autocast: bool) -> None:
    model, shape, name = copy.deepcopy(CASES[case])
    torch._dynamo.reset()
    compiled, x = torch.compile(model, fullgraph=True, backend="eager"), torch.randn(shape)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        assert torch.equal(compiled(x), model(x))
        record = factored(model, name, FixedRank(2))
        assert torch.equal(compiled(x), model(x))
        restore_(record)
        assert torch.equal(compiled(x), model(x))
