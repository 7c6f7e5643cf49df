"""Numbers in few bits: a 1-D float32 tensor <-> a 1-D tensor of bytes. Pure: no communication.

Integers are block-scaled: every block of numbers has a scale of its own, its largest magnitude over the largest
integer, sent as bfloat16. A number is off by at most half a scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_SCALE = torch.bfloat16


@dataclass(frozen=True)
class Code:
    """A way to write numbers in bytes.

    Attributes:
        name: what it is called.
        bits: of one number.
        block: how many numbers share a scale; 0: no scales.
    """

    name: str
    bits: int
    block: int = 0

    @property
    def exact(self) -> bool:
        """Whether float32 comes back as it went in."""
        return self.bits == 32

    @property
    def granule(self) -> int:
        """Only a multiple of so many numbers can be written."""
        return self.block or 1

    def nbytes(self, count: int) -> int:
        """Bytes that `count` numbers take, scales included."""
        return count * self.bits // 8 + (count // self.block * _SCALE.itemsize if self.block else 0)

    def encode(self, numbers: Tensor) -> Tensor:
        """(count,) finite float32 -> (nbytes(count),) uint8; count a multiple of `granule`."""
        if not self.block:
            return numbers.to(_FLOATS[self.bits]).view(torch.uint8)
        blocks = numbers.view(-1, self.block)
        limit = 2 ** (self.bits - 1) - 1
        # The scale as the receiver will read it decides; rounded up, so that no number is cut off.
        scales = _rounded_up(blocks.abs().amax(dim=1) / limit)
        safe = torch.where(scales > 0, scales, 1).float()
        integers = (blocks / safe[:, None]).round_().clamp_(-limit, limit).to(torch.int8)
        return torch.cat([scales.view(torch.uint8), _packed(integers, self.bits)])

    def decode(self, data: Tensor, count: int) -> Tensor:
        """(nbytes(count),) uint8 -> (count,) float32."""
        if not self.block:
            return data.view(_FLOATS[self.bits]).float()
        split = count // self.block * _SCALE.itemsize
        # A copy, since the integers start where a bfloat16 need not.
        scales = data[:split].clone().view(_SCALE).float()
        integers = _unpacked(data[split:], self.bits).view(-1, self.block)
        return (integers * scales[:, None]).view(-1)


CODES = {
    code.name: code
    for code in (Code("fp32", 32), Code("bf16", 16), Code("int8", 8, block=128), Code("int4", 4, block=64))
}

_FLOATS = {32: torch.float32, 16: torch.bfloat16}


def _rounded_up(scales: Tensor) -> Tensor:
    rounded = scales.to(_SCALE)
    up = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
    return torch.where(rounded.float() < scales, up, rounded)


def _packed(integers: Tensor, bits: int) -> Tensor:
    flat = integers.view(-1)
    if bits == 8:
        return flat.view(torch.uint8)
    nibbles = (flat + 8).view(torch.uint8)
    return nibbles[0::2] | (nibbles[1::2] << 4)


def _unpacked(data: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return data.view(torch.int8).float()
    nibbles = torch.stack([data & 0xF, data >> 4], dim=1).view(-1)
    return nibbles.float() - 8
