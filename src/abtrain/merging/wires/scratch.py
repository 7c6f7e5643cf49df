"""Provides buffers for intermediate results, which are computed part by part so that each stays in a CPU's cache.

Buffers in a CPU's memory are kept for each thread: their pages are mapped only once, and merges on several threads do
not disturb each other. On another device, its allocator hands the buffers out, since it knows which streams use them.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

_GRANULE = 640
"""The smallest common multiple of the blocks of all codes."""
_CACHED = 210 * _GRANULE
"""The numbers in one part, for each thread of a CPU: 538 kB as float32. Second-level caches of 2 MB hold all slots."""
_LAUNCHED = 6400 * _GRANULE
"""The numbers in one part on another device: 16 MB as float32, which take longer than launching kernels."""


class _Kept(threading.local):
    """Buffers of the current thread, by slot."""

    def __init__(self) -> None:
        self.memory: dict[int, Tensor] = {}


_kept = _Kept()


class Scratch:
    """Buffers for computing with parts of `numbers` on their device or another one, one in each of a few slots.

    Attributes:
        size: the largest number of elements of a part and of a buffer; a multiple of the blocks of all codes.
    """

    def __init__(self, numbers: Tensor, device: torch.device | None = None) -> None:
        self._device = device or numbers.device
        # PyTorch divides every operation among its threads in the same way, so that each keeps its share in its cache.
        on_cpu = self._device.type == "cpu"
        self.size = _CACHED * torch.get_num_threads() if on_cpu else _LAUNCHED
        longest = self.size if on_cpu else min(self.size, numbers.numel())
        self._nbytes = longest * max(numbers.dtype.itemsize, torch.float32.itemsize)
        self._memory: dict[int, Tensor] = _kept.memory if on_cpu else {}
        self._views: dict[tuple[int, tuple[int, ...], torch.dtype], Tensor] = {}

    def __call__(self, slot: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Returns the memory of a slot as a tensor. Tensors in the same slot overwrite each other."""
        # Creating views takes as long as an operation on thousands of numbers, and most parts need the same views.
        key = (slot, shape, dtype)
        if key not in self._views:
            nbytes = math.prod(shape) * dtype.itemsize
            self._views[key] = self._bytes(slot)[:nbytes].view(dtype).view(shape)
        return self._views[key]

    def _bytes(self, slot: int) -> Tensor:
        if slot not in self._memory or self._memory[slot].numel() < self._nbytes:
            # A tensor that was created in inference mode could not be changed outside it.
            with torch.inference_mode(False):
                self._memory[slot] = torch.empty(self._nbytes, dtype=torch.uint8, device=self._device)
        return self._memory[slot]
