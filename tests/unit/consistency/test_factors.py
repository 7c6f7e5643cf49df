"""Workers end with the same factors, whatever each of them computed."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from abtrain import SigmaCutoff
from abtrain.comm.communicator import Communicator
from abtrain.comm.in_process import run_in_process
from abtrain.consistency.factors import _exchange, agree_on_factors, divide_work
from abtrain.lowrank.svd import Factors, decompose
from abtrain.recipes.factoring import SVD, Factoring, RankRule


def test_two_right_decompositions_become_one() -> None:
    """4 I = (2 I)(2 I) = (2 P)(2 P) for a permutation P that is its own inverse: both are right, mixed they are not."""
    P = torch.eye(4)[[1, 0, 3, 2]]

    def work(comm: Communicator) -> tuple[Tensor, Tensor]:
        basis = torch.eye(4) if comm.rank == 0 else P
        W = 4 * torch.eye(4)
        factors = {"w": Factors(2 * basis, 2 * basis)}
        agreed = _exchange(comm, {"w": W}, factors, {"w": 4}, {"w": 0}, scope=None)["w"]
        return agreed.A, agreed.B

    for A, B in run_in_process(2, work):
        assert torch.equal(A, 2 * torch.eye(4))
        torch.testing.assert_close(A @ B, 4 * torch.eye(4))


def test_each_and_shared_give_the_same_factors() -> None:
    weights = {f"w{i}": torch.randn(8, 5, generator=torch.Generator().manual_seed(i)) for i in range(5)}
    for svd in ("auto", "each", "shared"):
        settings = Factoring(SigmaCutoff(0.3), svd=svd)  # type: ignore[arg-type]
        results = run_in_process(3, lambda comm, s=settings: agree_on_factors(comm, weights, s)[0])
        for name, W in weights.items():
            assert all(torch.equal(result[name].A, results[0][name].A) for result in results)
            S = torch.linalg.svdvals(W)
            assert results[0][name].k == int((0.3 * S[0] <= S).sum())


SIZES = {"a": (300, 100), "b": (100, 100), "c": (400, 100), "d": (90, 80), "e": (400, 100), "f": (5, 3)}


def numbered() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(size, generator=generator) for name, size in SIZES.items()}


def decomposed(monkeypatch: pytest.MonkeyPatch, svd: SVD) -> tuple[list[list[str]], list[dict[str, Factors]]]:
    """Lets 2 groups of 3 workers factor the same weights. Returns the weights that each decomposed, and its factors."""
    named = {tuple(W.shape): name for name, W in numbered().items()} | {(400, 100): "large"}
    work: dict[str, list[str]] = {}

    def noted(W: Tensor, rule: RankRule) -> Factors:
        work.setdefault(threading.current_thread().name, []).append(named[tuple(W.shape)])
        return decompose(W, rule)

    monkeypatch.setattr("abtrain.consistency.factors.decompose", noted)
    settings = Factoring(SigmaCutoff(0.3), svd=svd)
    factors = run_in_process(6, lambda comm: agree_on_factors(comm, numbered(), settings)[0], group_size=3)
    return [sorted(work.get(f"rank {rank}", [])) for rank in range(6)], factors


def test_by_default_each_group_shares_the_work_of_large_models(monkeypatch: pytest.MonkeyPatch) -> None:
    small, expected = decomposed(monkeypatch, "auto")
    assert all(len(work) == len(SIZES) for work in small)
    monkeypatch.setattr("abtrain.consistency.factors.SHARED_FROM", 100_000)
    large, factors = decomposed(monkeypatch, "auto")
    assert large[:3] == large[3:]
    assert sorted(name for work in large[:3] for name in work) == ["a", "b", "d", "f", "large", "large"]
    for pairs in factors:
        assert list(pairs) == list(SIZES)
        for name, (A, B) in pairs.items():
            assert torch.equal(A, expected[0][name].A) and torch.equal(B, expected[0][name].B)
    assert all(len(work) == len(SIZES) for work in decomposed(monkeypatch, "each")[0])


def test_groups_whose_roundings_differ_take_the_first_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second group, rounding keeps a singular value that is just below the cutoff in the first."""
    monkeypatch.setattr("abtrain.consistency.factors.SHARED_FROM", 1)
    W = torch.diag(torch.tensor([1.0, 0.5, 0.25, 0.1]))

    def work(comm: Communicator) -> tuple[dict[str, Factors], int]:
        nudged = W * torch.tensor([1.0, 1.0, 1 - 1e-6 * (comm.rank < 2), 1.0])
        factors = agree_on_factors(comm, {"v": W, "w": nudged}, Factoring(SigmaCutoff(0.25)))[0]
        return factors, comm.meter.payload()["between_groups"]

    results = run_in_process(4, work, group_size=2)
    assert all(factors["v"].k == 3 and factors["w"].k == 2 for factors, _ in results)
    for factors, _ in results:
        torch.testing.assert_close(factors["w"].A @ factors["w"].B, torch.diag(torch.tensor([1.0, 0.5, 0.0, 0.0])))
        assert all(torch.equal(one, other) for one, other in zip(factors["w"], results[0][0]["w"], strict=True))


@pytest.mark.parametrize("workers", [1, 2, 3, 5, 8])
def test_work_is_divided_evenly(workers: int) -> None:
    shapes = [(2304, 768), (768, 768), (3072, 768), (3072, 768)] * 12
    work = [0] * workers
    for (m, n), owner in zip(shapes, divide_work(shapes, workers), strict=True):
        work[owner] += n * n * (m + 8 * n)
    assert max(work) <= 1.05 * sum(work) / workers


def test_no_more_owners_than_weights() -> None:
    assert divide_work([(4, 3), (9, 3)], 5) == [1, 0]
    assert divide_work([], 5) == []
