"""The largest of many numbers, by place and sign: a 1-D float32 tensor <-> a 1-D tensor of bytes. Pure.

Of every 128 numbers the k largest in magnitude are sent, a byte each: seven bits say which it is, one its sign. Four
such blocks share a scale, the mean magnitude of what they send, as bfloat16. All else is left to error feedback, which
sends a number once enough of it has come together (top-k sparsification with memory: Stich et al., arXiv 1809.07599).
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128
"""Numbers of which the k largest are sent."""
GRANULE = 4 * BLOCK
"""Numbers that share a scale: only a multiple of so many can be written."""
_SCALE = torch.bfloat16
_NEGATIVE = BLOCK
"""What is added to the place of a negative number."""


def top_nbytes(count: int, k: int) -> int:
    """Bytes that the `k` largest of every block of `count` numbers take, scales included."""
    return count // BLOCK * k + count // GRANULE * _SCALE.itemsize


def encode_top(numbers: Tensor, k: int) -> Tensor:
    """(count,) finite float32 -> (top_nbytes(count, k),) uint8; count a multiple of `GRANULE`, k at least 2."""
    blocks = numbers.view(numbers.numel() // BLOCK, BLOCK)
    magnitudes, places = blocks.abs().topk(k, dim=1)
    sent = (places + _NEGATIVE * (blocks.gather(1, places) < 0)).to(torch.uint8)
    # A zero is not sent: in its place is the largest again or, where all are zeros, one place with both signs.
    both = (_NEGATIVE * (torch.arange(k, device=sent.device) % 2)).to(torch.uint8)
    sent = torch.where(magnitudes > 0, sent, torch.where(magnitudes[:, :1] > 0, sent[:, :1], both))
    scales = _scales(magnitudes.view(numbers.numel() // GRANULE, GRANULE // BLOCK * k))
    return torch.cat([scales.view(torch.uint8), sent.view(-1)])


def decode_top(data: Tensor, count: int, k: int) -> Tensor:
    """(top_nbytes(count, k),) uint8 -> (count,) float32."""
    split = count // GRANULE * _SCALE.itemsize
    # A copy, since a tensor of bytes need not start where a bfloat16 may.
    scales = data[:split].clone().view(_SCALE).float()
    sent = data[split:].view(count // BLOCK, k).long()
    named = torch.zeros(count // BLOCK, 2 * BLOCK, device=data.device).scatter_(1, sent, 1.0)
    signs = named[:, :_NEGATIVE] - named[:, _NEGATIVE:]
    return (signs.view(count // GRANULE, GRANULE) * scales[:, None]).view(-1)


def _scales(magnitudes: Tensor) -> Tensor:
    """The mean of each row of what is not 0, as it is sent."""
    largest = magnitudes.amax(dim=1)
    # Shares of the largest, since a sum of large numbers may be infinite.
    shares = magnitudes / torch.where(largest > 0, largest, 1)[:, None]
    return (largest * (shares.sum(dim=1) / (shares > 0).sum(dim=1).clamp(min=1))).to(_SCALE)
