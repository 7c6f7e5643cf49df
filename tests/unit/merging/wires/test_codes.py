"""Numbers in few bits stay close to what they were."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from abtrain.merging.wires.codes import CODES


def numbers(count: int, seed: int, scale: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(count, generator=generator).exp()  # magnitudes over several decades
    return torch.randn(count, generator=generator) * spread * scale


@given(
    name=st.sampled_from(["int8", "int4", "int3"]),
    blocks=st.integers(1, 20),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1e-30, 1e-6, 1.0, 1e20]),
)
def test_a_number_is_off_by_half_a_scale_at_most(name: str, blocks: int, seed: int, scale: float) -> None:
    code = CODES[name]
    x = numbers(blocks * code.block, seed, scale)
    data = code.encode(x)
    assert data.dtype == torch.uint8
    assert data.numel() == code.nbytes(x.numel())
    limit = 2 ** (code.bits - 1) - 1
    largest = x.view(-1, code.block).abs().amax(1, keepdim=True)
    error = (code.decode(data, x.numel()) - x).view(-1, code.block).abs()
    # bfloat16 has 8 bits, so a scale is at most 1/128 above what is needed
    assert (error <= 0.5 * largest / limit * (1 + 2**-7) + 1e-38).all()


@given(blocks=st.integers(1, 20), seed=st.integers(0, 2**31), scale=st.sampled_from([1e-30, 1e-6, 1.0, 1e20, 1e35]))
def test_ternary_numbers_lose_less_than_they_hold(blocks: int, seed: int, scale: float) -> None:
    code = CODES["ternary"]
    x = numbers(blocks * code.block, seed, scale)
    data = code.encode(x)
    assert data.numel() == code.nbytes(x.numel())
    decoded = code.decode(data, x.numel()).double().view(-1, code.block)
    exact = x.double().view(-1, code.block)
    for mine, wanted in zip(decoded, exact, strict=True):
        assert mine.unique().numel() <= 3
        assert (mine * wanted >= 0).all()
        # What is kept has the signs of the larger ones and their mean size, so it explains part of them: at least
        # the share of the largest number alone.
        assert (mine - wanted).square().sum() <= (1 - 0.9 / code.block) * wanted.square().sum()


def test_ternary_numbers_of_a_normal_distribution_lose_a_fifth() -> None:
    x = torch.randn(80_000, generator=torch.Generator().manual_seed(0))
    code = CODES["ternary"]
    assert (code.decode(code.encode(x), x.numel()) - x).square().mean() == pytest.approx(0.19, abs=0.01)


@pytest.mark.parametrize("name", CODES)
def test_zeros_stay_zeros_also_beside_other_numbers(name: str) -> None:
    code = CODES[name]
    assert not code.decode(code.encode(torch.zeros(4 * code.granule)), 4 * code.granule).any()
    x = torch.zeros(2 * code.granule)
    x[0] = 7.0
    decoded = code.decode(code.encode(x), x.numel())
    assert decoded[0] == pytest.approx(7.0, rel=2**-7)
    assert not decoded[1:].any()


def test_floats() -> None:
    x = numbers(100, 0, 1.0)
    assert torch.equal(CODES["fp32"].decode(CODES["fp32"].encode(x), 100), x)
    torch.testing.assert_close(CODES["bf16"].decode(CODES["bf16"].encode(x), 100), x, rtol=2**-8, atol=0)


def test_bytes_of_a_million_numbers() -> None:
    count = 2**20
    assert CODES["int8"].nbytes(count) / (4 * count) == pytest.approx(1 / 4, rel=0.02)
    assert CODES["int4"].nbytes(count) / (4 * count) == pytest.approx(1 / 8, rel=0.07)
    assert CODES["int3"].nbytes(count) / (4 * count) == pytest.approx(3.25 / 32)
    assert CODES["ternary"].nbytes(80_000) / (4 * 80_000) == pytest.approx(1.8 / 32)
