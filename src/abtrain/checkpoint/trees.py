"""Converts trees of tensors and JSON values to a structure for a JSON file and tensors by key, and back.

A tree consists of dicts, lists, tensors, strings, numbers, booleans and None. Tuples become lists, and numpy scalars
become Python numbers. Dict keys are strings, numbers, booleans, None, or tuples of them. In the structure, each tensor
is replaced by a reference, {"$tensor": KEY, "file": NAME}. JSON is parsed strictly, since another process wrote it.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from abtrain.checks import said
from abtrain.errors import a_or_an

_DEEPEST = 200
_MOST_DIGITS = 4000
"""The maximum number of digits of a whole number. Python's own limit for parsing is slightly higher."""

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
"""The dtypes that can be saved, by their names in safetensors files."""


def split(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """Returns the structure of a tree, with references in place of tensors, and the tensors by key.

    Raises:
        TypeError: a value cannot be saved; the message names its place in the tree.
    """
    tensors: dict[str, Tensor] = {}
    return _cut(tree, "", 0, tensors), tensors


def _cut(value: Any, place: str, depth: int, tensors: dict[str, Tensor]) -> Any:
    if depth > _DEEPEST:
        raise TypeError(f"{place[:80]}... is nested more than {_DEEPEST} levels deep: save a flatter structure")
    if isinstance(value, Tensor):
        return _refer_to(value, place, tensors)
    inside = f"{place}/" if place else ""
    if isinstance(value, Mapping):
        plain = all(isinstance(key, str) and not key.startswith("$") and "/" not in key for key in value)
        if plain and not isinstance(value, Counter):
            return {key: _cut(item, f"{inside}{key}", depth + 1, tensors) for key, item in value.items()}
        items = enumerate(value.items())
        pairs = [[_key(key, place), _cut(item, f"{place}/{i}", depth + 1, tensors)] for i, (key, item) in items]
        return {"$items": pairs, "counter": isinstance(value, Counter)}
    if isinstance(value, list | tuple):
        return [_cut(item, f"{inside}{i}", depth + 1, tensors) for i, item in enumerate(value)]
    return _scalar(value, place)


def _refer_to(value: Tensor, place: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    # The memory of a conjugate or negative view has different values from the view itself.
    held = value.detach().resolve_conj().resolve_neg()
    if held.layout != torch.strided or held.device.type == "meta":
        kind = "meta" if held.device.type == "meta" else str(held.layout)
        raise TypeError(f"{place or 'the state'} is a {kind} tensor, which cannot be saved: make it dense, with values")
    real = torch.view_as_real(held) if held.is_complex() else held
    if real.dtype not in DTYPES:
        remedy = f"convert it to one of {', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)}"
        raise TypeError(f"{place or 'the state'} has dtype {real.dtype}, which cannot be saved: {remedy}")
    tensors[place] = real
    return {"$tensor": place, **({"complex": True} if held.is_complex() else {})}


def _key(key: object, place: str) -> Any:
    if isinstance(key, tuple):
        return [_key(part, place) for part in key]
    if key is None or isinstance(key, str | int | float | bool):
        return _scalar(key, place)
    raise TypeError(
        f"{place or 'the state'} has the key {key!r}, which cannot be saved: use strings, numbers, booleans, None, or "
        "tuples of them"
    )


def _scalar(value: Any, place: str) -> Any:
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return {"$number": repr(value)}  # JSON has no such numbers
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**_MOST_DIGITS:
        raise TypeError(f"{place or 'the state'} is a number with over {_MOST_DIGITS} digits: save it as a string")
    if value is None or isinstance(value, str | int | float | bool):
        return value
    kind = type(value).__name__
    remedy = "convert it with torch.from_numpy(...)" if kind == "ndarray" else "use tensors, numbers, strings and None"
    raise TypeError(f"{place or 'the state'} is {a_or_an(kind)}, which cannot be saved: {remedy}")


def refer(structure: Any, file_of: Mapping[str, str]) -> Any:
    """Returns the structure with a file name added to each reference. `file_of` maps the reference's key to it."""
    if isinstance(structure, list):
        return [refer(item, file_of) for item in structure]
    if not isinstance(structure, dict):
        return structure
    if "$tensor" in structure:
        return {**structure, "file": file_of[structure["$tensor"]]}
    return {key: refer(item, file_of) for key, item in structure.items()}


def join(structure: Any, tensor: Callable[[str, str], Tensor]) -> Any:
    """Returns the tree that a structure was made from. `tensor` returns the tensor with a given file and key.

    Raises:
        ValueError: `split` and `refer` cannot have made this structure.
    """
    if isinstance(structure, list):
        return [join(item, tensor) for item in structure]
    if not isinstance(structure, dict):
        return structure
    if not any(key.startswith("$") for key in structure):
        return {key: join(item, tensor) for key, item in structure.items()}
    match structure:
        case {"$tensor": str(key), "file": str(file), **rest} if rest in ({}, {"complex": True}):
            return torch.view_as_complex(tensor(file, key)) if rest else tensor(file, key)
        case {"$number": "nan" | "inf" | "-inf" as number, **rest} if not rest:
            return float(number)
        case {"$items": list(pairs), "counter": bool(counts), **rest} if not rest:
            items = {_joined_key(key, tensor): join(item, tensor) for key, item in pairs}
            if len(items) < len(pairs):
                raise ValueError("a dict contains the same key twice")
            return Counter(items) if counts else items
    raise ValueError(f"abtrain does not save objects with the keys {', '.join(map(said, list(structure)[:3]))}")


def _joined_key(key: Any, tensor: Callable[[str, str], Tensor]) -> Any:
    if isinstance(key, list):
        return tuple(_joined_key(part, tensor) for part in key)
    name = join(key, tensor)
    if isinstance(name, Tensor | dict):
        raise ValueError("a dict has a tensor or a dict as a key")
    return name


def parse_json(data: bytes) -> Any:
    """Parses a JSON text in UTF-8, and returns its value.

    Raises:
        ValueError: the text is not UTF-8 or not JSON; or it contains NaN, Infinity, a number that is too
            large, an object with a repeated key, or too many nested levels.
    """
    try:
        return json.loads(
            data.decode(),
            parse_constant=_finite,
            parse_float=_finite,
            parse_int=_whole,
            object_pairs_hook=_without_repetition,
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:20]} is not finite")
    return number


def _whole(text: str) -> int:
    if len(text) > _MOST_DIGITS + 1:
        raise ValueError(f"a number has {len(text)} digits, more than the maximum of {_MOST_DIGITS}")
    return int(text)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("an object has the same key twice")
    return content
