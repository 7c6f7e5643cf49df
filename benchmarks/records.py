"""Results of benchmarks: a JSON line for each run, in a file of results/. A run with a line there is done."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
Record = dict[str, Any]


@dataclass(frozen=True)
class RecordedRun:
    """A run of a benchmark.

    Attributes:
        file: that holds its record, or gets it.
        arguments: that tell it from the other runs of the file.
    """

    file: Path
    arguments: str

    def __str__(self) -> str:
        return self.arguments

    @property
    def done(self) -> bool:
        return self.record is not None

    @property
    def record(self) -> Record | None:
        """The newest record of the run; None if there is none."""
        records = [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []
        return next((record for record in reversed(records) if record["arguments"] == self.arguments), None)


def keep(file: Path, record: Record) -> Record:
    """Adds a record, with the commit that is checked out; returns it."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=FOLDER.parent)
    whole = {**record, "commit": commit.stdout.strip()}
    file.parent.mkdir(exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(whole) + "\n")
    return whole


def say(line: str) -> None:
    """Reports progress, beside the table on standard output."""
    print(line, file=sys.stderr, flush=True)


def in_short(run: RecordedRun) -> str:
    """The result of a run for a line of progress."""
    return f"loss {run.record['loss']:.4f}" if run.record else "no result"
