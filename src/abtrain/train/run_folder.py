"""The run folder: what a run was, how it went, and how it ended.

config.toml      the settings, with all defaults filled in; `abtrain train --config` repeats the run
metrics.jsonl    one JSON object per line: step, phase, loss, lr, payload_bytes, seconds
result.json      appears complete, at the end, or not at all
checkpoints/     what the run goes on from (see `abtrain.checkpoint`)
outcome.json     how a run ended that was stopped on request
.lock            held while a process writes here
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from abtrain.errors import CheckpointError, ConfigurationError, StoppedError
from abtrain.faults import attempt
from abtrain.files import write_whole
from abtrain.train.config import NOT_OF_THE_METHOD, TrainConfig, holds_unfinished_run
from abtrain.train.config_file import from_toml, to_toml

CHECKPOINTS = "checkpoints"
RESULT_FILE, OUTCOME_FILE = "result.json", "outcome.json"


def default_folder(config: TrainConfig) -> Path:
    """Where a run goes that was given no folder."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{config.task}-{config.recipe}-seed{config.seed}-{stamp}"


class RunFolder:
    """The folder of one run, written by one process.

    Args:
        config: valid and resolved.

    Attributes:
        path: of the folder.
        goes_on: whether it holds an unfinished run that is to go on; any other run is replaced.

    Raises:
        ConfigurationError: the folder cannot be written, another process is writing it, or the unfinished run has other
            settings.
        StoppedError: the run was stopped on request, and its workers have been started again nevertheless.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.path = config.out or default_folder(config)
        # Neither the folder nor the permission to overwrite belong to the run that the file describes.
        self._settings = dataclasses.replace(config, out=None, overwrite=False, config=None)
        self._metrics: TextIO | None = None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.path / ".lock")
            self.goes_on = config.resume and not config.overwrite and holds_unfinished_run(self.path)
        except OSError as error:
            raise ConfigurationError(f"--out {self.path} cannot be written: {error}") from error
        if self.goes_on:
            try:
                self._check_settings()
                self._check_outcome()
            except (ConfigurationError, StoppedError):
                self._release()
                raise

    def begin(self, step: int) -> None:
        """The run begins (0), or goes on where so many steps are done: what was recorded after them goes.

        Raises:
            ConfigurationError: the folder cannot be written.
        """
        metrics = self.path / "metrics.jsonl"
        try:
            kept = _lines_until(metrics, step) if step else []
            (self.path / RESULT_FILE).unlink(missing_ok=True)
            (self.path / OUTCOME_FILE).unlink(missing_ok=True)
            if not step and (self.path / CHECKPOINTS).is_dir():
                shutil.rmtree(self.path / CHECKPOINTS)
            write_whole(self.path / "config.toml", to_toml(self._settings))
            write_whole(metrics, "".join(kept))
            self._metrics = metrics.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigurationError(f"--out {self.path} cannot be written: {error}") from error

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._metrics is not None:
            with contextlib.suppress(OSError):  # told when the lines that it still holds could not be written
                self._metrics.close()
        self._release()

    def log(self, record: Mapping[str, Any]) -> None:
        """Adds a line to metrics.jsonl."""
        assert self._metrics is not None
        self._metrics.write(_json(record) + "\n")
        self._metrics.flush()  # a run that dies keeps the lines written so far

    def finish(self, result: Mapping[str, Any]) -> None:
        """Writes result.json.

        Raises:
            CheckpointError: it cannot be written.
        """
        try:
            self._write(RESULT_FILE, result)
        except OSError as error:
            raise CheckpointError(
                f"the run has come to its end, but {self.path / RESULT_FILE} cannot be written: {error}. Make room "
                "for it, and run again: the run goes on from its last checkpoint"
            ) from error

    def stop(self, outcome: Mapping[str, Any]) -> None:
        """Writes outcome.json."""
        self._write(OUTCOME_FILE, outcome)

    def _release(self) -> None:
        (self.path / ".lock").unlink(missing_ok=True)
        self._lock.close()

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        write_whole(self.path / name, _json(content, indent=2) + "\n")

    def _check_outcome(self) -> None:
        # torchrun starts workers again whatever ended them.
        if attempt() and (self.path / OUTCOME_FILE).exists():
            raise StoppedError(f"--out {self.path} holds a run that was stopped on request: run again to go on")

    def _check_settings(self) -> None:
        try:
            before = dataclasses.asdict(from_toml(self.path / "config.toml"))
        except ConfigurationError as error:
            raise ConfigurationError(
                f"--out {self.path} holds a run whose config.toml is damaged ({'; '.join(error.problems)}): put it in "
                "order, name another folder, or add --overwrite to replace it"
            ) from error
        now = dataclasses.asdict(self._settings)
        differing = [
            f"{name} is {before[name]!r} there and {now[name]!r} here"
            for name in now
            if name not in NOT_OF_THE_METHOD and before[name] != now[name]
        ]
        if differing:
            raise ConfigurationError(
                f"--out {self.path} holds an unfinished run with other settings ({'; '.join(differing)}): use the same "
                "to go on with it, name another folder, or add --overwrite to replace it"
            )


def _lock(path: Path) -> TextIO:
    """The lock file, locked.

    Raises:
        ConfigurationError: another process holds it.
    """
    while True:
        file = path.open("a", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ConfigurationError(
                f"--out {path.parent} is in use by another run: wait for its end, or name another folder"
            ) from None
        # The one who held it before may have removed it in between: then this is not the file that others see.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()


def _lines_until(metrics: Path, step: int) -> list[str]:
    """The lines of metrics up to a step; one that a crash tore is not among them."""
    kept = []
    text = metrics.read_text(encoding="utf-8", errors="replace") if metrics.exists() else ""
    for line in text.splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step and line.endswith("\n"):
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    return kept


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
