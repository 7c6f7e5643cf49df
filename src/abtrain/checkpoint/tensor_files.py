"""Trees of tensors and JSON values <-> files, written so that they last and read so that nothing in them is trusted.

A tree is made of dicts, lists, tensors, strings, numbers, booleans and None. Tuples become lists, and numpy's scalars
become Python's. Keys of dicts are strings, numbers, booleans, None, or tuples of them. Tensors go to a safetensors
file, the rest to a JSON file in which every tensor is a reference, {"$tensor": KEY, "file": NAME}. No pickle anywhere.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections import Counter, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from abtrain.checkpoint.strict_json import MOST_DIGITS, parse_json
from abtrain.checks import brief, said
from abtrain.comm.checksums import bytes_of
from abtrain.errors import CheckpointError

_REFERENCE = "$tensor"
_NUMBER = "$number"
_ITEMS = "$items"
_DEEPEST = 200
_MEBI = 2**20
MAX_JSON_BYTES = 64 * _MEBI
"""Of a JSON file; checked before it is read."""
MAX_HEADER_BYTES = 64 * _MEBI
"""Of a safetensors file's header, likewise."""

# Copies of tensors of a GPU are kept until they are digested: more than these wait for that.
_MOST_UNDIGESTED_BYTES = 256 * _MEBI

_DTYPES = {
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
}


class Written(NamedTuple):
    """Size and digest of a file, as the manifest lists them."""

    size: int
    sha256: str


def split(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """A tree without its tensors, references in their place, and the tensors by key.

    Raises:
        TypeError: something that cannot be saved, with its place.
    """
    tensors: dict[str, Tensor] = {}
    return _cut(tree, "", 0, tensors), tensors


def _cut(value: Any, place: str, depth: int, tensors: dict[str, Tensor]) -> Any:
    if depth > _DEEPEST:
        raise TypeError(f"{place[:80]}... is nested more than {_DEEPEST} levels deep, which cannot be saved")
    if isinstance(value, Tensor):
        return _refer_to(value, place, tensors)
    if isinstance(value, Mapping):
        plain = all(isinstance(key, str) and not key.startswith("$") and "/" not in key for key in value)
        if plain and not isinstance(value, Counter):
            return {
                key: _cut(item, f"{place}/{key}" if place else key, depth + 1, tensors) for key, item in value.items()
            }
        items = enumerate(value.items())
        pairs = [[_key(key, place), _cut(item, f"{place}/{i}", depth + 1, tensors)] for i, (key, item) in items]
        return {_ITEMS: pairs, "counter": isinstance(value, Counter)}
    if isinstance(value, list | tuple):
        return [_cut(item, f"{place}/{i}" if place else str(i), depth + 1, tensors) for i, item in enumerate(value)]
    return _scalar(value, place)


def _refer_to(value: Tensor, place: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    # Views that are conjugate or negative hold other bits than they show.
    held = value.detach().resolve_conj().resolve_neg()
    if held.layout != torch.strided or held.device.type == "meta":
        kind = "meta" if held.device.type == "meta" else str(held.layout)
        raise TypeError(f"{place} is a {kind} tensor, which cannot be saved: make it a dense one with values")
    real = torch.view_as_real(held) if held.is_complex() else held
    if real.dtype not in _DTYPES:
        raise TypeError(f"{place} is of {real.dtype}, which cannot be saved")
    tensors[place] = real
    return {_REFERENCE: place, **({"complex": True} if held.is_complex() else {})}


def _key(key: object, place: str) -> Any:
    if isinstance(key, tuple):
        return [_key(part, place) for part in key]
    if key is None or isinstance(key, str | int | float | bool):
        return _scalar(key, place)
    raise TypeError(
        f"{place or 'the tree'} has the key {key!r}, which cannot be saved: use strings, numbers, booleans, None, or "
        "tuples of them"
    )


def _scalar(value: Any, place: str) -> Any:
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return {_NUMBER: repr(value)}  # JSON has no word for it
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**MOST_DIGITS:
        raise TypeError(f"{place or 'the tree'} is a number of more than {MOST_DIGITS} digits, which cannot be saved")
    if value is None or isinstance(value, str | int | float | bool):
        return value
    kind = type(value).__name__
    hint = ": save torch.from_numpy(...) of it" if kind == "ndarray" else ""
    raise TypeError(f"{place or 'the tree'} is a {kind}, which cannot be saved{hint}")


def join(structure: Any, tensor: Callable[[str, str], Tensor]) -> Any:
    """The tree of a structure; `tensor` gives what a (file, key) refers to.

    Raises:
        ValueError: the structure is none that `split` and `refer` make.
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
            items = _joined_items(pairs, tensor)
            return Counter(items) if counts else items
    raise ValueError(f"an object with {', '.join(map(said, list(structure)[:3]))} is not what was saved")


def _joined_items(pairs: list[Any], tensor: Callable[[str, str], Tensor]) -> dict[Any, Any]:
    items = {}
    for key, item in pairs:
        name = _joined_key(key, tensor)
        if name in items:
            raise ValueError("a dict has the same key twice")
        items[name] = join(item, tensor)
    return items


def _joined_key(key: Any, tensor: Callable[[str, str], Tensor]) -> Any:
    if isinstance(key, list):
        return tuple(_joined_key(part, tensor) for part in key)
    name = join(key, tensor)
    if isinstance(name, Tensor | dict):
        raise ValueError("a dict has a key that cannot be one")
    return name


def refer(structure: Any, file_of: Mapping[str, str]) -> Any:
    """The structure with the file of every reference, by its key."""
    if isinstance(structure, list):
        return [refer(item, file_of) for item in structure]
    if not isinstance(structure, dict):
        return structure
    if _REFERENCE in structure:
        return {**structure, "file": file_of[structure[_REFERENCE]]}
    return {key: refer(item, file_of) for key, item in structure.items()}


def write_json(path: Path, value: Any, sync: Callable[[BinaryIO], None]) -> Written:
    """Writes JSON; `sync` makes it last."""
    return _write(path, [json.dumps(value, allow_nan=False).encode()], sync)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], sync: Callable[[BinaryIO], None]) -> Written:
    """Writes a safetensors file, tensor by tensor, in one pass; `sync` makes it last.

    Raises:
        TypeError: a dtype that the format does not have.
    """
    odd = [name for name, tensor in tensors.items() if tensor.dtype not in _DTYPES]
    if odd:
        raise TypeError(f"{odd[0]} is of {tensors[odd[0]].dtype}, which cannot be saved")
    # Wide ones first, so that all are aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, Any] = {}
    end = 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return _write(path, [len(text).to_bytes(8, "little") + text, *(tensors[name] for name in names)], sync)


def _write(path: Path, pieces: list[bytes | Tensor], sync: Callable[[BinaryIO], None]) -> Written:
    sha, size = hashlib.sha256(), 0
    undigested: deque[tuple[Future[None], int]] = deque()
    # The digest is made while the disk is busy, and may still be behind when the disk has all of it.
    with path.open("xb") as file, ThreadPoolExecutor(1) as beside:
        for piece in pieces:
            # One tensor at a time is brought to the CPU, and it is written from where it lies.
            held = piece.cpu().contiguous() if isinstance(piece, Tensor) else piece
            nbytes = held.nbytes if isinstance(held, Tensor) else len(held)
            undigested.append((beside.submit(_digest, sha, held), nbytes))
            file.write(_bytes_of(held))
            size += nbytes
            while sum(waiting for _, waiting in undigested) > _MOST_UNDIGESTED_BYTES:
                undigested.popleft()[0].result()
        file.flush()
        sync(file)
        for digested, _ in undigested:
            digested.result()
    return Written(size, sha.hexdigest())


def _digest(sha: Any, held: bytes | Tensor) -> None:
    sha.update(_bytes_of(held))


def _bytes_of(held: bytes | Tensor) -> Any:
    return bytes_of(held) if isinstance(held, Tensor) else held


def open_regular(path: Path) -> BufferedReader:
    """Opens a file for reading that is no link.

    Raises:
        CheckpointError: it is missing, a link, or no file.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise CheckpointError(f"{path} is no regular file")
    return open(handle, "rb")  # noqa: PTH123


def read_json(path: Path, expected: Written | None = None) -> Any:
    """The content of a JSON file, verified if it is known what to expect.

    Raises:
        CheckpointError: it is missing, damaged, too large, or no JSON.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has {size} bytes: more than {MAX_JSON_BYTES} are not read")
        data = file.read(MAX_JSON_BYTES + 1)
    if expected is not None and Written(len(data), hashlib.sha256(data).hexdigest()) != expected:
        raise CheckpointError(f"{path} is damaged: it has not the bytes that were written")
    try:
        return parse_json(data)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


class TensorFile:
    """A safetensors file whose bytes are those that were written.

    Raises:
        CheckpointError: it is missing or damaged, or its header is; or there is no /dev/fd.
    """

    def __init__(self, path: Path, expected: Written) -> None:
        self._path = path
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size != expected.size:
                raise CheckpointError(f"{path} is damaged: it has {size} bytes, {expected.size} were written")
            header = int.from_bytes(file.read(8), "little")
            if header > min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{path} is damaged: it claims a header of {header} bytes")
            file.seek(0)
            if hashlib.file_digest(file, "sha256").hexdigest() != expected.sha256:
                raise CheckpointError(f"{path} is damaged: it has not the bytes that were written")
            try:
                # By its descriptor, what is read is what was verified: at the path there may be another file by now.
                self._file = safe_open(f"/dev/fd/{file.fileno()}", framework="pt", device="cpu")
            except SafetensorError as error:
                raise CheckpointError(f"{path} is damaged: {error}") from error
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read by its descriptor: {error}") from error

    def tensor(self, key: str) -> Tensor:
        """The tensor called `key`.

        Raises:
            CheckpointError: there is none.
        """
        try:
            found: Tensor = self._file.get_tensor(key)
        except SafetensorError as error:
            raise CheckpointError(f"{self._path} has no tensor {said(key)}: {brief(error)}") from error
        return found
