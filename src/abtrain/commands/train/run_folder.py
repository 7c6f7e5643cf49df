"""Manages the folder of a run, with its settings, metrics, checkpoints and result.

config.toml      the settings with all defaults filled in; `abtrain train --config` repeats the run. Its first line may
                 name the launch that wrote it
metrics.jsonl    one JSON object per line, for a step that is logged, a merge or a validation: docs/how-to/runs.md
model.safetensors, model-dense.safetensors
                 the trained model with its factors, and with dense weights only
model-best...    the best model of all validations, in the same forms
model.json       describes these models
result.json      the result, written completely at the end of the run
checkpoints/     the states from which the run can resume (see `abtrain.checkpoint.store`)
outcome.json     written when a run is stopped on request
.lock            locked while a process writes here
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from abtrain.commands.files import (
    FolderLock,
    as_json,
    is_regular,
    open_regular,
    read_regular,
    remove,
    write_json,
    write_whole,
)
from abtrain.commands.train.config import TrainConfig, differences, identity
from abtrain.commands.train.config_file import from_text, to_toml
from abtrain.commands.train.folder_content import (
    BEST_MODEL,
    CHECKPOINTS,
    CONFIG_FILE,
    LOCK_FILE,
    METRICS_FILE,
    MODEL,
    MODEL_INFO_FILE,
    OLD_CHECKPOINTS,
    OUTCOME_FILE,
    RESULT_FILE,
    continuation,
    holds_unfinished_run,
    model_files,
)
from abtrain.errors import CheckpointError, ConfigurationError, StoppedError
from abtrain.failpoints import attempt
from abtrain.files import is_leftover


def default_folder(config: TrainConfig) -> Path:
    """Returns the default folder of a run, which is used without `--out`."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{config.task}-{config.recipe_name}-seed{config.seed}-{stamp}"


class RunFolder:
    """The folder of one run. Only one process writes to it.

    Args:
        config: the settings, validated and resolved.
        launch: the name of one start of the command, shared by all its attempts; empty if it has only one attempt.

    Attributes:
        path: the path of the folder.
        resumes: whether the folder contains an unfinished run to resume; any other run is replaced. With `overwrite`,
            only a run of the same launch is resumed.

    Raises:
        ConfigurationError: the folder cannot be written, another process uses it, or its unfinished run has other
            settings.
        StoppedError: the run was stopped on request, but torchrun has restarted its workers.
    """

    def __init__(self, config: TrainConfig, launch: str = "") -> None:
        self.path = config.out or default_folder(config)
        # config.toml describes the run, not the folder or the permission to overwrite it.
        self._settings = dataclasses.replace(config, out=None, overwrite=False, config=None)
        self._launch = launch
        self._metrics: TextIO | None = None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(self.path / LOCK_FILE)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            self.resumes = config.resume and holds_unfinished_run(self.path) and self._may_resume(config.overwrite)
            if self.resumes:
                self._check_entries()
                self._check_settings()
                self._check_outcome()
        except OSError as error:
            self._lock.release()
            raise self._unwritable(error) from error
        except (ConfigurationError, StoppedError):
            self._lock.release()
            raise

    def begin(self, step: int) -> None:
        """Begins a run (step 0), or resumes it after `step` steps and removes later records.

        A crash at any moment leaves the folder in a state in which the same command can begin or resume the run.

        Raises:
            ConfigurationError: the folder cannot be written.
        """
        metrics = self.path / METRICS_FILE
        try:
            kept = _lines_until(metrics, step) if step else []
            if not step:
                self._set_checkpoints_aside()
            models = [*model_files(MODEL).values(), *(() if step else model_files(BEST_MODEL).values())]
            for name in (RESULT_FILE, OUTCOME_FILE, MODEL_INFO_FILE, *models):
                (self.path / name).unlink(missing_ok=True)
            # From here on the folder belongs to this run, so no file of another run that could be resumed may remain.
            write_whole(self.path / CONFIG_FILE, f"{_mark(self._launch)}{to_toml(self._settings)}")
            write_whole(metrics, "".join(kept))
            handle = open_regular(metrics, os.O_WRONLY | os.O_APPEND)
            self._metrics = open(handle, "a", encoding="utf-8")  # noqa: PTH123, SIM115  a handle; closed at the end
            self._sweep()
        except OSError as error:
            raise self._unwritable(error) from error

    def complete(self, config: TrainConfig) -> None:
        """Records the settings with a choice of the recipe `auto`, which repeat the run without measuring.

        Raises:
            OSError: config.toml cannot be written.
        """
        self._settings = dataclasses.replace(config, out=None, overwrite=False, config=None)
        if self._metrics is not None:
            write_whole(self.path / CONFIG_FILE, f"{_mark(self._launch)}{to_toml(self._settings)}")

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._metrics is not None:
            with contextlib.suppress(OSError):  # `log` has already reported the error
                self._metrics.close()
        self._lock.release()

    def log(self, record: Mapping[str, Any]) -> None:
        """Adds a record to metrics.jsonl, as one line."""
        assert self._metrics is not None
        self._metrics.write(as_json(record) + "\n")
        self._metrics.flush()  # so that a crash does not lose it

    def finish(self, result: Mapping[str, Any], models: Mapping[str, Any]) -> None:
        """Writes model.json and result.json.

        Raises:
            CheckpointError: a file cannot be written.
        """
        try:
            self._write(MODEL_INFO_FILE, models)
            self._write(RESULT_FILE, result)
        except OSError as error:
            raise CheckpointError(
                f"the run has finished, but {self.path / RESULT_FILE} cannot be written: {error}. Free some space and "
                f"run again: {continuation(self.path)}"
            ) from error

    def stop(self, outcome: Mapping[str, Any]) -> None:
        """Writes outcome.json, which records that the run was stopped on request."""
        self._write(OUTCOME_FILE, outcome)

    def _unwritable(self, error: OSError) -> ConfigurationError:
        return ConfigurationError(
            f"--out {self.path} cannot be written: {error}. Make it writable, or name another folder"
        )

    def _may_resume(self, overwrite: bool) -> bool:
        """Whether an unfinished run is resumed. With `overwrite`, it is resumed only if this launch began it."""
        if not overwrite:
            return True
        mark = _mark(self._launch)
        return bool(mark) and read_regular(self.path / CONFIG_FILE, errors="replace").startswith(mark)

    def _set_checkpoints_aside(self) -> None:
        """Renames the folder of another run's checkpoints, because renaming is atomic. `_sweep` removes it later."""
        checkpoints, aside = self.path / CHECKPOINTS, self.path / OLD_CHECKPOINTS
        remove(aside)
        if checkpoints.is_dir() and not checkpoints.is_symlink():
            checkpoints.rename(aside)
        else:
            remove(checkpoints)

    def _sweep(self) -> None:
        """Removes files that crashes left behind, and the checkpoints of a replaced run."""
        remove(self.path / OLD_CHECKPOINTS)
        for path in list(self.path.iterdir()):
            if is_leftover(path):
                path.unlink(missing_ok=True)

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        write_json(self.path / name, content)

    def _check_outcome(self) -> None:
        # torchrun restarts workers after any exit code.
        if attempt() and (self.path / OUTCOME_FILE).exists():
            raise StoppedError(f"--out {self.path} contains a run that was stopped on request: run again to resume it")

    def _check_entries(self) -> None:
        """Checks that `checkpoints` is a folder and metrics.jsonl is a file, and that neither is a link.

        Raises:
            ConfigurationError: one of them is a link or of another type.
        """
        checkpoints, metrics = self.path / CHECKPOINTS, self.path / METRICS_FILE
        odd = {}
        if os.path.lexists(checkpoints) and (checkpoints.is_symlink() or not checkpoints.is_dir()):
            odd[checkpoints] = "a link or not a folder"
        if os.path.lexists(metrics) and not is_regular(metrics):
            odd[metrics] = "a link or not a file"
        if odd:
            found = " and ".join(f"{path} is {kind}" for path, kind in odd.items())
            raise ConfigurationError(
                f"--out {self.path} cannot be resumed: {found}. Only the run folder itself may be a link. Remove "
                f"{' and '.join(map(str, odd))}, or name another folder"
            )

    def _check_settings(self) -> None:
        file = self.path / CONFIG_FILE
        try:
            before = identity(from_text(read_regular(file), str(file)))
        except (UnicodeError, ConfigurationError) as error:
            why = "; ".join(error.problems) if isinstance(error, ConfigurationError) else f"it is not UTF-8: {error}"
            raise ConfigurationError(
                f"--out {self.path} contains a run whose config.toml is damaged ({why}): repair the file, name another "
                "folder, or add --overwrite to replace the run"
            ) from error
        differing = differences(before, identity(self._settings))
        if differing:
            raise ConfigurationError(
                f"--out {self.path} contains an unfinished run with other settings ({'; '.join(differing)}): use its "
                "settings to resume it, name another folder, or add --overwrite to replace it"
            )


def _mark(launch: str) -> str:
    """Returns the first line of config.toml. A later attempt of the same launch recognizes its run by this line."""
    return f"# launch {launch}\n" if launch else ""


def _lines_until(metrics: Path, step: int) -> list[str]:
    """Returns the lines of metrics.jsonl up to `step`, without an incomplete line that a crash left."""
    kept = []
    text = read_regular(metrics, errors="replace") if metrics.exists() else ""
    for line in text.splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step and line.endswith("\n"):
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    return kept
