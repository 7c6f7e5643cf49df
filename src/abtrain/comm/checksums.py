"""Computes hashes and strings, which workers compare in place of whole tensors and settings.

A checksum is XXH3 over a tensor's bytes, at several GB/s. It detects drift and damage, but does not protect against
forgery. Hashes are compared across processes, so they do not depend on the device, the memory layout, or the process.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor

BITS = 62
"""The bits of a hash v. Workers compare hashes by the maxima of v and of -v, so both must fit into an int64."""
LIMIT: int = 2**BITS

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # in the repr of objects whose class defines no repr
_CHUNK_BYTES = 64 * 2**20


def checksum(tensor: Tensor) -> int:
    """Returns 62 bits of the XXH3 hash of a tensor's elements, in row-major order.

    The tensor may have any dtype, layout and device. Shape and dtype are not part of the hash (see `digest`).
    """
    held = tensor.detach().resolve_conj().resolve_neg().contiguous()
    hashed = xxhash.xxh3_64()
    for chunk in _chunks(as_bytes(held)):
        hashed.update(bytes_of(chunk))
    return int(hashed.intdigest()) >> (64 - BITS)


def digest(tensor: Tensor) -> int:
    """Returns a hash of 62 bits of a tensor's dtype, shape and elements."""
    return fingerprint(tensor.dtype, tuple(tensor.shape), checksum(tensor))


def fingerprint(*parts: object) -> int:
    """Returns 62 bits of the SHA-256 of the `repr` of `parts`, which must be the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> (64 - BITS)


def stable_repr(value: object) -> str:
    """Returns the value's `repr` without addresses, so that it is the same in every process."""
    return _ADDRESS.sub("", repr(value))


def layouts_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns the shape and dtype of each tensor as a string, by the tensor's name."""
    return {name: f"{tuple(tensor.shape)} of {tensor.dtype}" for name, tensor in tensors.items()}


def as_bytes(tensor: Tensor) -> Tensor:
    """Returns a 1-D view of a contiguous tensor's bytes: Gloo cannot send every dtype, but it can send bytes."""
    # A single element is contiguous whatever its stride, but only stride 1 can be viewed as bytes.
    return tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def bytes_of(held: Tensor) -> Any:
    """Returns a contiguous CPU tensor's memory as a buffer, without a copy, also for dtypes that numpy lacks."""
    return (ctypes.c_char * held.nbytes).from_address(held.data_ptr()) if held.nbytes else b""


def _chunks(flat: Tensor) -> Iterator[Tensor]:
    """Yields a flat byte tensor on the CPU, in pieces if it is on an accelerator. A piece overwrites the last one."""
    if flat.device.type == "cpu":
        yield flat
        return
    staging = torch.empty(min(_CHUNK_BYTES, flat.numel()), dtype=torch.uint8, pin_memory=flat.is_cuda)
    for piece in flat.split(_CHUNK_BYTES):
        yield staging[: piece.numel()].copy_(piece)
