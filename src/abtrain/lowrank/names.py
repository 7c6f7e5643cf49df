"""Converts between the names of weights, of their factors, and of entries in state dicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor


def factor_names(weight: str) -> tuple[str, str]:
    """Returns the names of a weight's factors: `NAME.A` and `NAME.B` for weight NAME."""
    return f"{weight}.A", f"{weight}.B"


def factor_letter(name: str) -> str:
    """Returns the last letter, `A` or `B`, of a name like that of a factor, and an empty string for any other name."""
    return name[-1] if name.endswith((".A", ".B")) else ""


def weight_name(name: str) -> str:
    """Returns NAME for `NAME.A` and `NAME.B`, and any other name unchanged. A user's parameter may have such a name."""
    return name[:-2] if factor_letter(name) else name


def tensors_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the entries of a state dict that are tensors. The extra state of modules may have other types."""
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def matching(name: str, globs: Iterable[str]) -> str | None:
    """Returns the first glob that matches a name, with or without torch.compile's segments; None if none does."""
    known = (name, without_compiled(name))
    return next((glob for glob in globs if any(fnmatchcase(one, glob) for one in known)), None)


def without_compiled(name: str) -> str:
    """Returns a parameter's name without the segments `_orig_mod` that torch.compile adds to it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")
