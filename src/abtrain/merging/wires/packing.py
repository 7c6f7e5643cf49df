"""Packs small integers in few bits, and unpacks them.

Integers of four and three bits are joined and split by shifting words of 64 bits: a word holds eight integers, one in
each byte. Ternary digits are joined by a product with powers of three, and split by a table.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from abtrain.merging.wires.scratch import Scratch

TERNARY = 8 / 5
"""Bits per ternary number: one byte holds five digits, the first of which has the smallest power."""

_DIGITS, _ROW = 5, 80
_ZEROS = 121
"""The byte of five zeros. Digits are sent as 0, 1 and 2."""
# By shift, the bits that hold integers after it. Pairs of integers are joined first, then pairs of pairs, and so on.
_JOINED = {5: 0x003F003F003F003F, 10: 0x00000FFF00000FFF, 20: 0x0000000000FFFFFF}
_SPLIT = {20: 0x00000FFF00000FFF, 10: 0x003F003F003F003F, 5: 0x0707070707070707}


def pack(integers: Tensor, bits: float, out: Tensor, scratch: Scratch) -> None:
    """Packs integers (count,) around 0, held as floats, into bytes `out` (count * bits / 8,). Uses slots 1 and 2."""
    if bits == TERNARY:
        _pack_digits(integers, out, scratch)
    elif bits == 8:
        out.view(torch.int8).copy_(integers)
    else:
        small = scratch(1, integers.shape, torch.int8).copy_(integers)
        small += 2 ** round(bits - 1)
        (_pack_nibbles if bits == 4 else _pack_octal)(len(small), out, scratch)


def unpack(data: Tensor, bits: float, out: Tensor, scratch: Scratch) -> None:
    """Unpacks bytes (count * bits / 8,) into float32 integers `out` (count,). Uses slots 1 and 2."""
    if bits == TERNARY:
        index = scratch(1, data.shape, torch.int32).copy_(data)
        torch.index_select(_digits_of_bytes(data.device), 0, index, out=out.view(-1, _DIGITS))
    elif bits == 8:
        out.copy_(data.view(torch.int8))
    else:
        (_unpack_nibbles if bits == 4 else _unpack_octal)(data, len(out), scratch)
        small = scratch(1, out.shape, torch.int8)
        small -= 2 ** round(bits - 1)
        out.copy_(small)


def _pack_nibbles(count: int, out: Tensor, scratch: Scratch) -> None:
    """Packs integers from 0 to 15, which are the bytes in slot 1. The first is in the lower half of a byte."""
    words = scratch(1, (count // 8,), torch.int64)
    words |= _shifted(words, -4, scratch)
    # The lower byte of each pair holds both integers.
    out.copy_(scratch(1, (count // 2,), torch.int16))


def _unpack_nibbles(data: Tensor, count: int, scratch: Scratch) -> None:
    scratch(1, (count // 2,), torch.int16).copy_(data)
    words = scratch(1, (count // 8,), torch.int64)
    words |= _shifted(words, 4, scratch)
    words &= 0x0F0F0F0F0F0F0F0F


def _pack_octal(count: int, out: Tensor, scratch: Scratch) -> None:
    """Packs integers from 0 to 7, which are the bytes in slot 1. The first is in the lowest of 24 bits."""
    words = scratch(1, (count // 8,), torch.int64)
    for shift, mask in _JOINED.items():
        words |= _shifted(words, -shift, scratch)
        words &= mask
    out.view(-1, 3).copy_(scratch(1, (count // 8, 8), torch.uint8)[:, :3])


def _unpack_octal(data: Tensor, count: int, scratch: Scratch) -> None:
    scratch(1, (count // 8, 8), torch.uint8)[:, :3] = data.view(-1, 3)
    words = scratch(1, (count // 8,), torch.int64)
    words &= 0xFFFFFF
    for shift, mask in _SPLIT.items():
        words |= _shifted(words, shift, scratch)
        words &= mask


def _shifted(words: Tensor, left: int, scratch: Scratch) -> Tensor:
    shift = torch.bitwise_left_shift if left > 0 else torch.bitwise_right_shift
    return shift(words, abs(left), out=scratch(2, words.shape, torch.int64))


def _pack_digits(digits: Tensor, out: Tensor, scratch: Scratch) -> None:
    # All products and sums are integers up to 121, which floats of any type hold exactly.
    sums = scratch(1, (len(out) * _DIGITS // _ROW, _ROW // _DIGITS), digits.dtype)
    torch.mm(digits.view(-1, _ROW), _powers_of_digits(digits.dtype, digits.device), out=sums)
    scratch(2, sums.shape, torch.int8).copy_(sums)
    torch.add(scratch(2, out.shape, torch.uint8), _ZEROS, out=out)


@functools.cache
def _powers_of_digits(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns a matrix (80, 16) whose product with a row of digits is the row of their bytes, less `_ZEROS`."""
    powers = torch.tensor([[3.0**i] for i in range(_DIGITS)], dtype=dtype, device=device)
    return torch.kron(torch.eye(_ROW // _DIGITS, dtype=dtype, device=device), powers)


@functools.cache
def _digits_of_bytes(device: torch.device) -> Tensor:
    """Returns the float32 digits (256, 5) of all bytes."""
    rows = [[byte // 3**i % 3 - 1.0 for i in range(_DIGITS)] for byte in range(256)]
    return torch.tensor(rows, dtype=torch.float32, device=device)
