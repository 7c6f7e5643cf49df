"""Writes and reads the files of a checkpoint: JSON, safetensors, and a manifest of their sizes and digests.

Files are synced to the disk when they are written, verified when they are read, and contain no pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from abtrain.checkpoint.trees import DTYPES, parse_json
from abtrain.checks import anything, by_name, mapping, one_of, row, said, text, whole
from abtrain.comm.checksums import bytes_of
from abtrain.errors import CheckpointError

MAX_JSON_BYTES = 64 * 2**20
"""The largest JSON file, or header of a safetensors file, that is read into memory."""

_MOST_UNDIGESTED_BYTES = 256 * 2**20
"""The maximum memory for CPU copies of tensors that are written but not yet included in the digest."""

FORMAT = 1
MANIFEST = "manifest.json"
_BODY = mapping(
    {
        "format": anything,
        "step": whole(0, 2**63 - 1),
        "workers": whole(1, 10**6),
        "resizable": one_of(True, False),
        "files": by_name(row(whole(0, 2**63 - 1), text())),
    }
)


class Written(NamedTuple):
    """The size in bytes and the SHA-256 of a file, as the manifest lists them."""

    size: int
    sha256: str


def write_json(path: Path, value: Any, sync: Callable[[BinaryIO], None]) -> Written:
    """Writes a value to a new JSON file, and returns its size and digest. `sync` makes the open file durable."""
    return _write(path, [_as_tensor(json.dumps(value, allow_nan=False).encode())], sync)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], sync: Callable[[BinaryIO], None]) -> Written:
    """Writes tensors (see `DTYPES`) to a new safetensors file, and returns its size and digest. See `write_json`."""
    # Wide dtypes come first, so that all are aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, Any] = {}
    end = 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    return _write(path, [_as_tensor(len(head).to_bytes(8, "little") + head), *(tensors[name] for name in names)], sync)


def _as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _write(path: Path, pieces: list[Tensor], sync: Callable[[BinaryIO], None]) -> Written:
    sha, size = hashlib.sha256(), 0
    undigested: deque[tuple[Future[None], int]] = deque()
    # A thread computes the digest while the file is written, and may finish later than the writing.
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


def sync_folder(folder: Path) -> None:
    """Syncs a folder to the disk, so that renames in it survive a crash."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def open_regular(path: Path) -> BufferedReader:
    """Opens a regular file for reading. Does not follow symbolic links.

    Raises:
        CheckpointError: the file is missing, a link, or not a regular file.
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
    """Returns the content of a JSON file. If `expected` is given, verifies its size and digest first.

    Raises:
        CheckpointError: the file is missing, damaged, too large, or not JSON.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has {size} bytes: at most {MAX_JSON_BYTES} are allowed for a JSON file")
        data = file.read(MAX_JSON_BYTES + 1)
    if expected is not None and Written(len(data), hashlib.sha256(data).hexdigest()) != expected:
        raise CheckpointError(f"{path} is damaged: it does not match its SHA-256 checksum in {MANIFEST}")
    try:
        return parse_json(data)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def open_tensors(path: Path, expected: Written) -> safe_open:
    """Opens a safetensors file, after verifying that its size and digest are the expected ones.

    Raises:
        CheckpointError: the file is missing or damaged, or the system has no /dev/fd.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size != expected.size:
            raise CheckpointError(f"{path} is damaged: it has {size} bytes, but {MANIFEST} lists {expected.size}")
        header = int.from_bytes(file.read(8), "little")
        if header > min(MAX_JSON_BYTES, size - 8):
            raise CheckpointError(f"{path} is damaged: it claims a header of {header} bytes, over its size or 64 MiB")
        file.seek(0)
        if hashlib.file_digest(file, "sha256").hexdigest() != expected.sha256:
            raise CheckpointError(f"{path} is damaged: it does not match its SHA-256 checksum in {MANIFEST}")
        try:
            # The descriptor belongs to the verified file; the path may refer to another file by now.
            return safe_open(f"/dev/fd/{file.fileno()}", framework="pt", device="cpu")
        except SafetensorError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
        except OSError as error:
            raise CheckpointError(f"{path} cannot be opened through its descriptor: {error}") from error


def manifest(step: int, resizable: bool, workers: int, written: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of a manifest. `written` contains the size and SHA-256 of each file, by name."""
    body = {"format": FORMAT, "step": step, "workers": workers, "resizable": resizable, "files": dict(written)}
    return {"manifest": body, "sha256": _body_digest(body)}


def read_manifest(path: Path) -> tuple[dict[str, Any], str]:
    """Returns a folder's manifest and its digest, after checking that the folder has exactly the listed files.

    Raises:
        CheckpointError: the folder or the manifest is missing, damaged or invalid.
    """
    try:
        if not stat.S_ISDIR(path.lstat().st_mode):
            raise CheckpointError(f"{path} is not a folder")
        held = set(os.listdir(path))  # noqa: PTH208
    except OSError as error:
        raise CheckpointError(f"{path} cannot be listed: {error.strerror}") from error
    content = read_json(path / MANIFEST)
    body = content.get("manifest") if isinstance(content, dict) else None
    try:
        sha = _body_digest(body)
    except RecursionError:
        sha = ""  # Python's JSON parser accepts more levels than its writer
    if not isinstance(body, dict) or not sha or content.get("sha256") != sha:
        raise CheckpointError(f"{path / MANIFEST} is damaged: it does not match its own SHA-256 checksum")
    for problem in _problems(body):
        raise CheckpointError(f"{path / MANIFEST}: {problem}")
    wanted = {*body["files"], MANIFEST}
    for name in sorted(wanted - held):
        raise CheckpointError(f"{path / name} is missing")
    for name in sorted(held - wanted):
        raise CheckpointError(f"{path / name} is not listed in {MANIFEST}: remove it if you know where it came from")
    return body, sha


def _problems(body: Mapping[str, Any]) -> Iterator[str]:
    if body.get("format") != FORMAT:
        yield f"its format is {said(body.get('format'))}, but this version of abtrain reads only {FORMAT}"
        return
    problems = list(_BODY("manifest", body))
    yield from problems
    if not problems:
        files, workers = body["files"].keys(), body["workers"]
        expected = {f"part-{rank}.{kind}" for rank in range(workers) for kind in ("json", "safetensors")}
        yield from (f"it lists {said(name)}, not a file of {workers} workers" for name in sorted(files - expected))
        yield from (f"it does not list {name}" for name in sorted(expected - files))


def _body_digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
