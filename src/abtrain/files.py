"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """Writes a text file: what was there before stays until all of the new is on disk, even if the machine goes down.

    Raises:
        OSError: it cannot be written; nothing has changed then.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        # What is left of it would keep room that may be all that is missing.
        partial.unlink(missing_ok=True)
        raise
    partial.replace(path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Likewise, a JSON file of names and values; numbers are finite.

    Raises:
        OSError: it cannot be written; nothing has changed then.
    """
    write_whole(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
