"""JSON and safetensors files of a checkpoint: synced when written, verified when read, and without pickle."""

from __future__ import annotations

import hashlib
import json
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

from abtrain.checkpoint.trees import DTYPES, parse_json
from abtrain.comm.checksums import bytes_of
from abtrain.errors import CheckpointError

MAX_JSON_BYTES = 64 * 2**20
"""The largest JSON file, or header of a safetensors file, that is read into memory."""

_MOST_UNDIGESTED_BYTES = 256 * 2**20
"""Limits the memory for copies of a GPU's tensors: they are kept until they are digested."""


class Written(NamedTuple):
    """Size and digest of a file, as the manifest lists them."""

    size: int
    sha256: str


def write_json(path: Path, value: Any, sync: Callable[[BinaryIO], None]) -> Written:
    """Writes JSON to a new file; `sync` makes it durable."""
    return _write(path, [_as_tensor(json.dumps(value, allow_nan=False).encode())], sync)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], sync: Callable[[BinaryIO], None]) -> Written:
    """Writes tensors of the dtypes in `DTYPES` to a new safetensors file, in one pass; `sync` makes it durable."""
    # Wide dtypes first, so that all are aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, Any] = {}
    end = 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return _write(path, [_as_tensor(len(text).to_bytes(8, "little") + text), *(tensors[name] for name in names)], sync)


def _as_tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _write(path: Path, pieces: list[Tensor], sync: Callable[[BinaryIO], None]) -> Written:
    sha, size = hashlib.sha256(), 0
    undigested: deque[tuple[Future[None], int]] = deque()
    # A thread computes the digest while the disk is busy; it may finish after the disk.
    with path.open("xb") as file, ThreadPoolExecutor(1) as thread:
        for piece in pieces:
            # One tensor at a time is copied to the CPU, and written without a further copy.
            held = piece.cpu().contiguous()
            undigested.append((thread.submit(_digest, sha, held), held.nbytes))
            file.write(bytes_of(held))
            size += held.nbytes
            while sum(waiting for _, waiting in undigested) > _MOST_UNDIGESTED_BYTES:
                undigested.popleft()[0].result()
        file.flush()
        sync(file)
        for digested, _ in undigested:
            digested.result()
    return Written(size, sha.hexdigest())


def _digest(sha: Any, held: Tensor) -> None:
    sha.update(bytes_of(held))


def open_regular(path: Path) -> BufferedReader:
    """Opens a regular file for reading; links are not followed.

    Raises:
        CheckpointError: it is missing, a link, or not a regular file.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise CheckpointError(f"{path} is not a regular file")
    return open(handle, "rb")  # noqa: PTH123


def read_json(path: Path, expected: Written | None = None) -> Any:
    """Returns the content of a JSON file, and verifies it if its size and digest are known.

    Raises:
        CheckpointError: it is missing, damaged, too large, or not JSON.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has {size} bytes: more than {MAX_JSON_BYTES} are not read")
        data = file.read(MAX_JSON_BYTES + 1)
    if expected is not None and Written(len(data), hashlib.sha256(data).hexdigest()) != expected:
        raise CheckpointError(f"{path} is damaged: its bytes are not those that were written")
    try:
        return parse_json(data)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def open_tensors(path: Path, expected: Written) -> safe_open:
    """Opens a safetensors file that holds exactly the bytes that were written.

    Raises:
        CheckpointError: it is missing or damaged; or there is no /dev/fd.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size != expected.size:
            raise CheckpointError(f"{path} is damaged: it has {size} bytes, {expected.size} were written")
        header = int.from_bytes(file.read(8), "little")
        if header > min(MAX_JSON_BYTES, size - 8):
            raise CheckpointError(f"{path} is damaged: it claims a header of {header} bytes")
        file.seek(0)
        if hashlib.file_digest(file, "sha256").hexdigest() != expected.sha256:
            raise CheckpointError(f"{path} is damaged: its bytes are not those that were written")
        try:
            # The descriptor is that of the verified file; the path may lead to another one by now.
            return safe_open(f"/dev/fd/{file.fileno()}", framework="pt", device="cpu")
        except SafetensorError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read by its descriptor: {error}") from error
