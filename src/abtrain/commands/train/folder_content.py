"""Names the files of a run folder, and inspects a folder before a run begins in it.

A folder is in one of three states:

nothing         it is missing, is empty, or contains only files of a run that crashed before its first step
unfinished run  it contains config.toml, but not result.json
anything else   it contains a finished run, or other files
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from abtrain.commands.files import is_regular
from abtrain.files import is_leftover

CHECKPOINTS, OLD_CHECKPOINTS = "checkpoints", ".old-checkpoints"
CONFIG_FILE, METRICS_FILE, RESULT_FILE, OUTCOME_FILE = "config.toml", "metrics.jsonl", "result.json", "outcome.json"
LOCK_FILE = ".lock"
MODEL, BEST_MODEL, MODEL_INFO_FILE = "model", "model-best", "model.json"

_STACKS = re.compile(r"stacks-rank\d+\.txt")
# Earlier versions wrote files under this temporary name.
_PARTIAL = re.compile(r"(config\.toml|metrics\.jsonl|result\.json|outcome\.json)\.partial")


def model_files(name: str) -> dict[str, str]:
    """Returns the names of a model's files by form."""
    return {"factored": f"{name}.safetensors", "dense": f"{name}-dense.safetensors"}


def stacks_file(rank: int) -> str:
    """Returns the name of the file for the stack traces of a hanging worker."""
    return f"stacks-rank{rank}.txt"


def continuation(folder: Path) -> str:
    """Returns the end of a message, which says where an unfinished run continues if it is started again."""
    saved = any((folder / CHECKPOINTS).glob("step-*"))
    return (
        "the run resumes from its last checkpoint"
        if saved
        else "the run starts from step 0, since it has no checkpoint"
    )


def holds_unfinished_run(folder: Path) -> bool:
    """Whether the folder contains a run that has begun but not finished."""
    config = folder / CONFIG_FILE
    return is_regular(config) and config.stat().st_size > 0 and not os.path.lexists(folder / RESULT_FILE)


def holds_nothing(folder: Path) -> bool:
    """Whether the folder is empty, or contains only files of a run that crashed before its first step.

    A new run can then begin in it without loss of data.

    Raises:
        OSError: the folder cannot be read.
    """
    return all(map(_is_nothing, folder.iterdir()))


def _is_nothing(path: Path) -> bool:
    if path.is_symlink():
        return False
    if path.is_dir():
        unused = path.name == CHECKPOINTS and not any(entry.name.startswith("step-") for entry in path.iterdir())
        return unused or path.name == OLD_CHECKPOINTS
    if not is_regular(path):
        return False
    # A run that is stopped before its first step leaves outcome.json.
    expected = path.name in (LOCK_FILE, OUTCOME_FILE) or is_leftover(path)
    begun = path.name in (CONFIG_FILE, METRICS_FILE) and path.stat().st_size == 0
    return expected or begun or any(pattern.fullmatch(path.name) for pattern in (_STACKS, _PARTIAL))
