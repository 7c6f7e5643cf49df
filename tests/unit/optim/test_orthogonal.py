"""Orthogonalized matrices, beside those of iterations in double precision."""

from __future__ import annotations

import pytest
import torch

from abtrain.optim.orthogonal import orthogonalized

COEFFICIENTS = (3.4445, -4.775, 2.0315)
SHAPES = [(8, 8), (8, 11), (8, 12), (12, 8), (16, 200), (200, 16), (1, 5), (5, 1)]


def iterated(M: torch.Tensor) -> torch.Tensor:
    """One matrix through singular values: an iteration maps each to a s + b s^3 + c s^5."""
    U, s, Vh = torch.linalg.svd(M.double(), full_matrices=False)
    s = s / s.norm()
    a, b, c = COEFFICIENTS
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    return U * s @ Vh


@pytest.mark.parametrize("decades", [0, 4])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_singular_values_come_near_one(m: int, n: int, decades: int) -> None:
    M = torch.randn(3, m, n, generator=torch.Generator().manual_seed(m + n)) * torch.logspace(0, -decades, n)
    found = orthogonalized(M, COEFFICIENTS, 5, 1e-7)
    assert found.shape == M.shape
    torch.testing.assert_close(found.double(), torch.stack([iterated(one) for one in M]), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("m", "n"), [(4, 4), (4, 16)])
def test_a_matrix_of_zeros_stays_one(m: int, n: int) -> None:
    assert not orthogonalized(torch.zeros(1, m, n), COEFFICIENTS, 5, 1e-7).any()


@pytest.mark.parametrize(("m", "n"), [(4, 4), (4, 16)])
def test_what_is_not_finite_shows(m: int, n: int) -> None:
    M = torch.ones(2, m, n)
    M[1, 2, 3] = torch.inf
    found = orthogonalized(M, COEFFICIENTS, 5, 1e-7)
    assert found[0].isfinite().all() and found[1].isnan().all()


def test_without_iterations_a_matrix_has_norm_one() -> None:
    assert orthogonalized(torch.ones(1, 2, 8), COEFFICIENTS, 0, 1e-7).norm() == 1
