"""Saves and loads the states of all workers: a checkpoint is complete or absent, and verified before it is used.

    FOLDER/step-000000000120/manifest.json          sizes and SHA-256 of the files, and a SHA-256 of the manifest
                         part-0.json            the state of rank 0, without tensors
                         part-0.safetensors     the tensors of rank 0; other parts do not repeat them, but refer to them

A checkpoint is written to a temporary folder, synced to the disk and renamed. A crash at any moment leaves the older
checkpoints and at most a temporary folder, which the next save removes. If a step is saved again, the new checkpoint is
complete as step-...120.new before the old one is removed. All workers use one folder on a shared file system. Digests
reveal lost writes. Whoever can write to the folder can replace its content and digests, but cannot have code executed.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from torch import Tensor

from abtrain.checkpoint.files import (
    MANIFEST,
    Written,
    manifest,
    open_tensors,
    read_json,
    read_manifest,
    sync_folder,
    write_json,
    write_tensors,
)
from abtrain.checkpoint.tidying import AGAIN, TEMPORARY, checkpoints_in, prune, settle, sweep
from abtrain.checkpoint.trees import join, refer, split
from abtrain.checks import as_checkpoint_error, said
from abtrain.comm.checksums import digest
from abtrain.comm.communicator import Communicator
from abtrain.consistency.agreement import CALL, check_equal, gather_json
from abtrain.consistency.replicas import Marks, check_same, drifted, marks, same_in
from abtrain.errors import CheckpointError, RanksDisagreeError
from abtrain.failpoints import fail_at

log = logging.getLogger("abtrain")


class Saved(NamedTuple):
    """A checkpoint that all workers have verified.

    Attributes:
        step: the number of training steps done when it was saved.
        workers: the number of workers that saved the checkpoint.
        states: a list of this worker's state; or of all saved states in rank order, if the number of workers changed.
    """

    step: int
    workers: int
    states: list[Any]


def save(
    folder: str | os.PathLike[str],
    step: int,
    state: Mapping[str, Any],
    comm: Communicator,
    *,
    keep: int = 2,
    resizable: bool = False,
) -> Path:
    """Writes a checkpoint, removes the oldest ones, and returns its folder. Collective over the world.

    Args:
        folder: the folder of checkpoints, shared by all workers; it is created if it is missing.
        step: the number of steps done.
        state: this worker's state: dicts, lists, tensors and JSON values (see `abtrain.checkpoint.trees`).
        keep: the number of checkpoints that remain, this one included; at least 1.
        resizable: whether a different number of workers may resume from this checkpoint.

    Raises:
        CheckpointError: the checkpoint cannot be written. All workers raise it, and older checkpoints are unchanged.
        RanksDisagreeError: workers that must have the same tensors have different ones. All workers raise it.
        TypeError: a worker's state has a value that cannot be saved. That worker raises it, with the value's place.
    """
    folder = Path(folder)
    final, temporary = folder / f"step-{step:012d}", folder / f"{TEMPORARY[0]}step-{step:012d}"
    failure = f"the checkpoint of step {step} could not be written"
    # The same shape as the checks of merges: a worker that calls save alone is found by the next merge of the others.
    check_equal(comm, {CALL: "checkpoint.save()"})
    structure, tensors = _split_together(state, comm, step)
    check_same(state, comm, f"a checkpoint of step {step}")
    try:
        _together(comm, failure, lambda: _prepare(temporary, comm, step))
        file_of, mine = _divide(tensors, comm)
        parts = _together(comm, failure, lambda: _write_part(temporary, refer(structure, file_of), mine, comm, step))
        written = {name: file for part in parts for name, file in part.items()}
        content = manifest(step, resizable, comm.topology.world_size, written)
        _together(comm, failure, lambda: _commit(temporary, final, content, comm, step))
    except CheckpointError:
        if comm.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if comm.rank == 0:
        prune(folder, keep, comm, step)
    return final


def _prepare(temporary: Path, comm: Communicator, step: int) -> None:
    """Creates the temporary folder on rank 0, after completing or removing what earlier saves have left."""
    if comm.rank == 0:
        fail_at(comm.rank, step, "checkpoint.prepare")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        sweep(temporary.parent)
        settle(temporary.parent, comm, step)
        temporary.mkdir()


def _split_together(state: Mapping[str, Any], comm: Communicator, step: int) -> tuple[Any, dict[str, Tensor]]:
    """Returns the result of `split`. If a worker's state cannot be saved, all workers raise an error."""
    problem, structure, tensors, places = "", None, dict[str, Tensor](), list[list[str]]()
    try:
        structure, tensors = split(state)
        places = [[place, scope] for place, scope, _ in same_in(state)]
    except TypeError as error:
        problem = str(error)
    answers = gather_json(comm, [problem, step, places])
    if problem:
        raise TypeError(problem)
    for rank, (found, other, marked) in enumerate(answers):
        if found:
            raise CheckpointError(f"the checkpoint of step {step} could not be written: on rank {rank}, {found}")
        if (other, marked) != (step, places):
            raise RanksDisagreeError(
                f"rank {rank} saves a checkpoint of step {other}, which does not fit that of rank {comm.rank} at step "
                f"{step}: call save on all workers at the same step of the same training loop"
            )
    return structure, tensors


def latest(folder: str | os.PathLike[str], comm: Communicator) -> Saved | None:
    """Returns the newest checkpoint that all workers have verified; None if there is none. Collective over the world.

    A checkpoint is skipped, with a warning, if it is damaged, if workers had different weights that should have been
    equal when they saved it, or if the number of workers has changed and it is not resizable.

    Raises:
        CheckpointError: no checkpoint in the folder can be used, or the folder cannot be read. All workers raise it.
    """
    check_equal(comm, {CALL: "checkpoint.latest()"})
    folder = Path(folder)
    listed = f"the checkpoints in {folder} could not be listed"
    names = _together(comm, listed, lambda: checkpoints_in(folder) if comm.rank == 0 else [])[0]
    problems = []
    for name in sorted(names, reverse=True):
        saved, problem = _open_together(folder / name, comm)
        if saved is not None:
            return saved
        problems.append(problem)
        if comm.rank == 0:
            log.warning("checkpoint skipped: %s", problem)
    if problems:
        raise CheckpointError(
            f"none of the {len(problems)} checkpoints in {folder} can be used: {'; '.join(problems[:3])}. "
            "Fix the cause, or remove these checkpoints to start from the beginning"
        )
    return None


def _open_together(path: Path, comm: Communicator) -> tuple[Saved | None, str]:
    """Returns a checkpoint if all workers can use it; otherwise None and the reason."""
    problem, sha, saved, held = "", "", None, list[Marks]()
    try:
        sha, saved, held = _open(path, comm)
    except (CheckpointError, OSError) as error:
        problem = str(error)
    answers = gather_json(comm, [problem, sha, held])
    for rank, (found, _, _) in enumerate(answers):
        if found:
            return None, f"{found} (rank {rank})"
    if len({sha for _, sha, _ in answers}) > 1:
        return None, f"{path} differs between workers: use one folder that all workers share"
    drift = drifted([held for _, _, held in answers], comm.topology)
    return (None, f"{path}: {drift}") if drift else (saved, "")


def _open(path: Path, comm: Communicator) -> tuple[str, Saved, list[Marks]]:
    """Reads the files that this worker needs. Returns the manifest's digest, the states, and their `Marks`."""
    body, sha = read_manifest(path)
    workers = body["workers"]
    if workers == comm.topology.world_size:
        ranks = [comm.rank]
    elif body["resizable"]:
        ranks = list(range(workers))
    else:
        raise CheckpointError(
            f"{path} was saved by {workers} workers, but there are {comm.topology.world_size} now: start {workers} "
            "workers to resume from it"
        )
    files = {name: Written(*entry) for name, entry in body["files"].items()}

    @cache
    def opened(file: str) -> Any:
        if file not in files or not file.endswith(".safetensors"):
            raise CheckpointError(f"{path} refers to {said(file)}, which is not one of its files")
        return open_tensors(path / file, files[file])

    states, held = [], list[Marks]()
    for rank in ranks:
        structure = read_json(path / f"part-{rank}.json", files[f"part-{rank}.json"])
        with as_checkpoint_error(f"{path}/part-{rank}.json is malformed"):
            states.append(join(structure, lambda file, key: opened(file).get_tensor(key)))
            held.append(marks(structure))
        # Opening a file verifies it, so some worker verifies each file, even if no part refers to the file.
        opened(f"part-{rank}.safetensors")
    return sha, Saved(body["step"], workers, states), held


def _divide(tensors: Mapping[str, Tensor], comm: Communicator) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Assigns each tensor to the first rank that has it. Returns the file of each key, and this rank's tensors."""
    if comm.topology.world_size == 1:
        return dict.fromkeys(tensors, "part-0.safetensors"), dict(tensors)
    held = gather_json(comm, {key: digest(tensor) for key, tensor in tensors.items()})
    ours = held[comm.rank]
    first = {key: next(rank for rank, keys in enumerate(held) if keys.get(key) == ours[key]) for key in tensors}
    mine = {key: tensor for key, tensor in tensors.items() if first[key] == comm.rank}
    return {key: f"part-{rank}.safetensors" for key, rank in first.items()}, mine


def _write_part(
    folder: Path, structure: Any, tensors: Mapping[str, Tensor], comm: Communicator, step: int
) -> dict[str, Written]:
    """Writes this worker's files, and returns their sizes and digests by file name."""
    sync = partial(_sync, comm, step)
    file = f"part-{comm.rank}"
    fail_at(comm.rank, step, "checkpoint.write")
    written = write_tensors(folder / f"{file}.safetensors", tensors, sync)
    return {f"{file}.safetensors": written, f"{file}.json": write_json(folder / f"{file}.json", structure, sync)}


def _commit(temporary: Path, final: Path, content: Mapping[str, Any], comm: Communicator, step: int) -> None:
    """Writes the manifest and renames the temporary folder, on rank 0. All parts must have been written."""
    if comm.rank:
        return
    for name, (size, _) in content["manifest"]["files"].items():
        if (temporary / name).stat().st_size != size:
            reason = "was written by another worker, and does not have the expected size here"
            raise OSError(0, f"{name} {reason}: all workers must write to one shared folder")
    fail_at(comm.rank, step, "checkpoint.manifest")
    write_json(temporary / MANIFEST, content, partial(_sync, comm, step))
    sync_folder(temporary)
    fail_at(comm.rank, step, "checkpoint.rename")
    again = final.exists()
    temporary.rename(final.with_name(f"{final.name}{AGAIN}") if again else final)
    sync_folder(final.parent)
    if again:
        settle(final.parent, comm, step)


def _sync(comm: Communicator, step: int, file: BinaryIO) -> None:
    fail_at(comm.rank, step, "checkpoint.fsync")
    os.fsync(file.fileno())


def _together(comm: Communicator, failure: str, work: Callable[[], Any]) -> list[Any]:
    """Calls `work` and returns the results of all workers. If it fails on one, all raise an error with `failure`."""
    outcome, problem = None, ""
    try:
        outcome = work()
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        problem = f"{error.strerror or error}{where}"
    answers = gather_json(comm, [outcome, problem])
    for rank, (_, found) in enumerate(answers):
        if found:
            raise CheckpointError(f"{failure} by rank {rank}: {found}")
    return [outcome for outcome, _ in answers]
