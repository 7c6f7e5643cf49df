"""Decomposition of a matrix, and what becomes of odd ones."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from abtrain import FixedRank, SigmaCutoff
from abtrain.errors import NonFiniteError
from abtrain.lowrank.svd import MatrixShape, decompose

ALL = SigmaCutoff(0.0)


@given(shape=st.lists(st.integers(1, 6), min_size=2, max_size=4))
def test_weight_to_matrix_and_back(shape: list[int]) -> None:
    weight = torch.randn(shape)
    seen = MatrixShape(weight.shape)
    matrix = seen.to_matrix(weight)
    assert matrix.shape == (seen.m, seen.n)
    assert seen.m >= seen.n
    assert torch.equal(seen.to_tensor(matrix), weight)


def test_factors_are_balanced_and_optimal() -> None:
    W = torch.randn(20, 8, dtype=torch.float64)
    A, B = decompose(W, FixedRank(3))
    S = torch.linalg.svdvals(W)
    # eq. 3: sqrt(S) goes to either side
    torch.testing.assert_close(A.T @ A, S[:3].diag())
    torch.testing.assert_close(B @ B.T, S[:3].diag())
    # Eckart-Young: the error is what was cut off
    torch.testing.assert_close(torch.linalg.norm(W - A @ B), S[3:].square().sum().sqrt())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_computed_in_float32(dtype: torch.dtype) -> None:
    W = torch.randn(16, 8).to(dtype)
    A, B = decompose(W, ALL)
    assert A.dtype == B.dtype == dtype
    torch.testing.assert_close(A.float() @ B.float(), W.float(), rtol=0, atol=10 * torch.finfo(dtype).eps)


def test_one_column_has_rank_one() -> None:
    W = torch.randn(5, 1)
    A, B = decompose(W, ALL)
    assert (A.shape, B.shape) == ((5, 1), (1, 1))
    torch.testing.assert_close(A @ B, W)


def test_all_zero_gives_zero_factors_of_rank_one() -> None:
    A, B = decompose(torch.zeros(4, 3), SigmaCutoff())
    assert A.shape == (4, 1)
    assert not A.any()
    assert not B.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_is_refused(bad: float) -> None:
    W = torch.randn(4, 3)
    W[2, 1] = bad
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        decompose(W, ALL)


@pytest.mark.parametrize("W", [torch.empty(0, 3), torch.zeros(3), torch.zeros(3, 3, dtype=torch.int64)])
def test_what_is_no_real_matrix_is_refused(W: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="cannot decompose"):
        decompose(W, ALL)


def test_a_failing_svd_is_tried_again_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    svd = torch.linalg.svd
    tried = []

    def stubborn(W: torch.Tensor, **options: Any) -> Any:
        tried.append(W.dtype)
        if W.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return svd(W, **options)

    monkeypatch.setattr(torch.linalg, "svd", stubborn)
    W = torch.randn(6, 4)
    A, B = decompose(W, ALL)
    assert tried == [torch.float32, torch.float64]
    assert A.dtype == torch.float32
    torch.testing.assert_close(A @ B, W)


@pytest.mark.parametrize("k", [1, 2])
def test_factors_are_laid_out_by_rows(k: int) -> None:
    A, B = decompose(torch.randn(18, 6), FixedRank(k))
    assert (A.stride(), B.stride()) == (torch.empty(18, k).stride(), torch.empty(k, 6).stride())
