"""The largest numbers arrive, and nothing arrives that was not there."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from abtrain.comm.top_k import GRANULE, decode_top, encode_top, top_nbytes

KS = (2, 3, 8, 64)


@given(
    k=st.sampled_from(KS),
    rows=st.integers(0, 5),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1e-30, 1e-6, 1.0, 1e20, 1e35]),
    zeros=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
)
def test_numbers_lose_less_than_they_hold(k: int, rows: int, seed: int, scale: float, zeros: float) -> None:
    count = rows * GRANULE
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=generator) * scale
    x[torch.rand(count, generator=generator) < zeros] = 0
    data = encode_top(x, k)
    assert data.dtype == torch.uint8
    assert data.numel() == top_nbytes(count, k)
    decoded = decode_top(data, count, k)
    assert (decoded.sign() * x.sign() >= 0).all()
    assert not decoded[x == 0].any()
    for sent, wanted in zip(decoded.double().split(GRANULE), x.double().split(GRANULE), strict=True):
        # What is sent has the signs of the largest and their mean size: it explains at least the share of one number.
        assert (sent - wanted).square().sum() <= (1 - 0.9 / GRANULE) * wanted.square().sum()


@pytest.mark.parametrize("k", KS)
def test_the_largest_of_each_block_are_sent(k: int) -> None:
    x = torch.randn(4 * GRANULE, generator=torch.Generator().manual_seed(0))
    sent = decode_top(encode_top(x, k), len(x), k).view(-1, 128) != 0
    assert (sent.sum(dim=1) == k).all()
    for block, mask in zip(x.view(-1, 128).abs(), sent, strict=True):
        assert block[mask].min() >= block[~mask].max()


@pytest.mark.parametrize(("k", "bits"), [(4, 0.28), (8, 0.53), (16, 1.03)])
def test_bits_of_a_number(k: int, bits: float) -> None:
    assert top_nbytes(2**20, k) * 8 / 2**20 == pytest.approx(bits, abs=0.005)
