"""Decomposition of a matrix, and what becomes of odd ones."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from abtrain import Energy, FixedRank, ParameterShare, SigmaCutoff, StableRank
from abtrain.errors import NonFiniteError
from abtrain.lowrank.svd import MatrixShape, decompose
from abtrain.recipes.factoring import RankRule

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
def test_halves_are_computed_in_more_bits(dtype: torch.dtype) -> None:
    W = torch.randn(16, 8).to(dtype)
    A, B = decompose(W, ALL)
    assert A.dtype == B.dtype == dtype
    torch.testing.assert_close(A.float() @ B.float(), W.float(), rtol=0, atol=10 * torch.finfo(dtype).eps)


def with_spectrum(S: torch.Tensor, m: int) -> torch.Tensor:
    """Returns an (m, n) matrix in float64 with the n singular values S, and random singular vectors."""
    generator, n = torch.Generator().manual_seed(0), len(S)
    U, V = (torch.linalg.qr(torch.randn(d, n, generator=generator, dtype=torch.float64))[0] for d in (m, n))
    return (U * S) @ V.T


def check_against_float64(W: torch.Tensor, rule: RankRule, tolerance: float) -> int:
    """Compares factors with an SVD in float64: their product and their balance. Returns their rank."""
    A, B = (factor.double() for factor in decompose(W, rule))
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    k = A.shape[1]
    assert k == rule(S.tolist(), *W.shape)
    best = U[:, :k] * S[:k] @ Vh[:k]
    assert (A @ B - best).norm() <= tolerance * best.norm()
    for gram in (A.T @ A, B @ B.T):
        assert (gram - S[:k].diag()).norm() <= tolerance * S[:k].norm()
    return k


RULES = [
    *(SigmaCutoff(0.15), SigmaCutoff(0.5, rank_multiple=8), Energy(0.9), StableRank(1.5), FixedRank(3)),
    ParameterShare(0.6),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (9, 1), (2, 2), (5, 3), (64, 64), (300, 40), (97, 96)], ids=str)
def test_factors_are_those_of_an_svd_in_float64(shape: tuple[int, int], rule: RankRule) -> None:
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    check_against_float64(W, rule, 1e-6)
    # A transposed view, as of a weight with fewer rows than columns.
    check_against_float64(W.T.contiguous().T, rule, 1e-6)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)
def test_factors_of_other_dtypes_are_as_exact_as_these(dtype: torch.dtype, tolerance: float) -> None:
    W = torch.randn(60, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    check_against_float64(W, SigmaCutoff(0.3), tolerance)


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e30, 1e36])
def test_tiny_and_huge_matrices_lose_nothing(scale: float) -> None:
    W = torch.randn(60, 40, generator=torch.Generator().manual_seed(0)) * scale
    assert check_against_float64(W, SigmaCutoff(0.3), 1e-6) > 1


@pytest.mark.parametrize("digits", [2, 4, 5, 6, 8])
@pytest.mark.parametrize("rule", [SigmaCutoff(0.01), SigmaCutoff(1e-3), Energy(0.999), FixedRank(40), ALL], ids=str)
def test_ill_conditioned_matrices(digits: int, rule: RankRule) -> None:
    """A full SVD in float32 is good to about 2e-6, and replaces the Gram matrix where the rank reaches deep."""
    W = with_spectrum(torch.logspace(0.001, -digits, 40, dtype=torch.float64), 60).float()
    check_against_float64(W, rule, 4e-6)


@pytest.mark.parametrize("digits", [2, 4, 6, 8])
def test_only_ranks_that_reach_deep_need_a_full_svd(digits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    svd, called = torch.linalg.svd, []

    def counted(W: torch.Tensor, **options: Any) -> Any:
        called.append(W.shape)
        return svd(W, **options)

    monkeypatch.setattr(torch.linalg, "svd", counted)
    W = with_spectrum(torch.logspace(0, -digits, 40, dtype=torch.float64), 60).float()
    decompose(W, SigmaCutoff(0.05))
    assert not called
    decompose(W, ALL)
    assert bool(called) == (digits > 4)


def test_rank_deficient_matrices_keep_their_rank() -> None:
    S = torch.zeros(40, dtype=torch.float64)
    S[:3] = torch.tensor([3.0, 2.0, 1.0])
    W = with_spectrum(S, 60).float()
    assert check_against_float64(W, SigmaCutoff(1e-3), 1e-6) == 3
    # Rounding errors fill up a rank that is too large, as in a full SVD.
    A, B = decompose(W, FixedRank(5))
    assert (A.shape[1], B.shape[0]) == (5, 5)
    torch.testing.assert_close(A @ B, W)


@pytest.mark.parametrize("shape", [(40, 40), (90, 40)], ids=str)
def test_orthogonal_matrices(shape: tuple[int, int]) -> None:
    """All singular values are equal, so any basis is right, and a part of it as good as any other."""
    W = torch.nn.init.orthogonal_(torch.empty(shape), generator=torch.Generator().manual_seed(0))
    A, B = decompose(W, SigmaCutoff(0.5))
    assert (A @ B - W).norm() <= 1e-6 * W.norm()
    A, B = decompose(W, FixedRank(10))
    torch.testing.assert_close(B @ B.T, torch.eye(10))
    torch.testing.assert_close((W - A @ B).norm(), torch.tensor(30.0).sqrt())


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
    # The Gram matrix of numbers so far apart is not exact enough, and an SVD takes its place.
    W = with_spectrum(torch.logspace(0, -8, 40, dtype=torch.float64), 60).float()
    A, B = decompose(W, ALL)
    assert tried == [torch.float32, torch.float64]
    assert A.dtype == torch.float32
    torch.testing.assert_close(A @ B, W)


def test_an_svd_replaces_eigenvectors_that_do_not_converge(monkeypatch: pytest.MonkeyPatch) -> None:
    def stubborn(G: torch.Tensor) -> Any:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", stubborn)
    W = torch.randn(6, 4)
    A, B = decompose(W, ALL)
    torch.testing.assert_close(A @ B, W)


@pytest.mark.parametrize("k", [1, 2])
def test_factors_are_laid_out_by_rows(k: int) -> None:
    A, B = decompose(torch.randn(18, 6), FixedRank(k))
    assert (A.stride(), B.stride()) == (torch.empty(18, k).stride(), torch.empty(k, 6).stride())
