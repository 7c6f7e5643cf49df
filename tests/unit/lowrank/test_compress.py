"""`compress`: any trained model becomes a smaller plain one, and a table says what each weight lost."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from abtrain import ABTraining, Energy, FixedRank, compress, recipes
from abtrain.errors import ConfigurationError, NonFiniteError, UsageError
from abtrain.lowrank.layers import Factored
from abtrain.recipes.factoring import RankRule
from tests.cases import MODELS, adamw, batch, build


def test_weights_of_low_rank_lose_nothing() -> None:
    model = build("mlp")
    for layer in (model[0], model[2]):
        layer.weight.data = torch.outer(torch.arange(1.0, 1 + len(layer.weight)), layer.weight[0].detach()).double()
    before, x = copy.deepcopy(model.state_dict()), batch("mlp", 0, 0)[0]
    found = compress(model, FixedRank(1), exclude=("4.*",))
    torch.testing.assert_close(found.model(x), model(x), rtol=0, atol=1e-10)
    assert [(w.name, w.rank, w.error < 1e-7) for w in found.weights] == [
        ("0.weight", 1, True),
        ("2.weight", 1, True),
        ("4.weight", 0, True),
    ]
    assert found.weights[2].reason == "excluded by '4.*'"
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("rule", [Energy(0.9), FixedRank(2)])
def test_the_model_is_plain_and_smaller(kind: str, rule: RankRule) -> None:
    model, x = build(kind), batch(kind, 0, 0)[0]
    found = compress(model, rule)
    assert not any(type(m).__module__.startswith("abtrain") for m in found.model.modules())
    before, after = found.parameters
    assert after == sum(p.numel() for p in found.model.parameters()) <= before
    assert found.model(x).shape == model(x).shape
    for weight in found.weights:
        assert bool(weight.rank) != bool(weight.reason)
        assert 0 <= weight.error < 1


def test_the_error_is_that_of_the_weights() -> None:
    model = build("mlp")
    found = compress(model, FixedRank(2))
    first, last = found.model[0]
    W = model[0].weight
    expected = ((W - last.weight @ first.weight).norm() / W.norm()).item()
    assert found.weights[0].error == pytest.approx(expected)


def test_the_table_has_a_line_for_each_weight_and_the_sum() -> None:
    lines = str(compress(build("attention"), FixedRank(2))).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["weight", "shape", "rank", "parameters", "error"]
    assert "attention.in_proj_weight stays dense: MultiheadAttention computes with the dense" in lines
    assert lines[-1].endswith(" : 1")


def test_frozen_weights_are_compressed_and_stay_frozen() -> None:
    model = build("mlp").requires_grad_(False)
    model[4].requires_grad_(True)
    found = compress(model, FixedRank(2))
    assert [weight.rank for weight in found.weights] == [2, 2, 2]
    assert {name for name, p in found.model.named_parameters() if p.requires_grad} == {
        "4.0.weight",
        "4.1.weight",
        "4.1.bias",
    }
    assert not any(
        p.requires_grad for p in compress(nn.Linear(8, 8).requires_grad_(False), FixedRank(2)).model.parameters()
    )


def test_attention_in_transformers_stays_dense() -> None:
    class Own(nn.TransformerEncoderLayer):
        pass

    model = nn.Sequential(Own(16, 2, 32, batch_first=True), nn.Linear(16, 16)).eval()
    x = torch.randn(2, 3, 16)
    found = compress(model, FixedRank(2))
    assert {weight.name for weight in found.weights if weight.rank} == {
        "0.linear1.weight",
        "0.linear2.weight",
        "1.weight",
    }
    with torch.no_grad():
        found.model(x)


def test_bad_input_is_refused() -> None:
    model = build("mlp")
    with pytest.raises(ConfigurationError, match="is not a rank rule"):
        compress(model, 4)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="is not a list of globs"):
        compress(model, FixedRank(2), exclude="4.*")
    with pytest.raises(ConfigurationError, match=r"exclude='head' matches no parameter: use names such as '0\.weight'"):
        compress(model, FixedRank(2), exclude=("head",))
    model[2].weight.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"2\.weight: cannot decompose"):
        compress(model, FixedRank(2))


def test_a_model_in_training_is_refused() -> None:
    model = build("mlp")
    ab = ABTraining(
        model, adamw(model.parameters()), recipes.ab_outer(4, every=2, warmup_steps=0, rank_rule=FixedRank(2))
    )
    assert any(isinstance(module, Factored) for module in model.modules())
    with pytest.raises(UsageError, match=r"abtrain\.to_plain\(model\)"):
        compress(model, FixedRank(2))
    ab.close()
    compress(model, FixedRank(2))


@pytest.mark.parametrize(("k", "pays"), [(2, True), (15, False)])
def test_a_model_that_hardly_shrinks_is_told(k: int, pays: bool) -> None:
    found = compress(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), FixedRank(k))
    assert ("This hardly pays" in str(found)) is not pays
