"""Checkpoints that cannot be written, that were damaged, and that were made to do harm."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from abtrain import failpoints as faults
from abtrain.checkpoint import files as saved_files
from abtrain.checkpoint import store as checkpoint
from abtrain.checkpoint import tidying
from abtrain.comm.checksums import digest
from abtrain.comm.communicator import Communicator, SingleProcess
from abtrain.comm.in_process import run_in_process
from abtrain.errors import CheckpointError
from tests.faults.loops import told

POINTS = ("prepare", "write", "fsync", "manifest", "rename", "prune")


def content(rank: int, step: int) -> dict[str, Any]:
    alike = torch.arange(12, dtype=torch.float32).view(3, 4) + step
    return {
        "step": step,
        "weights": {"a.weight": alike, "own": torch.full((2,), rank, dtype=torch.float64)},
        "odd": [
            torch.tensor(1 + 2j),
            torch.empty(0, 3),
            None,
            True,
            0.1,
            {"half": torch.ones(3, dtype=torch.bfloat16)},
            torch.tensor([1, 2**16 - 1], dtype=torch.uint16),
            torch.tensor([1, 2**64 - 1], dtype=torch.uint64),
            torch.tensor([0.5, -3.0]).to(torch.float8_e4m3fn),
            torch.tensor([0.5, -3.0]).to(torch.float8_e5m2),
        ],
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and digest(one) == digest(other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def save_alone(folder: Path, *steps: int) -> list[Path]:
    return [checkpoint.save(folder, step, content(0, step), SingleProcess(), keep=9) for step in steps]


def latest_step(folder: Path) -> int | None:
    saved = checkpoint.latest(folder, SingleProcess())
    return None if saved is None else saved.step


@pytest.mark.parametrize("workers", [1, 3])
def test_what_is_loaded_is_what_was_saved(workers: int, tmp_path: Path) -> None:
    def work(comm: Communicator) -> None:
        assert checkpoint.latest(tmp_path, comm) is None
        for step in (10, 20, 30):
            checkpoint.save(tmp_path, step, content(comm.rank, step), comm, keep=2)
        saved = checkpoint.latest(tmp_path, comm)
        assert saved is not None and saved.step == 30 and saved.workers == workers
        assert same(saved.states, [content(comm.rank, 30)])

    run_in_process(workers, work)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000000020", "step-000000000030"]
    sizes = [(tmp_path / "step-000000000030" / f"part-{rank}.safetensors").stat().st_size for rank in range(workers)]
    # Values equal on all workers are written once.
    assert all(size < sizes[0] for size in sizes[1:])


def test_another_number_of_workers_reads_all_parts_of_a_merge(tmp_path: Path) -> None:
    for step, resizable in ((1, True), (2, False)):
        run_in_process(
            3, lambda comm, s=step, r=resizable: checkpoint.save(tmp_path, s, content(comm.rank, s), comm, resizable=r)
        )
    loaded = run_in_process(2, lambda comm: checkpoint.latest(tmp_path, comm))
    for saved in loaded:
        assert saved is not None and saved.step == 1 and saved.workers == 3
        assert same(saved.states, [content(rank, 1) for rank in range(3)])


def test_a_run_that_has_gone_back_keeps_its_new_checkpoints(tmp_path: Path) -> None:
    """It drops those of later steps, which it has given up."""
    save_alone(tmp_path, 5, 6)
    checkpoint.save(tmp_path, 4, content(0, 4), SingleProcess(), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000000004"]


class Crash(BaseException):
    """As if the process had ended here."""


# One after another: two files are synced, and the manifest.
MOMENTS = ("prepare", "write", "fsync", "fsync", "manifest", "fsync", "rename", "prune", "prune")


@pytest.mark.parametrize("moment", range(len(MOMENTS)), ids=[f"{i} {point}" for i, point in enumerate(MOMENTS)])
def test_a_crash_at_any_moment_leaves_a_complete_checkpoint(
    moment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_alone(tmp_path, 1, 2)
    passed: list[str] = []

    def crash(rank: int, step: int, name: str) -> None:
        passed.append(name.removeprefix("checkpoint."))
        if len(passed) == moment + 1:
            raise Crash

    for module in (checkpoint, tidying):
        monkeypatch.setattr(module, "fail_at", crash)
    with pytest.raises(Crash):
        checkpoint.save(tmp_path, 3, content(0, 3), SingleProcess(), keep=1)
    monkeypatch.undo()
    assert tuple(passed) == MOMENTS[: moment + 1]
    assert latest_step(tmp_path) == (3 if MOMENTS[moment] == "prune" else 2)
    checkpoint.save(tmp_path, 4, content(0, 4), SingleProcess(), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000000004"]


@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
@pytest.mark.parametrize(("rank", "point"), [*((0, point) for point in POINTS), (1, "write"), (1, "fsync")])
def test_a_failing_disk_is_reported_by_all_workers_and_loses_nothing(
    error: str, rank: int, point: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(faults, "_planned", faults.parse(f"{error} {rank} 2 checkpoint.{point}"))
    why = os.strerror(getattr(errno, error))

    def work(comm: Communicator) -> str:
        checkpoint.save(tmp_path, 1, content(comm.rank, 1), comm, keep=1)
        try:
            checkpoint.save(tmp_path, 2, content(comm.rank, 2), comm, keep=1)
        except CheckpointError as told:
            return str(told)
        return ""

    told = run_in_process(2, work)
    step = 2 if point == "prune" else 1
    if point == "prune":
        assert told == ["", ""] and why in caplog.text
    else:
        assert len(set(told)) == 1 and f"by rank {rank}: {why}" in told[0]
        assert [path.name for path in tmp_path.iterdir()] == ["step-000000000001"]
    assert [saved and saved.step for saved in run_in_process(2, lambda comm: checkpoint.latest(tmp_path, comm))] == [
        step,
        step,
    ]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def zero_tail(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-16] + bytes(16))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replace_by_link(path: Path) -> None:
    target = path.parent.parent / "elsewhere"
    path.rename(target)
    path.symlink_to(target)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], None]] = {
    "bit-flipped": flip,
    "zero-tailed": zero_tail,
    "truncated": truncate,
    "empty": lambda path: os.truncate(path, 0),
    "missing": Path.unlink,
    "a link": replace_by_link,
    "a folder": replace_by_folder,
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path))[1],
}


@pytest.mark.parametrize(
    "swap", [os.replace, lambda new, path: (path.unlink(), path.symlink_to(new))], ids=["file", "link"]
)
def test_a_file_that_is_swapped_once_it_is_verified_is_not_read(
    swap: Callable[[Path, Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = tmp_path / "verified", tmp_path / "other"
    written = saved_files.write_tensors(path, {"a": torch.ones(3)}, lambda file: None)
    saved_files.write_tensors(other, {"a": torch.zeros(3)}, lambda file: None)
    open_verified = saved_files.safe_open

    def swap_before(*args: Any, **options: Any) -> Any:
        swap(other, path)
        return open_verified(*args, **options)

    monkeypatch.setattr(saved_files, "safe_open", swap_before)
    file = saved_files.open_tensors(path, written)
    # Descriptors are used again: by now another file has that of the one that was verified.
    with path.open("rb") as again:
        assert again.read()
        assert torch.equal(file.get_tensor("a"), torch.ones(3))


def test_a_file_that_cannot_be_opened_by_its_descriptor_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_descriptors(path: str, **options: Any) -> Any:
        raise FileNotFoundError(f"No such file or directory: {path}")

    save_alone(tmp_path, 1)
    monkeypatch.setattr(saved_files, "safe_open", no_descriptors)
    with pytest.raises(
        CheckpointError, match=r"cannot be opened through its descriptor: No such file or directory: /dev/fd/\d+"
    ):
        latest_step(tmp_path)


@pytest.mark.parametrize("name", ["manifest.json", "part-0.json", "part-0.safetensors"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_an_older_one_taken(
    damage: str, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older, newest = save_alone(tmp_path, 1, 2)
    DAMAGES[damage](newest / name)
    assert latest_step(tmp_path) == 1
    assert str(newest / name) in caplog.text
    DAMAGES[damage](older / name) if damage != "a link" else flip(older / name)
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints") as told:
        latest_step(tmp_path)
    assert told.value.exit_code == 4 and str(newest / name) in str(told.value)


@pytest.mark.parametrize("name", ["checkpoints_in", "read_manifest"])
def test_a_disk_that_cannot_be_read_by_one_worker_is_reported_by_all(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_in_process(2, lambda comm: checkpoint.save(tmp_path, 1, content(comm.rank, 1), comm))
    real, unread = getattr(checkpoint, name), [True]

    def failing(path: Path) -> Any:
        if unread.pop() if unread else False:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path)

    monkeypatch.setattr(checkpoint, name, failing)
    assert all("Input/output error" in str(error) for error in told(2, lambda comm: checkpoint.latest(tmp_path, comm)))


def test_an_extra_file_and_a_torn_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, second, third = save_alone(tmp_path, 1, 2, 3)
    (third / "extra.pkl").write_bytes(b"")
    (second / "manifest.json").unlink()
    (tmp_path / "step-000000000009").mkdir()
    (tmp_path / ".writing-step-000000000010").mkdir()
    assert latest_step(tmp_path) == 1
    assert (
        "extra.pkl is not listed in manifest.json" in caplog.text
        and "step-000000000009/manifest.json is missing" in caplog.text
    )


def test_damage_seen_by_one_worker_is_reported_by_all(tmp_path: Path) -> None:
    for step in (1, 2):
        run_in_process(2, lambda comm, s=step: checkpoint.save(tmp_path, s, content(comm.rank, s), comm))
    flip(tmp_path / "step-000000000002" / "part-1.json")
    assert [saved and saved.step for saved in run_in_process(2, lambda comm: checkpoint.latest(tmp_path, comm))] == [
        1,
        1,
    ]


def forge(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes a manifest as somebody would who can write to the folder: its digest fits."""
    body = json.loads((folder / "manifest.json").read_text())["manifest"]
    change(body)
    sha = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({"manifest": body, "sha256": sha}))


def put(folder: Path, name: str, data: bytes) -> None:
    """Replaces a file, and what the manifest says about it."""
    (folder / name).write_bytes(data)
    forge(folder, lambda body: body["files"].update({name: [len(data), hashlib.sha256(data).hexdigest()]}))


class Payload:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.abort, ()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda body: body["files"].update({"../part-0.json": [1, ""]}), "lists '../part-0.json'"),
        (lambda body: body["files"].update({"/etc/passwd": [1, ""]}), "lists '/etc/passwd'"),
        (lambda body: body["files"].update({"part-0.pkl": [1, ""]}), "lists 'part-0.pkl'"),
        (lambda body: body.update(workers=10**9), "workers is 1000000000, not a whole number from 1"),
        (lambda body: body.update(workers="1"), "workers is '1', not a whole number"),
        (lambda body: body.update(step=-1), "step is -1, not a whole number"),
        (lambda body: body.update(files=[]), "files is a list of length 0, not a dict"),
        (lambda body: body["files"].update({"part-0.json": "abc"}), "part-0.json is 'abc', not a list of length 2"),
        (lambda body: body["files"].pop("part-0.json"), "does not list part-0.json"),
        (lambda body: body.update(format=99), "format is 99"),
    ],
    ids=["parent", "absolute", "pickle", "workers", "type", "step", "files", "entry", "incomplete", "format"],
)
def test_a_manifest_that_was_forged(change: Callable[[dict[str, Any]], None], why: str, tmp_path: Path) -> None:
    (folder,) = save_alone(tmp_path, 1)
    forge(folder, change)
    with pytest.raises(CheckpointError, match=why):
        latest_step(tmp_path)


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("part-0.safetensors", pickle.dumps(Payload()), "claims a header of"),
        ("part-0.json", pickle.dumps(Payload()), "damaged"),
        ("part-0.safetensors", (10 * 2**30).to_bytes(8, "little") + bytes(64), "claims a header of 10737418240 bytes"),
        ("part-0.safetensors", (8).to_bytes(8, "little") + b"not json", "damaged"),
        ("part-0.json", b"[" * 10**6, "damaged"),
        ("part-0.json", b'{"x": {"$tensor": "x", "file": "/etc/passwd"}}', "not one of its files"),
        ("part-0.json", b'{"x": {"$tensor": "x", "file": "manifest.json"}}', "not one of its files"),
        ("part-0.json", b'{"x": {"$tensor": "missing", "file": "part-0.safetensors"}}', "malformed .*missing"),
        ("part-0.json", b'{"x": {"$tensor": []}}', "malformed"),
    ],
    ids=["pickle", "pickle-json", "10-GB-header", "header", "deep", "absolute", "other", "missing", "reference"],
)
def test_a_file_that_was_made_to_do_harm(name: str, data: bytes, why: str, tmp_path: Path) -> None:
    (folder,) = save_alone(tmp_path, 1)
    put(folder, name, data)
    with pytest.raises(CheckpointError, match=why):
        latest_step(tmp_path)


def test_a_json_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    (folder,) = save_alone(tmp_path, 1)
    os.truncate(folder / "part-0.json", 10 * 2**30)  # a hole: it takes no room
    with pytest.raises(CheckpointError, match="10737418240 bytes: at most"):
        latest_step(tmp_path)


def test_a_folder_that_is_a_link(tmp_path: Path) -> None:
    (folder,) = save_alone(tmp_path / "here", 1)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / folder.name).symlink_to(folder)
    with pytest.raises(CheckpointError, match="is not a folder"):
        latest_step(tmp_path / "there")


def test_an_unsaveable_value_is_reported_with_its_place(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    for state, why in (
        ({"a": {"b": [object()]}}, "a/b/0 is an object"),
        ({"a": {(1, b"2"): 2}}, r"a has the key b'2'"),
        ({"a": {"b": np.zeros(2)}}, "a/b is a ndarray, which cannot be saved: convert it with torch.from_numpy"),
        ({"a": torch.eye(2).to_sparse()}, "a is a torch.sparse_coo tensor"),
        ({"a": torch.zeros(2, device="meta")}, "a is a meta tensor"),
        ({"a": functools.reduce(lambda inner, _: [inner], range(300), 1)}, "more than 200 levels deep"),
        ({"a": 10**5000}, "a is a number with over 4000 digits: save it as a string"),
        ({"a": torch.zeros(2, dtype=torch.float8_e4m3fnuz)}, "torch.float8_e4m3fnuz, which .* one of float64, float32"),
    ):
        with pytest.raises(TypeError, match=why):
            checkpoint.save(tmp_path, 1, state, SingleProcess())
