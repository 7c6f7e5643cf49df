"""Names of weights and their factors, and of the entries of a model's state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def factor_names(weight: str) -> tuple[str, str]:
    """Returns the names of the factors A and B of a weight."""
    return f"{weight}.A", f"{weight}.B"


def factor_letter(name: str) -> str:
    """Returns `A` or `B` for the name of a factor, and an empty string for any other name."""
    return name[-1] if name.endswith((".A", ".B")) else ""


def weight_name(name: str) -> str:
    """Returns the name of the weight that a factor belongs to, and any other name unchanged."""
    return name[:-2] if factor_letter(name) else name


def tensors_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the entries of a state dict that are tensors; the extra state of modules may be anything."""
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def without_compiled(name: str) -> str:
    """Returns a name without the segments `_orig_mod` that torch.compile adds anywhere in it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")
