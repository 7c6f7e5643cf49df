"""Writes files completely or not at all, reads regular files without following links, and locks folders."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from abtrain.errors import ConfigurationError
from abtrain.files import replacing


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """Opens a text file for writing. The new content replaces the former file only once it is completely on disk.

    Raises:
        OSError: the file cannot be written; the former file is unchanged.
    """
    with replacing(path) as partial:
        # O_EXCL follows no link, and opens no existing file.
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        with open(handle, "w", encoding="utf-8") as file:  # noqa: PTH123  a handle has no path
            yield file


def write_whole(path: Path, text: str) -> None:
    """Writes a text file. Even after a crash of the machine, either the former or the new file is there, complete.

    Raises:
        OSError: the file cannot be written; the former file is unchanged.
    """
    with whole_file(path) as file:
        file.write(text)


def as_json(value: Any, indent: int | None = None) -> str:
    """Returns a value as JSON. Paths become strings; NaN and infinity, which JSON does not have, become null."""
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes an object as JSON (see `as_json`), completely or not at all. Raises the errors of `write_whole`."""
    write_whole(path, as_json(content, indent=2) + "\n")


def open_regular(path: Path, flags: int) -> int:
    """Opens a regular file without following a link, and returns its file descriptor. `flags` are those of `os.open`.

    Raises:
        OSError: the file cannot be opened, or is not a regular file.
    """
    try:
        # O_NONBLOCK: opening a pipe would wait for its other end.
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise _irregular(path) from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise _irregular(path)
    return handle


def read_regular(path: Path, errors: str = "strict") -> str:
    """Returns the text of a regular file.

    Raises:
        OSError: the file cannot be read, or is not a regular file.
        UnicodeError: the file is not UTF-8, and `errors` is "strict".
    """
    with open(open_regular(path, os.O_RDONLY), encoding="utf-8", errors=errors) as file:
        return file.read()


def is_regular(path: Path) -> bool:
    """Whether `path` is a regular file, and not a link to one."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def remove(path: Path) -> None:
    """Removes a file, a folder and its content, or a link without its target, if it exists. May raise OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class FolderLock:
    """Reserves a folder for this process by locking a file in it, until `release` is called.

    Args:
        path: the lock file; created if it does not exist.

    Raises:
        ConfigurationError: another process has locked the file.
        OSError: the file cannot be opened, or is not a regular file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        while True:
            handle = open_regular(path, os.O_WRONLY | os.O_CREAT)
            self._file = open(handle, "w", encoding="utf-8")  # noqa: PTH123, SIM115  closed by `release`
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._file.close()
                raise ConfigurationError(
                    f"--out {path.parent} is in use by another process: wait for it to finish, or name another folder"
                ) from None
            # The process that had the lock may have removed this file. Then other processes lock a newer file.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._file.fileno()), path.lstat()):
                    return
            self._file.close()

    def release(self) -> None:
        """Removes the lock file, and lets other processes use the folder."""
        self._path.unlink(missing_ok=True)
        self._file.close()


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _irregular(path: Path) -> OSError:
    return OSError(errno.EINVAL, "not a regular file, but a link, a pipe or a device: remove it", str(path))
