"""Checkpoints: what all workers saved, complete or not there at all, and nothing in them trusted before it is verified.

    FOLDER/step-000000000120/manifest.json          the files with their sizes and SHA-256; itself with a SHA-256
                         part-0.json            what rank 0 saved, all but the tensors
                         part-0.safetensors     the tensors that rank 0 is the first to hold; other parts refer to them

They are written to a temporary folder, synced to the disk and renamed. A crash at any moment leaves the older ones and
at most a temporary folder, which the next one removes. A step that is saved again is complete as step-...120.new before
the old one goes. All workers write to and read from one folder, so it has to be
on a file system that they share. A lost write is found by its digest. Who can write to the folder can replace its
content, digests and all; what they cannot do is to have code executed by it.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from torch import Tensor

from abtrain.checkpoint.manifest import MANIFEST, manifest, read_manifest
from abtrain.checkpoint.tensor_files import (
    TensorFile,
    Written,
    join,
    read_json,
    refer,
    split,
    write_json,
    write_tensors,
)
from abtrain.checkpoint.tidying import AGAIN, TEMPORARY, checkpoints_in, prune, settle, sweep, sync_folder
from abtrain.checks import as_checkpoint_error, said
from abtrain.comm.checksums import digest
from abtrain.comm.communicator import Communicator
from abtrain.consistency.agreement import gather_json
from abtrain.consistency.saved_marks import Marks, check_same, drifted, marks, same_in
from abtrain.errors import CheckpointError, RanksDisagreeError
from abtrain.failpoints import fail_at

log = logging.getLogger("abtrain")


class Saved(NamedTuple):
    """A checkpoint that all workers have verified.

    Attributes:
        step: steps done when it was saved.
        workers: by which it was saved.
        states: what this worker saved; or, where there are more or fewer workers now, what each of the former saved.
    """

    step: int
    workers: int
    states: list[Any]


def save(
    folder: Path, step: int, state: Mapping[str, Any], comm: Communicator, *, keep: int = 2, resizable: bool = False
) -> Path:
    """Writes a checkpoint, and removes the oldest ones. Collective over the world.

    Args:
        folder: of the checkpoints; one that all workers share. It is made if it is missing.
        step: how many steps are done.
        state: of this worker: dicts, lists, tensors and JSON values (see `abtrain.checkpoint.tensor_files`).
        comm: of this worker.
        keep: how many checkpoints are left, this one included; at least 1.
        resizable: whether another number of workers may go on from here.

    Returns:
        The folder of the checkpoint.

    Raises:
        CheckpointError: it cannot be written, on all workers. Older checkpoints are as they were.
        RanksDisagreeError: workers have drifted apart that ought to hold the same, on all workers; likewise.
        TypeError: the state holds something that cannot be saved, with its place; on the workers whose state it is.
    """
    final, temporary = folder / f"step-{step:012d}", folder / f"{TEMPORARY[0]}step-{step:012d}"
    structure, tensors = _split_together(state, comm, step)
    check_same(state, comm, f"a checkpoint of step {step}")

    def commit() -> None:
        if comm.rank == 0:
            _commit(temporary, final, manifest(step, resizable, comm.topology.world_size, written), comm, step)

    try:
        _together(comm, step, lambda: _prepare(temporary, comm, step))
        file_of, mine = _divide(tensors, comm)
        parts = _together(comm, step, lambda: _write_part(temporary, refer(structure, file_of), mine, comm, step))
        written = {name: file for part in parts for name, file in part.items()}
        _together(comm, step, commit)
    except CheckpointError:
        if comm.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if comm.rank == 0:
        prune(folder, keep, comm, step)
    return final


def _prepare(temporary: Path, comm: Communicator, step: int) -> None:
    """Makes room for a checkpoint, on the first worker."""
    if comm.rank == 0:
        fail_at(comm.rank, step, "checkpoint.prepare")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        sweep(temporary.parent)
        settle(temporary.parent, comm, step)
        temporary.mkdir()


def _split_together(state: Mapping[str, Any], comm: Communicator, step: int) -> tuple[Any, dict[str, Tensor]]:
    """`split` of this worker's state, and whose state cannot be saved: a worker alone must not leave the others."""
    problem, parts = "", None
    try:
        parts = split(state)
    except TypeError as error:
        problem = str(error)
    places = [[place, scope] for place, scope, _ in same_in(state)] if parts is not None else []
    answers = gather_json(comm, [problem, step, places])
    if problem:
        raise TypeError(problem)
    for rank, (told, other, marked) in enumerate(answers):
        if told:
            raise CheckpointError(f"the checkpoint of step {step} could not be written: on rank {rank}, {told}")
        if (other, marked) != (step, places):
            raise RanksDisagreeError(
                f"rank {rank} saves a checkpoint of step {other}, and rank {comm.rank} one of step {step}: save on all "
                "workers, at the same step, what the same loop holds"
            )
    assert parts is not None
    return parts


def latest(folder: Path, comm: Communicator) -> Saved | None:
    """The newest checkpoint that is complete and undamaged for all workers, verified. Collective over the world.

    Where the newest is damaged, or workers saved unlike weights that ought to be the same, an older one is taken, with
    a warning that names it. Where there are more or
    fewer workers than before, it is the newest from which another number of workers may go on.

    Returns:
        None if there is no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints, but none that can be used; on all workers.
    """
    names = gather_json(comm, checkpoints_in(folder))[0]
    problems = []
    for name in sorted(names, reverse=True):
        saved: Saved | None = None
        problem, sha, held = "", "", list[Marks]()
        try:
            sha, saved, held = _open(folder / name, comm)
        except CheckpointError as error:
            problem = str(error)
        answers = gather_json(comm, [problem, sha, held])
        found = next((f"{told} (rank {rank})" for rank, (told, _, _) in enumerate(answers) if told), "")
        if not found and len({sha for _, sha, _ in answers}) > 1:
            found = f"{folder / name} is not the same on all workers: they need a folder that they share"
        if not found:
            found = drifted([held for _, _, held in answers], comm.topology)
            found = found and f"{folder / name}: {found}"
        if not found and saved is not None:
            return saved
        problems.append(found)
        if comm.rank == 0:
            log.warning("checkpoint left out: %s", found)
    if problems:
        raise CheckpointError(
            f"none of the {len(problems)} checkpoints in {folder} can be used: {'; '.join(problems[:3])}. "
            "Remove them to start anew"
        )
    return None


def _open(path: Path, comm: Communicator) -> tuple[str, Saved, list[Marks]]:
    """A checkpoint's part that this worker needs, verified.

    Returns:
        The digest of the manifest, the states, and for each of these what has to be the same on all workers.
    """
    body, sha = read_manifest(path)
    workers = body["workers"]
    if workers == comm.topology.world_size:
        ranks = [comm.rank]
    elif body["resizable"]:
        ranks = list(range(workers))
    else:
        raise CheckpointError(
            f"{path} was saved by {workers} workers, and there are {comm.topology.world_size} now: only as many can go "
            "on from it"
        )
    files = {name: Written(*entry) for name, entry in body["files"].items()}
    opened: dict[str, TensorFile] = {}

    def tensor(file: str, key: str) -> Tensor:
        if file not in files or not file.endswith(".safetensors"):
            raise CheckpointError(f"{path} refers to {said(file)}, which is not one of its files")
        if file not in opened:
            opened[file] = TensorFile(path / file, files[file])
        return opened[file].tensor(key)

    states, held = [], list[Marks]()
    for rank in ranks:
        structure = read_json(path / f"part-{rank}.json", files[f"part-{rank}.json"])
        with as_checkpoint_error(f"{path}/part-{rank}.json is malformed"):
            states.append(join(structure, tensor))
            held.append(marks(structure))
        # Its own tensors too, even if none is referred to: every file is verified by somebody.
        own = f"part-{rank}.safetensors"
        if own not in opened:
            opened[own] = TensorFile(path / own, files[own])
    return sha, Saved(body["step"], workers, states), held


def _divide(tensors: Mapping[str, Tensor], comm: Communicator) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Who writes which tensor: the first rank that holds it. The file of every key, and what this rank writes."""
    if comm.topology.world_size == 1:
        return dict.fromkeys(tensors, "part-0.safetensors"), dict(tensors)
    held = gather_json(comm, {key: digest(tensor) for key, tensor in tensors.items()})
    file_of, mine = {}, {}
    for key, tensor in tensors.items():
        first = next(rank for rank, keys in enumerate(held) if keys.get(key) == held[comm.rank][key])
        file_of[key] = f"part-{first}.safetensors"
        if first == comm.rank:
            mine[key] = tensor
    return file_of, mine


def _write_part(
    folder: Path, structure: Any, tensors: Mapping[str, Tensor], comm: Communicator, step: int
) -> dict[str, Written]:
    """This worker's files, with what the manifest says about them."""
    sync = partial(_sync, comm, step)
    names = f"part-{comm.rank}.safetensors", f"part-{comm.rank}.json"
    fail_at(comm.rank, step, "checkpoint.write")
    return {
        names[0]: write_tensors(folder / names[0], tensors, sync),
        names[1]: write_json(folder / names[1], structure, sync),
    }


def _commit(temporary: Path, final: Path, content: Mapping[str, Any], comm: Communicator, step: int) -> None:
    """All parts are written: from here on, it is a matter of names."""
    for name, (size, _) in content["manifest"]["files"].items():
        if (temporary / name).stat().st_size != size:
            raise OSError(0, "other workers' parts are not there: they need a folder that they share", str(name))
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


def _together(comm: Communicator, step: int, work: Callable[[], Any]) -> list[Any]:
    """Does a part of the work on all workers; what came of it on each.

    Raises:
        CheckpointError: it failed on one of them, on all.
    """
    outcome, problem = None, ""
    try:
        outcome = work()
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        problem = f"{error.strerror or error}{where}"
    answers = gather_json(comm, [outcome, problem])
    for rank, (_, told) in enumerate(answers):
        if told:
            raise CheckpointError(f"the checkpoint of step {step} could not be written by rank {rank}: {told}")
    return [outcome for outcome, _ in answers]
