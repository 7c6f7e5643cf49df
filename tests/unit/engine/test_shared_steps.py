"""The workers of a group share the work of Muon's steps."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from abtrain import ABTraining, recipes
from abtrain.comm.communicator import Communicator
from abtrain.comm.in_process import run_in_process
from abtrain.optim import Muon, Sharing, muon, muon_and_adamw
from abtrain.recipes.recipe import Recipe

LOCAL = recipes.local_sgd(7, every=3)
FACTORED = recipes.ab_local(8, every=2, warmup_steps=4, rank_rule="share:0.7")


def net() -> nn.Module:
    torch.manual_seed(0)
    start = (nn.Linear(6, 16), nn.Linear(16, 24), nn.Conv1d(1, 4, 3), nn.Flatten())
    return nn.Sequential(*start, nn.Linear(88, 24), nn.Linear(24, 16), nn.Linear(16, 16), nn.Linear(16, 3))


def trained(
    monkeypatch: pytest.MonkeyPatch, least: int, recipe: Recipe, workers: int = 4, group_size: int = 2
) -> tuple[list[dict[str, Tensor]], list[int], list[int]]:
    """Trains, and returns for each worker its weights, the matrices that it orthogonalized, and bytes within groups."""
    done = dict[str, int]()
    compute = muon.orthogonalized

    def counted(M: Tensor, *args: Any) -> Tensor:
        name = threading.current_thread().name
        done[name] = done.get(name, 0) + len(M)
        return compute(M, *args)

    monkeypatch.setattr("abtrain.engine.shared_steps.SHARED_FROM", least)
    monkeypatch.setattr(muon, "orthogonalized", counted)
    # Some matrices are trained together, and none with all others.
    monkeypatch.setattr(muon, "_AT_ONCE", 800)
    initial = net()

    def work(comm: Communicator) -> tuple[dict[str, Tensor], int]:
        model = copy.deepcopy(initial)
        optimizers = muon_and_adamw(model, 0.02)
        ab = ABTraining(model, optimizers, recipe, communicator=comm)
        draw = torch.Generator().manual_seed(comm.rank)
        while not ab.finished:
            ab(torch.randn(8, 1, 6, generator=draw)).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            ab.step()
        return ab.dense_state_dict(), comm.meter.payload()["within_groups"]

    results = run_in_process(workers, work, group_size)
    counts = [done[f"rank {rank}"] for rank in range(workers)]
    monkeypatch.undo()
    return [weights for weights, _ in results], counts, [sent for _, sent in results]


@pytest.mark.parametrize("recipe", [LOCAL, FACTORED, recipes.ddp(5)], ids=lambda recipe: recipe.name)
@pytest.mark.parametrize(("workers", "group_size"), [(4, 2), (3, 3)])
def test_sharing_changes_no_bit(monkeypatch: pytest.MonkeyPatch, recipe: Recipe, workers: int, group_size: int) -> None:
    whole, of_each, sent = trained(monkeypatch, 10**9, recipe, workers, group_size)
    shared, of_share, more = trained(monkeypatch, 1, recipe, workers, group_size)
    for one, other in zip(whole, shared, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert len(set(of_each)) == 1
    for start in range(0, workers, group_size):
        assert sum(of_share[start : start + group_size]) == of_each[0]
        assert max(of_share[start : start + group_size]) < of_each[0]
    assert min(more) > max(sent)


def test_workers_without_colleagues_and_small_models_share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _, alone, nothing = trained(monkeypatch, 1, LOCAL, workers=2, group_size=1)
    assert nothing == [0, 0] and alone[0] == alone[1]
    _, small, _ = trained(monkeypatch, 3000, LOCAL)
    assert len(set(small)) == 1


def test_optimizers_step_alone_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("abtrain.engine.shared_steps.SHARED_FROM", 1)

    def work(comm: Communicator) -> list[int]:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        optimizer = Muon([model[1].weight], lr=0.1)
        optimizers = [optimizer, torch.optim.SGD([p for p in model.parameters() if p is not model[1].weight], lr=0.1)]
        found = [optimizer.sharing.workers]
        ab = ABTraining(model, optimizers, LOCAL, communicator=comm)
        # A copy that a loop makes, such as for a second model, trains alone.
        found += [optimizer.sharing.workers, copy.deepcopy(optimizer).sharing.workers]
        ab.close()
        found.append(optimizer.sharing.workers)
        if comm.rank == 0:
            model[1].weight.grad = torch.ones(4, 4)
            optimizer.step()
        return found

    assert run_in_process(2, work, group_size=2) == [[1, 2, 1, 1]] * 2
    assert Sharing() == Muon.sharing
