"""Results that are kept: a JSON line for each run, which is not run again while its line is there."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
Record = dict[str, Any]


def recorded(file: Path, arguments: str) -> Record | None:
    """The newest record of a run, if there is one."""
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return next((record for record in reversed(records) if record["arguments"] == arguments), None)


def keep(file: Path, record: Record) -> Record:
    """Adds a record, with the commit that is checked out; returns it."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=FOLDER.parent)
    whole = {**record, "commit": commit.stdout.strip()}
    file.parent.mkdir(exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(whole) + "\n")
    return whole
