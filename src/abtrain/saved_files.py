"""Trees of tensors and JSON values <-> files, written so that they last and read so that nothing in them is trusted.

A tree is made of dicts with string keys, lists, tensors, strings, numbers, booleans and None; tuples become lists. Its
tensors go to a safetensors file, the rest to a JSON file in which every tensor is a reference,
{"$tensor": KEY, "file": NAME}. No pickle anywhere.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from abtrain.comm.checksums import bytes_of
from abtrain.errors import CheckpointError

_REFERENCE = "$tensor"
_NUMBER = "$number"
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
    """What a manifest says about a file."""

    size: int
    sha256: str


def split(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """A tree without its tensors, references in their place, and the tensors by key.

    Raises:
        TypeError: something that is neither a tensor nor JSON, with its place.
    """
    tensors: dict[str, Tensor] = {}

    def cut(value: Any, place: str) -> Any:
        if isinstance(value, Tensor):
            real = torch.view_as_real(value.detach()) if value.is_complex() else value.detach()
            tensors[place] = real
            return {_REFERENCE: place, **({"complex": True} if value.is_complex() else {})}
        if isinstance(value, Mapping):
            odd = [key for key in value if not isinstance(key, str) or key.startswith("$") or "/" in key]
            if odd:
                raise TypeError(f"{place or 'the tree'} has the key {odd[0]!r}: use strings without '/' and '$'")
            return {key: cut(item, f"{place}/{key}" if place else key) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [cut(item, f"{place}/{i}" if place else str(i)) for i, item in enumerate(value)]
        if isinstance(value, float) and not math.isfinite(value):
            return {_NUMBER: repr(value)}  # JSON has no word for it
        if value is None or isinstance(value, str | int | float | bool):
            return value
        raise TypeError(f"{place or 'the tree'} is a {type(value).__name__}, which cannot be saved")

    return cut(tree, ""), tensors


def join(structure: Any, tensor: Callable[[str, str], Tensor]) -> Any:
    """The tree of a structure; `tensor` gives what a (file, key) refers to."""
    if isinstance(structure, list):
        return [join(item, tensor) for item in structure]
    if not isinstance(structure, dict):
        return structure
    if _REFERENCE in structure:
        found = tensor(structure["file"], structure[_REFERENCE])
        return torch.view_as_complex(found) if structure.get("complex") else found
    if _NUMBER in structure:
        return float(structure[_NUMBER])
    return {key: join(item, tensor) for key, item in structure.items()}


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
        return json.loads(data)
    except (ValueError, RecursionError) as error:
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
            raise CheckpointError(f"{self._path} has no tensor {key!r}: {error}") from error
        return found
