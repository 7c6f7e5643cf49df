"""Allocates large tensors in large pages, since mapping ordinary pages takes longer than computing what is in them."""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from torch import Tensor

_LARGE = 4 * 2**20
"""The least number of bytes of a tensor whose pages are worth a call to the system."""


def allocated(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns a new tensor (count,) without values. On Linux, a CPU maps the memory of a large one in large pages.

    A C library returns large blocks to the system when they are freed. So without this, every large result would map
    its memory anew, in pages of 4 kB.
    """
    tensor = torch.empty(count, dtype=dtype, device=device)
    if sys.platform == "linux" and device.type == "cpu" and tensor.nbytes >= _LARGE:
        # PyTorch owns the memory. Threads of a process group could not free that of a Python object at exit.
        first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = tensor.data_ptr() + tensor.nbytes - first
        # A system without large pages refuses, which changes nothing.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    return tensor


class Recycler:
    """Creates tensors, and uses their memory again, whose pages are mapped then."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def take(self, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns a tensor (count,) without values."""
        for index, tensor in enumerate(self._free):
            if tensor.numel() >= count and (tensor.dtype, tensor.device) == (dtype, device):
                return self._free.pop(index)[:count]
        return allocated(count, dtype, device)

    def give(self, tensor: Tensor) -> None:
        """Takes back a tensor that `take` has returned. Nobody may use it any more."""
        self._free.append(tensor)
