"""Replaces files completely or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{16}\.partial")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path for a temporary file in the same folder. When the context ends, this file replaces `path`.

    The code inside the context writes the temporary file. If it fails, the temporary file is removed. If `path` is a
    link, the link is replaced, and its target stays as it is.

    Raises:
        OSError: the file cannot be written; the former file is unchanged.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        # A full disk may need the space of the partial file.
        partial.unlink(missing_ok=True)
        raise


def is_leftover(path: Path) -> bool:
    """Whether `path` is a temporary file of `replacing` that a crash left behind."""
    return _LEFTOVER.fullmatch(path.name) is not None
