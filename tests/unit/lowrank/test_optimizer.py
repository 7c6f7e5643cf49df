"""The optimizer follows a change of shape: places, groups, state."""

from typing import Any

import pytest
import torch
from torch import nn

from abtrain import SigmaCutoff
from abtrain.lowrank.model import FactoredModel
from abtrain.lowrank.optimizers import Optimizers
from abtrain.lowrank.svd import decompose
from abtrain.recipes.factoring import OptimizerState

RULE = SigmaCutoff(0.0)


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def factorize(model: FactoredModel) -> None:
    model.factorize({name: decompose(W, RULE) for name, W in model.matrices().items()})


def setup(state: OptimizerState, optimizer_type: Any = torch.optim.AdamW, **options: Any) -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    weights, biases = [net[0].weight, net[2].weight], [net[0].bias, net[2].bias]
    groups = [{"params": weights, "lr": 1e-2}, {"params": biases, "lr": 1e-3, "weight_decay": 0.0}]
    optimizer = optimizer_type(groups, **options)
    return net, optimizer, FactoredModel(net, Optimizers(optimizer), ["0.weight", "2.weight"], state)


def test_factors_take_their_weights_place_and_give_it_back() -> None:
    _net, optimizer, model = setup("reset")
    groups, before = optimizer.param_groups, [list(g["params"]) for g in optimizer.param_groups]
    factorize(model)
    first, second = model.records.values()
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [
        id(p) for p in (first.A, first.B, second.A, second.B)
    ]
    assert optimizer.param_groups is groups
    assert optimizer.param_groups[0]["lr"] == 1e-2
    model.restore()
    after = [g["params"] for g in optimizer.param_groups]
    assert [[id(p) for p in group] for group in after] == [[id(p) for p in group] for group in before]


def test_names_of_parameters_follow() -> None:
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    optimizer = torch.optim.AdamW(net.named_parameters())
    model = FactoredModel(net, Optimizers(optimizer), ["0.weight", "2.weight"])
    (group,) = optimizer.param_groups
    before = list(group["param_names"])
    factorize(model)
    assert group["param_names"] == ["0.weight.A", "0.weight.B", "0.bias", "2.weight.A", "2.weight.B", "2.bias"]
    assert len(group["params"]) == 6
    model.restore()
    assert group["param_names"] == before
    assert [id(p) for p in group["params"]] == [id(p) for p in net.parameters()]


def test_reset_forgets_the_weight_and_keeps_the_dense() -> None:
    net, optimizer, model = setup("reset")
    stepped(net, optimizer)
    bias = optimizer.state[net[0].bias]
    factorize(model)
    assert optimizer.state[net[0].bias] is bias
    assert len(optimizer.state) == 2
    stepped(net, optimizer)
    model.restore()
    assert set(map(id, optimizer.state)) == {id(net[0].bias), id(net[2].bias)}
    assert optimizer.state[net[0].bias]["step"] == 6


def test_moments_of_factors_are_those_of_their_gradients() -> None:
    """After one gradient G, SGD's momentum is G: projected, it must be G B^T and A^T G."""
    net, optimizer, model = setup("project", torch.optim.SGD, momentum=0.9)
    stepped(net, optimizer, steps=1)
    G = optimizer.state[net[0].weight]["momentum_buffer"].clone()  # (6, 8): the matrix is its transpose
    factorize(model)
    record = model.records["0.weight"]
    torch.testing.assert_close(optimizer.state[record.A]["momentum_buffer"], G.T @ record.B.T)
    torch.testing.assert_close(optimizer.state[record.B]["momentum_buffer"], record.A.T @ G.T)
    model.restore()
    torch.testing.assert_close(optimizer.state[net[0].weight]["momentum_buffer"], G, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trained", ["A", "B", "all"])
@pytest.mark.parametrize("optimizer_type", [torch.optim.AdamW, torch.optim.NAdam, torch.optim.RMSprop])
def test_projected_state_is_usable_and_squares_stay_positive(optimizer_type: Any, trained: Any) -> None:
    net, optimizer, model = setup("project", optimizer_type)
    stepped(net, optimizer)
    factorize(model)
    model.train_only(trained)
    stepped(net, optimizer)
    model.restore()
    stepped(net, optimizer)
    for parameter, state in optimizer.state.items():
        assert state["step"] == 9
        for key, value in state.items():
            if value.ndim:
                assert value.shape == parameter.shape, key
            assert torch.isfinite(value).all()
            assert "sq" not in key or (value >= 0).all()


def test_compression_and_dense_state() -> None:
    net, _optimizer, model = setup("reset")
    plain = {name: value.clone() for name, value in net.state_dict().items()}
    model.factorize({"0.weight": decompose(model.matrices()["0.weight"], RULE)})
    assert model.compression == (48 + 6 + 24 + 4) / (6 * (8 + 6) + 6 + 24 + 4)
    dense = model.dense_state_dict()
    assert set(dense) == set(plain)
    for name, value in plain.items():
        torch.testing.assert_close(dense[name], value)
    model.restore()
    net.load_state_dict(dense)
