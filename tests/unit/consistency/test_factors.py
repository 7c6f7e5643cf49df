"""Workers end with the same factors, whatever each of them computed."""

from __future__ import annotations

import torch
from torch import Tensor

from abtrain import SigmaCutoff
from abtrain.comm.communicator import Communicator
from abtrain.comm.in_process import run_in_process
from abtrain.consistency.factors import _exchange, agree_on_factors
from abtrain.lowrank.svd import Factors
from abtrain.recipes.factoring import Factoring


def test_two_right_decompositions_become_one() -> None:
    """4 I = (2 I)(2 I) = (2 P)(2 P) for a permutation P that is its own inverse: both are right, mixed they are not."""
    P = torch.eye(4)[[1, 0, 3, 2]]

    def work(comm: Communicator) -> tuple[Tensor, Tensor]:
        basis = torch.eye(4) if comm.rank == 0 else P
        W = 4 * torch.eye(4)
        factors = {"w": Factors(2 * basis, 2 * basis)}
        agreed = _exchange(comm, {"w": W}, factors, {"w": 4}, {"w": 0}, shared=False)["w"]
        return agreed.A, agreed.B

    for A, B in run_in_process(2, work):
        assert torch.equal(A, 2 * torch.eye(4))
        torch.testing.assert_close(A @ B, 4 * torch.eye(4))


def test_each_and_shared_give_the_same_factors() -> None:
    weights = {f"w{i}": torch.randn(8, 5, generator=torch.Generator().manual_seed(i)) for i in range(5)}
    for svd in ("each", "shared"):
        settings = Factoring(SigmaCutoff(0.3), svd=svd)  # type: ignore[arg-type]
        results = run_in_process(3, lambda comm, s=settings: agree_on_factors(comm, weights, s)[0])
        for name, W in weights.items():
            assert all(torch.equal(result[name].A, results[0][name].A) for result in results)
            S = torch.linalg.svdvals(W)
            assert results[0][name].k == int((0.3 * S[0] <= S).sum())
