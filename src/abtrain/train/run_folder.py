"""The run folder: what a run was, how it went, and how it ended.

config.toml      the settings, with all defaults filled in; `abtrain train --config` repeats the run
metrics.jsonl    one JSON object per line: step, phase, loss, lr, payload_bytes, seconds
result.json      appears complete, at the end, or not at all
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from abtrain.errors import ConfigurationError
from abtrain.train.config import TrainConfig
from abtrain.train.config_file import to_toml


def default_folder(config: TrainConfig) -> Path:
    """Where a run goes that was given no folder."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{config.task}-{config.recipe}-seed{config.seed}-{stamp}"


class RunFolder:
    """The folder of one run, written by one process.

    Args:
        config: valid and resolved; a run that the folder already holds is replaced.

    Raises:
        ConfigurationError: the folder cannot be written.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.path = config.out or default_folder(config)
        # Neither the folder nor the permission to overwrite belong to the run that the file describes.
        settings = to_toml(dataclasses.replace(config, out=None, overwrite=False))
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "result.json").unlink(missing_ok=True)
            (self.path / "config.toml").write_text(settings, encoding="utf-8")
            self._metrics = (self.path / "metrics.jsonl").open("w", encoding="utf-8")
        except OSError as error:
            raise ConfigurationError(f"--out {self.path} cannot be written: {error}") from error

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._metrics.close()

    def log(self, record: Mapping[str, Any]) -> None:
        """Adds a line to metrics.jsonl."""
        self._metrics.write(_json(record) + "\n")
        self._metrics.flush()  # a run that dies keeps the lines written so far

    def finish(self, result: Mapping[str, Any]) -> None:
        """Writes result.json: whole or not at all, even if the machine goes down."""
        partial = self.path / "result.json.partial"
        with partial.open("w", encoding="utf-8") as file:
            file.write(_json(result, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path / "result.json")


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    """NaN and infinity are no JSON: they become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, Path) else value
