"""Many small parameters lie in one piece of memory, and nobody notices."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from abtrain import ABTraining, recipes, side_by_side
from abtrain.comm.communicator import Communicator
from abtrain.comm.in_process import run_in_process
from abtrain.lowrank.classify import classify
from abtrain.recipes.factoring import Factoring
from abtrain.recipes.rank_rules import FixedRank
from abtrain.side_by_side import in_one_piece, lay_side_by_side


def several(count: int = 1200, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(i % 3 + 1, 2, generator=generator).to(dtype)) for i in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_many_parameters_become_one_piece_with_the_same_values(dtype: torch.dtype) -> None:
    parameters = several(dtype=dtype)
    values = [parameter.detach().clone() for parameter in parameters]
    parameters[0].grad = gradient = torch.ones_like(parameters[0])
    lay_side_by_side(parameters)
    piece = in_one_piece(parameters)
    assert piece is not None and torch.equal(piece, torch.cat([value.reshape(-1) for value in values]))
    assert all(torch.equal(parameter, value) for parameter, value in zip(parameters, values, strict=True))
    assert parameters[0].grad is gradient
    piece.zero_()
    assert not any(bool(parameter.any()) for parameter in parameters)


def test_few_parameters_stay_where_they_are() -> None:
    parameters = several(side_by_side._MANY - 1)
    addresses = [parameter.data_ptr() for parameter in parameters]
    lay_side_by_side(parameters)
    assert addresses == [parameter.data_ptr() for parameter in parameters]


def test_parameters_that_others_may_see_through_stay_where_they_are() -> None:
    rows = torch.randn(2, 2)
    views = [nn.Parameter(rows[0]), nn.Parameter(rows[1])]
    tied = nn.Parameter(torch.randn(2))
    transposed = nn.Parameter(torch.randn(3, 2).T)
    empty = nn.Parameter(torch.empty(0))
    wide = nn.Parameter(torch.randn(2, dtype=torch.float64))
    shared = nn.Parameter(torch.randn(2).share_memory_())
    for special in (views, [tied, nn.Parameter(tied.data)], [transposed], [empty], [wide], [shared]):
        parameters = [*several(), *special]
        lay_side_by_side(parameters)
        assert in_one_piece(parameters) is None
        assert parameters[0].untyped_storage().nbytes() == parameters[0].nbytes


@pytest.mark.parametrize(("device", "count", "keeps"), [("cpu", 3, True), ("meta", 3, False), ("meta", 4, True)])
def test_accelerators_keep_addresses_aligned(device: str, count: int, keeps: bool) -> None:
    assert side_by_side._keeps_alignment(nn.Parameter(torch.empty(count, device=device))) is keeps


def test_neighbours_in_two_storages_are_not_one_piece() -> None:
    memory = bytearray(80)
    one, other = (torch.frombuffer(memory, dtype=torch.float32, count=10, offset=start) for start in (0, 40))
    assert one.data_ptr() + one.nbytes == other.data_ptr()
    assert in_one_piece([one, other]) is None


class Parallel(nn.ModuleList):
    """Adds up what layers compute."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x).tanh() for layer in self]).sum(0)


def trained(comm: Communicator, model: nn.Module, recipe: str) -> list[Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    ab = ABTraining(model, optimizer, recipes.build(recipe, 6, every=2), communicator=comm)
    for step in range(6):
        ab(torch.full((1, 2), float(comm.rank + step))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        ab.step()
    assert (in_one_piece(list(model.parameters())) is not None) == (side_by_side._MANY < 1200)
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("recipe", ["local_sgd", "diloco"])
def test_weights_after_merges_are_those_of_parameters_apart(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Parallel(nn.Linear(2, 2) for _ in range(600))
    ours = run_in_process(2, lambda comm: trained(comm, copy.deepcopy(model), recipe))
    monkeypatch.setattr(side_by_side, "_MANY", 10**9)
    apart = run_in_process(2, lambda comm: trained(comm, copy.deepcopy(model), recipe))
    for one, other in zip(ours, apart, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class WithAlias(Parallel):
    def __init__(self) -> None:
        super().__init__(nn.Linear(2, 2) for _ in range(600))
        self.register_buffer("seen", self[0].weight.detach())


def test_what_a_buffer_shows_stays_where_it_is() -> None:
    model = WithAlias()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ab = ABTraining(model, optimizer, recipes.local_sgd(2, every=1))
    while not ab.finished:
        ab(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        ab.step()
    assert torch.equal(model.seen, model[0].weight)


def test_weights_in_one_piece_can_be_factored() -> None:
    model = Parallel(nn.Linear(2, 2) for _ in range(600))
    lay_side_by_side(list(model.parameters()))
    assert in_one_piece(list(model.parameters())) is not None
    kinds = {
        treatment.kind for treatment in classify(model, Factoring(FixedRank(1), min_dim=2)) if treatment.shape == (2, 2)
    }
    assert kinds == {"factored"}


def test_a_model_in_one_piece_is_copied_and_saved_like_any_other(tmp_path: Path) -> None:
    model = Parallel(nn.Linear(2, 2) for _ in range(600))
    lay_side_by_side(list(model.parameters()))
    state = model.state_dict()
    save_file(state, tmp_path / "model.safetensors")
    torch.save(state, saved := io.BytesIO())
    twin, copied = load_file(tmp_path / "model.safetensors"), copy.deepcopy(model)
    loaded = torch.load(io.BytesIO(saved.getvalue()))
    for other in (twin, loaded, copied.state_dict()):
        assert all(torch.equal(other[name], tensor) for name, tensor in state.items())
    copied.double().float()
    with torch.no_grad():
        next(copied.parameters()).zero_()
    assert bool(next(model.parameters()).any())
