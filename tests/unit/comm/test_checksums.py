"""Checksums see every bit of a tensor, and nothing else."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abtrain.comm import checksums
from abtrain.comm.checksums import checksum, digest, fingerprint

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_digest_knows_value_shape_and_dtype(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[1, 0, 1], [0, 1, 1]]).to(dtype)
    others = [
        tensor.reshape(3, 2),
        tensor.flatten(),
        tensor[:1].contiguous(),
        tensor.flip(0),
        tensor.to(torch.complex128),
    ]
    assert 0 <= digest(tensor) < 2**62
    assert digest(tensor) == digest(tensor.clone())
    assert len({digest(t) for t in [tensor, *others]}) == 1 + len(others)


def test_a_digest_does_not_see_how_a_tensor_lies_in_memory() -> None:
    tensor = torch.arange(12.0).view(3, 4)
    for same in (tensor.t().contiguous().t(), torch.arange(24.0).view(3, 8)[:, ::2] / 2, torch.nn.Parameter(tensor)):
        assert torch.equal(same, tensor) and digest(same) == digest(tensor)
    conjugate = torch.tensor([1 + 2j]).conj()
    assert digest(conjugate) == digest(torch.tensor([1 - 2j]))
    assert digest(conjugate.imag) == digest(torch.tensor([-2.0]))


def test_a_digest_sees_single_bits() -> None:
    assert digest(torch.tensor(0.0)) != digest(torch.tensor(-0.0))
    nan = struct.unpack("<f", b"\x01\x00\xc0\x7f")[0]
    assert digest(torch.tensor(nan)) == digest(torch.tensor(nan))


def test_empty_tensors_and_scalars_have_digests() -> None:
    shapes = [(), (0,), (1,), (0, 3), (3, 0)]
    assert len({digest(torch.zeros(shape)) for shape in shapes}) == len(shapes)


def test_digests_and_fingerprints_are_the_same_in_every_release() -> None:
    assert digest(torch.tensor([1.0, 2.0])) == 3014283932940851664
    assert fingerprint("weight", (2, 3), torch.float32) == 3542639060909120797


LENGTHS = st.integers(1, 300)
SEEDS = st.integers(0, 10**6)
WORDS = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8])


def numbers(length: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Numbers of which no two are equal in size, as far as the dtype goes."""
    generator = torch.Generator().manual_seed(seed)
    return (1 + torch.randperm(length, generator=generator)).to(dtype)


@settings(deadline=None)
@given(LENGTHS, SEEDS, WORDS, st.data())
def test_any_flipped_bits_are_seen(length: int, seed: int, dtype: torch.dtype, data: st.DataObject) -> None:
    tensor = numbers(length, seed, dtype)
    flipped = tensor.clone()
    raw = flipped.view(torch.uint8)
    places = data.draw(st.sets(st.integers(0, 8 * raw.numel() - 1), min_size=1, max_size=40))
    for place in places:
        raw[place // 8] ^= 1 << place % 8
    assert checksum(flipped) != checksum(tensor)


@settings(deadline=None)
@given(LENGTHS, SEEDS, st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), st.data())
def test_any_negated_elements_are_seen(length: int, seed: int, dtype: torch.dtype, data: st.DataObject) -> None:
    """Also every second one, all of them, and pairs that lie eight bytes apart."""
    tensor = numbers(length, seed, dtype)
    start, step = data.draw(st.integers(0, length - 1)), data.draw(st.integers(1, 8))
    negated = tensor.clone()
    negated[start::step] *= -1
    assert checksum(negated) != checksum(tensor)


@settings(deadline=None)
@given(st.integers(2, 300), SEEDS, st.integers(1, 4), st.data())
def test_swapped_elements_and_blocks_are_seen(length: int, seed: int, block: int, data: st.DataObject) -> None:
    block = min(block, length // 2)
    tensor = numbers(length, seed)
    first = data.draw(st.integers(0, length - 2 * block))
    second = data.draw(st.integers(first + block, length - block))
    swapped = tensor.clone()
    swapped[first : first + block], swapped[second : second + block] = (
        tensor[second : second + block],
        tensor[first : first + block],
    )
    assert checksum(swapped) != checksum(tensor)


@settings(deadline=None)
@given(st.integers(2, 300), SEEDS, st.integers(1, 299))
def test_rotated_elements_are_seen(length: int, seed: int, places: int) -> None:
    tensor = numbers(length, seed)
    assert (checksum(tensor.roll(places)) == checksum(tensor)) == (places % length == 0)


def test_tensors_of_accelerators_come_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces through a buffer give the checksum of the whole, whatever their size."""

    def piecewise(flat: torch.Tensor) -> object:
        staging = torch.empty(64, dtype=torch.uint8)
        return (staging[: piece.numel()].copy_(piece) for piece in flat.split(64))

    tensor = numbers(1000, 0)
    whole = checksum(tensor)
    monkeypatch.setattr(checksums, "_chunks", piecewise)
    assert checksum(tensor) == whole
