"""Writes files completely or not at all, and reads regular files without following links."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{16}\.partial")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """Opens a text file for writing. The new content replaces the former file only once it is completely on disk.

    The content is written under a temporary name in the same folder. If `path` is a link, the link is replaced.

    Raises:
        OSError: the file cannot be written; the former file is unchanged.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    # O_EXCL follows no link, and opens no existing file.
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        with open(handle, "w", encoding="utf-8") as file:  # noqa: PTH123  a handle has no path
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        # A full disk may need the space of the partial file.
        partial.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """Writes a text file. Even after a crash of the machine, either the former or the new file is there, complete.

    Raises:
        OSError: the file cannot be written; the former file is unchanged.
    """
    with whole_file(path) as file:
        file.write(text)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object like `write_whole`. All its numbers are finite: JSON has no NaN and no infinity."""
    write_whole(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def open_regular(path: Path, flags: int) -> int:
    """Opens a regular file with the flags of `os.open`, follows no link, and returns its file descriptor.

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


def is_leftover(path: Path) -> bool:
    """Whether `path` is a temporary file of `whole_file` that a crash left behind."""
    return _LEFTOVER.fullmatch(path.name) is not None


def remove(path: Path) -> None:
    """Removes a folder with its content, a file, or a link but not its target. Raises OSError on failure."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _irregular(path: Path) -> OSError:
    return OSError(errno.EINVAL, "it is a link, a pipe or a device, and not a regular file: remove it", str(path))
