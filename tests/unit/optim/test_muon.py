"""Muon for the matrices inside a model, AdamW for the rest."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from abtrain.commands.tasks import models
from abtrain.optim import Muon, hidden_matrices, muon_and_adamw

FORMATS = (torch.contiguous_format, torch.channels_last)


def outside(model: nn.Module) -> list[str]:
    """The names of the parameters of two or more dimensions that Muon does not train."""
    hidden = set(map(id, hidden_matrices(model)))
    return [name for name, p in model.named_parameters() if p.ndim >= 2 and id(p) not in hidden]


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (models.digits_mlp, ["4.weight"]),
        (models.fashion_cnn, ["0.weight", "17.weight"]),
        (models.VisionTransformer, ["position", "patches.weight", "head.weight"]),
        (models.GPT, ["embedding.weight", "position.weight", "head.weight"]),
        (models.resnet50, ["conv1.weight", "fc.1.weight"]),
    ],
)
def test_the_ends_of_a_model_are_not_trained_by_muon(build: Callable[[], nn.Module], names: list[str]) -> None:
    assert outside(build()) == names


def test_neither_are_tied_embeddings_and_recurrent_layers() -> None:
    model = nn.ModuleDict(
        {
            "tokens": nn.Embedding(8, 4),
            "gates": nn.GRU(4, 4),
            "middle": nn.Linear(4, 4),
            "tied": nn.Linear(4, 8, bias=False),
            "head": nn.Linear(4, 8),
        }
    )
    model["tied"].weight = model["tokens"].weight
    assert outside(model) == ["tokens.weight", "gates.weight_ih_l0", "gates.weight_hh_l0", "head.weight"]


def test_each_trained_parameter_has_one_optimizer() -> None:
    model = models.GPT()
    model.norm.weight.requires_grad_(False)
    muon, adamw = muon_and_adamw(model, 4e-3, weight_decay=0.1)
    held = [p for one in (muon, adamw) for group in one.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert [[group["weight_decay"] for group in one.param_groups] for one in (muon, adamw)] == [[0.1], [0.1, 0.0]]
    assert {group["lr"] for one in (muon, adamw) for group in one.param_groups} == {4e-3}


def test_an_optimizer_without_parameters_is_left_out() -> None:
    assert [type(one).__name__ for one in muon_and_adamw(nn.Linear(4, 4), 1e-3)] == ["AdamW"]
    inner = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False).requires_grad_(False))
    inner.append(nn.Linear(4, 4, bias=False))
    inner[2].requires_grad_(False)
    assert [type(one).__name__ for one in muon_and_adamw(inner, 1e-3)] == ["AdamW"]


@pytest.mark.parametrize("memory_format", FORMATS)
def test_a_convolution_is_trained_as_its_matrix(memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    convolution, matrix = nn.Conv2d(8, 16, 3, bias=False), nn.Parameter(torch.empty(16, 72))
    with torch.no_grad():
        matrix.copy_(convolution.weight.flatten(1))
    convolution.to(memory_format=memory_format)
    ours, pytorch = Muon(convolution.parameters(), lr=0.1), torch.optim.Muon([matrix], lr=0.1)
    for _ in range(3):
        gradient = torch.randn(16, 8, 3, 3)
        # PyTorch leaves gradients in whatever format the backward pass had.
        convolution.weight.grad, matrix.grad = gradient.clone(), gradient.flatten(1)
        ours.step()
        pytorch.step()
    # PyTorch computes in bfloat16.
    torch.testing.assert_close(convolution.weight.flatten(1).detach(), matrix.detach(), atol=2e-2, rtol=0)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_saved_state_continues_in_any_memory_format(memory_format: torch.memory_format) -> None:
    def steps(weight: nn.Parameter, optimizer: Muon, gradients: list[Tensor]) -> None:
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()

    torch.manual_seed(0)
    gradients = [torch.randn(6, 4, 3, 3) for _ in range(4)]
    weight = nn.Parameter(torch.randn(6, 4, 3, 3).to(memory_format=memory_format))
    optimizer = Muon([weight], lr=0.1)
    steps(weight, optimizer, gradients[:2])
    other = nn.Parameter(weight.detach().clone())
    resumed = Muon([other], lr=0.1)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["momentum_buffer"] = state["state"][0]["momentum_buffer"].contiguous()
    resumed.load_state_dict(state)
    steps(weight, optimizer, gradients[2:])
    steps(other, resumed, gradients[2:])
    assert torch.equal(weight, other)


def test_matrices_of_one_shape_are_trained_as_if_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    shapes = [(4, 6), (6, 4), (4, 3, 2, 1), (4, 6), (4, 6)]
    weights = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    alone = [nn.Parameter(weight.detach().clone()) for weight in weights]
    # Two matrices at a time.
    monkeypatch.setattr("abtrain.optim.muon._AT_ONCE", 48)
    settings = {"lr": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    ours, pytorch = Muon(weights, **settings), [torch.optim.Muon([p], **settings) for p in alone if p.ndim == 2]
    for _ in range(3):
        for weight, other in zip(weights, alone, strict=True):
            weight.grad = torch.randn(weight.shape)
            other.grad = weight.grad.clone()
        ours.step()
        for one in pytorch:
            one.step()
    for weight, other in zip(weights, alone, strict=True):
        if weight.ndim == 2:
            # PyTorch computes in bfloat16.
            torch.testing.assert_close(weight, other, atol=2e-2, rtol=0)


def test_a_parameter_without_gradient_stays() -> None:
    weights = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    optimizer = Muon(weights, lr=0.1)

    def closure() -> Tensor:
        loss = weights[0].square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 4
    assert weights[0].ne(1).all() and weights[1].eq(1).all() and weights[1] not in optimizer.state


def test_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(3,\) is not a matrix: train it with another optimizer"):
        Muon([nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match="empty parameter list"):
        Muon([])
