"""Encodes a 1-D float32 tensor in few bits, as a 1-D tensor of bytes, and decodes it.

Integers are scaled by block: each block of numbers has a scale, sent as bfloat16. For int8, int4 and int3 it is the
block's largest magnitude over the largest integer, so the error of a number is at most half a scale. For ternary
numbers (-1, 0, 1) it is the mean magnitude of those that do not become 0 (Li et al., arXiv 1605.04711). The error of a
block has a smaller norm than the block, as error feedback requires (Karimireddy et al., arXiv 1901.09847).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from abtrain.memory import allocated
from abtrain.merging.wires.packing import TERNARY, pack, unpack
from abtrain.merging.wires.scratch import Scratch

_SCALE = torch.bfloat16


class CodedPart(NamedTuple):
    """A part of encoded numbers.

    Attributes:
        place: the range of the part's numbers among all numbers.
        scales: the bytes of its scales, (blocks, bytes per scale).
        packed: the bytes of its integers.
    """

    place: slice
    scales: Tensor
    packed: Tensor


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
        return round(count * self.bits / 8) + self._scale_bytes(count)

    def encode(self, numbers: Tensor) -> Tensor:
        """Encodes finite float32 numbers (count,) as uint8 (nbytes(count),). `count` is a multiple of `granule`."""
        if not self.block:
            return numbers.to(_FLOATS[self.name]).view(torch.uint8)
        data = allocated(self.nbytes(numbers.numel()), torch.uint8, numbers.device)
        scratch, flat = Scratch(numbers), numbers.detach()
        for part in self.parts(data, numbers.numel(), scratch):
            blocks = flat[part.place].view(-1, self.granule)
            self._encode_part(blocks, part.scales, part.packed, scratch)
        return data

    def encode_and_subtract(self, numbers: Tensor, out: Tensor) -> None:
        """Encodes float32 numbers (count,) into uint8 `out` (nbytes(count),), and leaves their rounding errors.

        The rounding error of a number is the number minus what `decode` returns for it.
        """
        scratch = Scratch(numbers)
        for part in self.parts(out, numbers.numel(), scratch):
            self.encode_part(part, numbers[part.place], numbers[part.place], scratch)

    def decode(self, data: Tensor, count: int, out: Tensor | None = None) -> Tensor:
        """Decodes uint8 (nbytes(count),) to float32 numbers (count,), in `out` if it is given."""
        if out is None and not self.block:
            return data.view(_FLOATS[self.name]).float()
        if out is None:
            out = allocated(count, torch.float32, data.device)
        scratch = Scratch(out)
        for part in self.parts(data, count, scratch):
            self.decode_part(part, out[part.place], scratch)
        return out

    def add_decoded(self, data: Tensor, total: Tensor) -> None:
        """Decodes uint8 (nbytes(count),), and adds the numbers to float32 `total` (count,)."""
        scratch = Scratch(total)
        for part in self.parts(data, total.numel(), scratch):
            self.add_part(part, total[part.place], scratch)

    def parts(self, data: Tensor, count: int, scratch: Scratch) -> Iterator[CodedPart]:
        """Yields the parts of uint8 `data` (nbytes(count),), which encodes `count` numbers; each fits `scratch`."""
        scales, packed = self._split(data, count)
        blocks, nbytes = scratch.size // self.granule, round(scratch.size * self.bits / 8)
        for index, start in enumerate(range(0, count, scratch.size)):
            yield CodedPart(
                slice(start, min(start + scratch.size, count)),
                scales[index * blocks : (index + 1) * blocks],
                packed[index * nbytes : (index + 1) * nbytes],
            )

    def encode_part(self, part: CodedPart, numbers: Tensor, error: Tensor, scratch: Scratch) -> None:
        """Encodes the float32 numbers of a part, and writes their rounding errors into `error`, which may be `numbers`.

        Uses the slots 0, 1 and 2 of `scratch`.
        """
        blocks, error = numbers.view(-1, self.granule), error.view(-1, self.granule)
        if not self.block:
            self._encode_part(blocks, part.scales, part.packed, scratch)
            torch.sub(numbers, part.packed.view(_FLOATS[self.name]), out=error.view(-1))
            return
        scales, integers = self._encode_part(blocks, part.scales, part.packed, scratch)
        # The product is exact, because integers and scales together have fewer bits than float32 has.
        torch.addcmul(blocks, integers, scales.float(), value=-1, out=error)

    def decode_part(self, part: CodedPart, out: Tensor, scratch: Scratch) -> None:
        """Decodes a part to float32 `out`. Uses the slots 1 and 2 of `scratch`."""
        self._decode_part(_read(part.scales), part.packed, out.view(-1, self.granule), scratch)

    def add_part(self, part: CodedPart, total: Tensor, scratch: Scratch) -> None:
        """Decodes a part, and adds its numbers to float32 `total`. Uses the slots 0, 1 and 2 of `scratch`."""
        decoded = scratch(0, total.shape, torch.float32)
        self.decode_part(part, decoded, scratch)
        total += decoded

    def _split(self, data: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Returns views of the bytes of scales (blocks, bytes per scale), and of the bytes of integers."""
        nbytes = self._scale_bytes(count)
        scales, packed = data.split([nbytes, self.nbytes(count) - nbytes])
        return scales.view(count // self.granule, self._scale_bytes(self.granule)), packed

    def _scale_bytes(self, count: int) -> int:
        return count // self.block * _SCALE.itemsize if self.block else 0

    def _encode_part(self, blocks: Tensor, scales: Tensor, packed: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
        """Encodes blocks. Returns their scales (blocks, 1) and integers, as floats in slot 0."""
        if not self.block:
            packed.view(_FLOATS[self.name]).copy_(blocks.view(-1))
            return scales, blocks
        limit = round(2 ** (self.bits - 1)) - 1
        ternary = self.bits == TERNARY
        values, integers = _ternary(blocks, scratch) if ternary else _uniform(blocks, limit, scratch)
        scales.copy_(values.view(torch.uint8))
        pack(integers.view(-1), self.bits, packed, scratch)
        return values, integers

    def _decode_part(self, scales: Tensor, packed: Tensor, blocks: Tensor, scratch: Scratch) -> None:
        if not self.block:
            blocks.view(-1).copy_(packed.view(_FLOATS[self.name]))
            return
        unpack(packed, self.bits, blocks.view(-1), scratch)
        blocks *= scales


CODES = {
    code.name: code
    for code in (
        Code("fp32", 32),
        Code("bf16", 16),
        Code("int8", 8, block=128),
        Code("int4", 4, block=64),
        Code("int3", 3, block=64),
        Code("ternary", TERNARY, block=80),
    )
}

_FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _uniform(blocks: Tensor, limit: int, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """Quantizes blocks. Returns scales (blocks, 1), and integers from -limit to limit, as floats, like `blocks`."""
    magnitudes = torch.abs(blocks, out=scratch(0, blocks.shape, blocks.dtype))
    # The scale is rounded to bfloat16, as the receiver reads it, and upwards, so that no number is clipped.
    scales = _rounded_up(_largest(magnitudes).div_(limit))
    safe = _nonzero(scales.float())
    wide = torch.promote_types(blocks.dtype, safe.dtype)
    integers = torch.div(blocks, safe, out=scratch(0, blocks.shape, wide)).round_()
    # In half precision, the largest magnitude over the limit is rounded, so the scale may be too small.
    return scales, integers if blocks.dtype.itemsize >= safe.dtype.itemsize else integers.clamp_(-limit, limit)


def _ternary(blocks: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """Returns scales (blocks, 1) and signs, as floats, like `blocks`: 0 for magnitudes up to 0.7 times their mean.

    The threshold 0.7 nearly minimizes the error for normal and for uniform numbers (Li et al., section 2.2). The scale
    minimizes the error.
    """
    shares = torch.abs(blocks, out=scratch(0, blocks.shape, blocks.dtype))
    largest = _largest(shares)
    # Divided by the largest, because the sum of large numbers may be infinite.
    shares /= _nonzero(largest.clone())
    # Ones and zeros of the same type, because other types are multiplied and summed several times as slowly.
    kept = scratch(1, blocks.shape, blocks.dtype)
    torch.gt(shares, 0.7 * shares.mean(dim=1, keepdim=True), out=kept)
    mean = shares.mul_(kept).sum(dim=1, keepdim=True) / kept.sum(dim=1, keepdim=True).clamp_(min=1)
    return (largest * mean).to(_SCALE), torch.sign(blocks, out=shares).mul_(kept)


def _largest(magnitudes: Tensor) -> Tensor:
    """Returns the largest magnitude (blocks, 1) of each block."""
    # Floats from 0 on have the order of their bits, and PyTorch finds the largest integer up to three times as fast.
    bits = magnitudes.view(_INTEGERS[magnitudes.dtype.itemsize])
    return bits.amax(dim=1, keepdim=True).view(magnitudes.dtype)


def _read(scales: Tensor) -> Tensor:
    """Returns float32 scales (blocks, 1) from their bytes."""
    # A copy, because the bytes may not be aligned for bfloat16.
    values = scales.flatten().clone().view(_SCALE).float()
    return values.view(len(scales), scales.shape[1] // _SCALE.itemsize)


def _rounded_up(scales: Tensor) -> Tensor:
    """Rounds scales from 0 on to bfloat16, upwards."""
    rounded = scales.to(_SCALE)
    # The bits of the next number from 0 on are those of a number plus 1. `nextafter` takes four times as long.
    rounded.view(torch.int16).add_(rounded.to(scales.dtype) < scales)
    return rounded


def _nonzero(scales: Tensor) -> Tensor:
    """Replaces zeros by ones, in place."""
    return scales.masked_fill_(scales == 0, 1)
