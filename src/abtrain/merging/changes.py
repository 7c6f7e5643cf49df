"""Computes how tensors have changed since the last merge, and writes the results of the next merge."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from abtrain.comm.checksums import as_bytes
from abtrain.memory import allocated

_SUBTRACTED = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16}
    | {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}
)
"""Dtypes with changes that can be added. If a worker changes another tensor during a merge, that value stays."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which a parameter's value after a merge is stored: float32 for 16-bit and 8-bit floats."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < torch.float32.itemsize else dtype


def change(anchor: Tensor, tensor: Tensor, out: Tensor | None = None) -> Tensor:
    """Returns the change of a tensor since its anchor (its value after the last merge), in the anchor's dtype.

    The result is `out`, if it is given.
    """
    new, old = tensor.to(anchor.dtype), anchor.to(tensor.dtype).to(anchor.dtype)
    if out is None:
        out = allocated(new.numel(), new.dtype, new.device).view(new.shape)
    return torch.sub(new, old, out=out)


def is_finite(tensor: Tensor) -> bool:
    """Returns whether all elements of a tensor are finite."""
    # PyTorch has no isfinite for floats of eight bits.
    wider = tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
    return bool(torch.isfinite(wider).all())


def write(held: Mapping[str, Tensor], outcome: Mapping[str, Tensor], base: Mapping[str, Tensor] | None) -> None:
    """Writes the results of a merge into the tensors in `held`, and adds their changes since `base`, if not None."""
    for name, value in outcome.items():
        # A buffer may have changed its shape during the merge.
        if held[name].shape == value.shape:
            held[name].copy_(value if base is None else _moved(value, held[name], base[name]))


def _moved(outcome: Tensor, tensor: Tensor, base: Tensor) -> Tensor:
    if outcome.dtype not in _SUBTRACTED:
        same = as_bytes(tensor.contiguous()).equal(as_bytes(base.contiguous()))
        return outcome if same else tensor
    return outcome + (tensor.to(outcome.dtype) - base)


def as_real(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors by name, with real views of complex ones, whose additional last dimension has size 2."""
    return {name: torch.view_as_real(t) if t.is_complex() else t for name, t in tensors.items()}


def as_parameter(anchor: Tensor, parameter: Tensor) -> Tensor:
    """Converts an anchor back to the dtype of its parameter; reverses `as_real` and `wide`."""
    held = torch.view_as_complex(anchor) if parameter.is_complex() else anchor
    return held.to(parameter.dtype)
