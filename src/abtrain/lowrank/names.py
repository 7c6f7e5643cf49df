"""Names and entries of a model's state, as the user's model has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def tensors_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The entries of a state dict that are tensors; the extra state of modules may be anything."""
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def without_compiled(name: str) -> str:
    """The name without the segments `_orig_mod` that torch.compile adds, anywhere in it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")
