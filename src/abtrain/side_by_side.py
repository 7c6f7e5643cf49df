"""Moves many small parameters into one piece of memory, so that merges read and write them without a copy of each.

Each parameter becomes a view of a flat tensor, as in other libraries that flatten models. Its values, gradients and
identity stay. It happens only where a batch has a thousand parameters: elsewhere, copies take little time.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

_MANY = 1000
"""The least number of parameters of a batch that are moved."""
_ALIGNMENT = 16
"""Addresses on an accelerator stay multiples of so many bytes: compiled kernels load parameters as they lay before."""
_MARK = "_abtrain_storage"
"""The attribute of a parameter with the address of the storage into which it was moved."""


def lay_side_by_side(parameters: Sequence[nn.Parameter]) -> None:
    """Moves the parameters of a batch side by side, in their order, unless they are few.

    Nothing is moved if a parameter may share memory with another tensor, which would not follow it.
    """
    if len(parameters) < _MANY or in_one_piece(parameters) is not None:
        return
    if not _apart(parameters) or not all(map(_keeps_alignment, parameters)):
        return
    with torch.no_grad():
        flat = torch.cat([parameter.reshape(-1) for parameter in parameters])
        pieces = flat.split([parameter.numel() for parameter in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.data = piece.view(parameter.shape)
            setattr(parameter, _MARK, flat.data_ptr())


def storage_of(tensor: Tensor) -> int:
    """Returns a number that identifies the storage of a tensor; of its own, if it was moved into one piece."""
    storage = tensor.untyped_storage().data_ptr()
    return tensor.data_ptr() if getattr(tensor, _MARK, None) == storage else storage


def in_one_piece(tensors: Sequence[Tensor]) -> Tensor | None:
    """Returns a flat view of contiguous tensors that lie side by side in one storage; None if they do not."""
    first = tensors[0].detach()
    ends = accumulate((tensor.nbytes for tensor in tensors), initial=first.data_ptr())
    if not all(tensor.is_contiguous() and tensor.data_ptr() == end for tensor, end in zip(tensors, ends, strict=False)):
        return None
    count = sum(tensor.numel() for tensor in tensors)
    # Storages of their own may be neighbours by chance.
    if first.untyped_storage().nbytes() < (first.storage_offset() + count) * first.itemsize:
        return None
    return first.as_strided((count,), (1,))


def _keeps_alignment(parameter: nn.Parameter) -> bool:
    """Returns whether what lies behind a parameter is aligned as far as its device needs."""
    return parameter.device.type == "cpu" or parameter.nbytes % _ALIGNMENT == 0


def _apart(parameters: Sequence[nn.Parameter]) -> bool:
    """Returns whether parameters are contiguous plain tensors of one dtype, each with a storage of its own.

    A storage in shared memory may belong to other processes, too.
    """
    storages = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    return len(storages) == len(parameters) and all(
        type(parameter.data) is Tensor
        and parameter.dtype == parameters[0].dtype
        and parameter.is_contiguous()
        and not (parameter.device.type == "cpu" and parameter.is_shared())
        and 0 < parameter.nbytes == parameter.untyped_storage().nbytes()
        for parameter in parameters
    )
