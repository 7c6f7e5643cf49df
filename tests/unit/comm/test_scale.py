"""Gradients are divided as DDP divides them, and looked at for NaN and infinity on the way."""

from __future__ import annotations

import pytest
import torch

from abtrain.comm.data_parallel import _PIECE, scale_

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_is_that_of_one_product(dtype: torch.dtype) -> None:
    flat = torch.randn(_PIECE + 3, dtype=dtype, generator=torch.Generator().manual_seed(3))
    expected = flat * (1.0 / 3)
    seen = scale_(flat, 1.0 / 3)
    assert torch.equal(flat, expected)
    assert all(bool(numbers.isfinite().all()) for numbers in seen)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", [0, _PIECE])
@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_nan_and_infinity_are_seen_anywhere(dtype: torch.dtype, place: int, number: str) -> None:
    flat = torch.ones(_PIECE + 1, dtype=dtype)
    flat[place] = float(number)
    assert not all(bool(numbers.isfinite().all()) for numbers in scale_(flat, 0.5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_finite_numbers_whose_sum_overflows_are_finite(dtype: torch.dtype) -> None:
    flat = torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)
    assert all(bool(numbers.isfinite().all()) for numbers in scale_(flat, 0.5))
    assert not scale_(torch.empty(0, dtype=dtype), 0.5)
