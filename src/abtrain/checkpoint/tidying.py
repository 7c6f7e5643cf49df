"""Lists the checkpoints in a folder, replaces those that were saved again, and removes old ones.

A checkpoint is renamed before it is removed, so a crash during its removal does not leave a damaged checkpoint.
"""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

from abtrain.checkpoint.files import sync_folder
from abtrain.comm.communicator import Communicator
from abtrain.failpoints import fail_at

log = logging.getLogger("abtrain")

AGAIN = ".new"
_NAME = re.compile(rf"step-\d{{12}}({re.escape(AGAIN)})?")
TEMPORARY = (".writing-", ".old-")


def checkpoints_in(folder: Path) -> list[str]:
    """Returns the names of the checkpoints in a folder; empty if the folder does not exist."""
    return [path.name for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.exists() else []


def settle(folder: Path, comm: Communicator, step: int) -> None:
    """Replaces each checkpoint that was saved again by the new one, whose folder's name ends in `AGAIN`."""
    for path in [folder / name for name in checkpoints_in(folder) if name.endswith(AGAIN)]:
        final = path.with_name(path.name.removesuffix(AGAIN))
        if final.exists():
            final.rename(final.with_name(f"{TEMPORARY[1]}{final.name}"))
        fail_at(comm.rank, step, "checkpoint.replace")
        path.rename(final)
        sync_folder(folder)


def prune(folder: Path, keep: int, comm: Communicator, step: int) -> None:
    """Removes the checkpoints of later steps than `step`, and of the others all but the newest `keep`.

    Later checkpoints are damaged, or the run has returned to an earlier step. Failures are logged, not raised.
    """
    names = sorted(checkpoints_in(folder), reverse=True)
    later = [name for name in names if name > f"step-{step:012d}"]
    try:
        for name in [*later, *names[len(later) + max(keep, 1) :]]:
            fail_at(comm.rank, step, "checkpoint.prune")
            (folder / name).rename(folder / f"{TEMPORARY[1]}{name}")
        sweep(folder)
    except OSError as error:
        log.warning("old checkpoints in %s could not be removed: %s", folder, error)


def sweep(folder: Path) -> None:
    """Removes the temporary folders that crashes have left."""
    for path in list(folder.iterdir()):
        if path.name.startswith(TEMPORARY):
            shutil.rmtree(path)
