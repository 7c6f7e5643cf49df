"""Numbers in few bits stay close to what they were."""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from abtrain.merging.wires import scratch
from abtrain.merging.wires.codes import CODES, Code


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


DIGESTS = {
    "fp32": "9781bac8f2059f11",
    "bf16": "f304ea916e383d53",
    "int8": "54fdf3230391f6bc",
    "int4": "d5b632a9ea0bf18f",
    "int3": "b4958d500596ba57",
    "ternary": "71e033df9e544cb2",
}


def fixed_numbers(code: Code) -> torch.Tensor:
    """Integers times a power of two for each block, zeros of both signs and subnormals; any CPU sums them exactly."""
    block = code.block or 64
    places = torch.arange(640 * block)
    x = (places * 7919 % 10007 % 17 - 8).float().view(-1, block)
    x[:, 5] = 8
    x *= torch.where(torch.arange(len(x)) % 2 == 0, 2.0**-145, 2.0**40)[:, None]
    x[::7] = -0.0
    return x.view(-1)


@pytest.mark.parametrize("name", CODES)
def test_bytes_and_numbers_are_those_of_earlier_versions(name: str) -> None:
    code = CODES[name]
    x = fixed_numbers(code)
    data = code.encode(x)
    decoded = code.decode(data, x.numel())
    digest = hashlib.sha256(data.numpy().tobytes() + decoded.numpy().tobytes()).hexdigest()
    assert digest[:16] == DIGESTS[name]


@pytest.mark.parametrize("name", CODES)
def test_parts_are_encoded_as_each_block_is_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code = CODES[name]
    x = numbers(30 * code.granule, 1, 1.0)
    alone = [code.encode(block) for block in x.split(code.granule)]
    split = code.nbytes(code.granule) - round(code.granule * code.bits / 8)
    expected = torch.cat([data[:split] for data in alone] + [data[split:] for data in alone])
    monkeypatch.setattr(scratch, "_CACHED", 640)
    assert torch.equal(code.encode(x), expected)


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("blocks", [0, 1, 30])
def test_what_is_subtracted_and_added_is_what_is_decoded(
    name: str, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "_CACHED", 640)
    code = CODES[name]
    x = numbers(blocks * code.granule, 2, 1e-3)
    data = code.encode(x)
    decoded = code.decode(data, x.numel())
    error, again = x.clone(), torch.empty_like(data)
    code.encode_and_subtract(error, out=again)
    assert torch.equal(again, data)
    assert torch.equal(error, x - decoded)
    total, out = torch.ones_like(x), torch.empty_like(x)
    code.add_decoded(data, total)
    assert torch.equal(total, 1 + decoded)
    assert code.decode(data, x.numel(), out=out) is out
    assert torch.equal(out, decoded)


@pytest.mark.parametrize("name", ["int8", "int4", "int3", "ternary"])
def test_bytes_may_begin_at_any_address(name: str) -> None:
    code = CODES[name]
    x = numbers(3 * code.block, 3, 1.0)
    data = code.encode(x)
    moved = torch.cat([data.new_zeros(1), data])[1:]
    assert torch.equal(code.decode(moved, x.numel()), code.decode(data, x.numel()))


@pytest.mark.parametrize("name", ["int8", "int4", "int3", "ternary"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_spoils_its_block_only(name: str, value: float) -> None:
    code = CODES[name]
    x = numbers(3 * code.block, 4, 1.0)
    clean = code.decode(code.encode(x), x.numel()).view(3, -1)
    x[code.block + 7] = value
    decoded = code.decode(code.encode(x), x.numel()).view(3, -1)
    assert not decoded[1].isfinite().any()
    assert torch.equal(decoded[::2], clean[::2])


@pytest.mark.parametrize("name", ["int8", "int4", "int3", "ternary"])
def test_threads_and_inference_mode_do_not_disturb_each_other(name: str) -> None:
    code = CODES[name]
    inputs = [numbers(1000 * code.block, seed, 1.0) for seed in range(4)]
    expected = [code.encode(x) for x in inputs]

    def work(seed: int) -> bool:
        with torch.inference_mode(seed % 2 == 0):
            data = code.encode(inputs[seed])
        return torch.equal(data, expected[seed]) and torch.equal(code.encode(inputs[seed]), data)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, list(range(4)) * 5))
