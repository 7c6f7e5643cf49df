"""Encodes a 1-D float32 tensor in few bits, as a 1-D tensor of bytes, and decodes it.

Integers are scaled by block: each block of numbers has a scale, sent as bfloat16. For int8, int4 and int3 it is the
block's largest magnitude over the largest integer, so the error of a number is at most half a scale. For ternary
numbers (-1, 0, 1) it is the mean magnitude of those that do not become 0 (Li et al., arXiv 1605.04711). The error of a
block has a smaller norm than the block, as error feedback requires (Karimireddy et al., arXiv 1901.09847).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_SCALE = torch.bfloat16


@dataclass(frozen=True)
class Code:
    """A code that represents each float32 number by a fixed number of bits.

    Attributes:
        name: the code's name.
        bits: bits per number. Five ternary numbers share one byte; eight numbers of three bits share three bytes.
        block: the number of values that share a scale; 0 if there are no scales.
    """

    name: str
    bits: float
    block: int = 0

    @property
    def exact(self) -> bool:
        """Whether decoding returns exactly the float32 numbers that were encoded."""
        return self.bits == 32

    @property
    def granule(self) -> int:
        """The number of values in the smallest unit that can be encoded. `encode` and `decode` need multiples of it."""
        return self.block or 1

    def nbytes(self, count: int) -> int:
        """Returns the number of bytes that encode `count` numbers, scales included."""
        scales = count // self.block * _SCALE.itemsize if self.block else 0
        return round(count * self.bits / 8) + scales

    def encode(self, numbers: Tensor) -> Tensor:
        """Encodes finite float32 numbers (count,) as uint8 (nbytes(count),). `count` is a multiple of `granule`."""
        if not self.block:
            return numbers.to(_FLOATS[self.name]).view(torch.uint8)
        blocks = numbers.view(-1, self.block)
        ternary = self.bits == _TERNARY
        scales, integers = _ternary(blocks) if ternary else _uniform(blocks, round(2 ** (self.bits - 1)) - 1)
        return torch.cat([scales.view(torch.uint8), _packed(integers, self.bits)])

    def decode(self, data: Tensor, count: int) -> Tensor:
        """Decodes uint8 (nbytes(count),) to float32 numbers (count,)."""
        if not self.block:
            return data.view(_FLOATS[self.name]).float()
        split = count // self.block * _SCALE.itemsize
        # A copy, because the bytes may not be aligned for bfloat16.
        scales = data[:split].clone().view(_SCALE).float()
        integers = _unpacked(data[split:], self.bits).view(-1, self.block)
        return (integers * scales[:, None]).view(-1)


_TERNARY = 8 / 5
CODES = {
    code.name: code
    for code in (
        Code("fp32", 32),
        Code("bf16", 16),
        Code("int8", 8, block=128),
        Code("int4", 4, block=64),
        Code("int3", 3, block=64),
        Code("ternary", _TERNARY, block=80),
    )
}

_FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_POWERS = torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8)
_OCTAL_SHIFTS = torch.arange(0, 24, 3, dtype=torch.int32)
_BYTE_SHIFTS = torch.arange(0, 24, 8, dtype=torch.int32)


def _uniform(blocks: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Quantizes blocks. Returns scales (blocks,), and integers from -limit to limit in the shape of `blocks`."""
    # The scale is rounded to bfloat16, as the receiver reads it, and upwards, so that no number is clipped.
    scales = _rounded_up(blocks.abs().amax(dim=1) / limit)
    safe = torch.where(scales > 0, scales, 1).float()
    return scales, (blocks / safe[:, None]).round_().clamp_(-limit, limit).to(torch.int8)


def _ternary(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Returns scales (blocks,) and signs in the shape of `blocks`: 0 for magnitudes up to 0.7 times their mean.

    The threshold 0.7 nearly minimizes the error for normal and for uniform numbers (Li et al., section 2.2). The scale
    minimizes the error.
    """
    largest = blocks.abs().amax(dim=1, keepdim=True)
    # Divided by the largest, because the sum of large numbers may be infinite.
    shares = blocks.abs() / torch.where(largest > 0, largest, 1)
    kept = shares > 0.7 * shares.mean(dim=1, keepdim=True)
    mean = torch.where(kept, shares, 0).sum(dim=1) / kept.sum(dim=1).clamp(min=1)
    return (largest[:, 0] * mean).to(_SCALE), blocks.sign().mul_(kept).to(torch.int8)


def _rounded_up(scales: Tensor) -> Tensor:
    rounded = scales.to(_SCALE)
    up = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
    return torch.where(rounded.float() < scales, up, rounded)


def _packed(integers: Tensor, bits: float) -> Tensor:
    flat = integers.view(-1)
    if bits == 8:
        return flat.view(torch.uint8)
    if bits == _TERNARY:
        return ((flat + 1).view(torch.uint8).view(-1, 5) * _POWERS.to(flat.device)).sum(dim=1, dtype=torch.uint8)
    if bits == 3:
        octal = ((flat + 4).int().view(-1, 8) << _OCTAL_SHIFTS.to(flat.device)).sum(dim=1, dtype=torch.int32)
        return (octal[:, None] >> _BYTE_SHIFTS.to(flat.device)).to(torch.uint8).view(-1)
    nibbles = (flat + 8).view(torch.uint8)
    return nibbles[0::2] | (nibbles[1::2] << 4)


def _unpacked(data: Tensor, bits: float) -> Tensor:
    if bits == 8:
        return data.view(torch.int8).float()
    if bits == _TERNARY:
        return (data[:, None] // _POWERS.to(data.device) % 3).view(-1).float() - 1
    if bits == 3:
        octal = (data.view(-1, 3).int() << _BYTE_SHIFTS.to(data.device)).sum(dim=1, dtype=torch.int32)
        return (octal[:, None] >> _OCTAL_SHIFTS.to(data.device) & 7).view(-1).float() - 4
    nibbles = torch.stack([data & 0xF, data >> 4], dim=1).view(-1)
    return nibbles.float() - 8
