import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from abtrain import recipes
from abtrain.commands.plan.shapes import assumed_shapes, ranks_for, shapes_of
from abtrain.errors import ConfigurationError
from tests.cases import build


@settings(deadline=None)
@given(parameters=st.integers(1, 10**7), width=st.integers(1, 2000))
def test_an_assumed_model_has_all_its_parameters(parameters: int, width: int) -> None:
    # So many weights would only take time.
    width = max(width, parameters // 1000)
    model = assumed_shapes(parameters, width)
    assert model.numel == parameters
    assert all(parameter.device.type == "meta" for parameter in model.parameters.values())


@settings(deadline=None)
@given(compression=st.floats(0.55, 12))
def test_ranks_give_the_compression_asked_for(compression: float) -> None:
    model = assumed_shapes(4 * 512 * 512 + 300, 512)
    assert model.compression(ranks_for(model, compression)) == pytest.approx(compression, rel=0.05)


def test_ranks_end_at_full_rank() -> None:
    assert ranks_for(assumed_shapes(512 * 512, 512), 0.1) == {"weight0": 512}


def test_large_models_have_wide_weights() -> None:
    model = assumed_shapes(10**12)
    assert model.numel == 10**12
    assert len(model.parameters) < 1100


def test_a_width_that_makes_too_many_weights() -> None:
    with pytest.raises(ConfigurationError, match="at least 708"):
        assumed_shapes(10**10, 16)


def test_compression_by_hand() -> None:
    """100 x 50 and 50 x 20 weights, 70 biases: ranks 10 and 5 leave 1500 + 350 + 70 of 6070."""
    model = shapes_of(nn.Sequential(nn.Linear(50, 100), nn.Linear(20, 50, bias=False)), recipes.ab(100).factoring)
    assert model.numel == 6100
    assert model.compression({"0.weight": 10, "1.weight": 5}) == pytest.approx(6100 / (1500 + 350 + 100))
    assert model.compression({}) == 1


@pytest.mark.parametrize("compression", [-1, 0, float("nan"), 1e6])
def test_a_compression_that_cannot_be(compression: float) -> None:
    with pytest.raises(ConfigurationError, match="compression"):
        ranks_for(assumed_shapes(10**6), compression)


def test_sizes_that_cannot_be_are_reported_together() -> None:
    with pytest.raises(ConfigurationError) as error:
        assumed_shapes(0, -1)
    assert len(error.value.problems) == 2


def test_shapes_of_a_model_follow_the_recipe() -> None:
    model = build("attention", torch.float32)
    factored = {n for n, kind in shapes_of(model, recipes.ab(100).factoring).kinds.items() if kind == "factored"}
    assert factored == {"embed.weight", "attention.in_proj_weight", "attention.out_proj.weight", "head.weight"}
    assert set(shapes_of(model).kinds.values()) == {"averaged"}
