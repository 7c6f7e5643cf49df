"""Allocates large tensors in large pages, since mapping ordinary pages takes longer than computing what is in them."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

_LARGE = 4 * 2**20
"""The least number of bytes of a tensor that gets pages of its own."""


def allocated(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns a new tensor (count,) without values. On Linux, a CPU maps the memory of a large one in large pages.

    A C library returns large blocks to the system when they are freed. So without this, every large result would map
    its memory anew, in pages of 4 kB.
    """
    nbytes = count * dtype.itemsize
    if device.type != "cpu" or nbytes < _LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(count, dtype=dtype, device=device)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    # A tensor that was created in inference mode could not be changed outside it.
    with torch.inference_mode(False):
        return torch.frombuffer(memory, dtype=dtype)
