"""Files that are there whole or not at all."""

import json
import os
from pathlib import Path

import pytest

from abtrain.commands.files import FolderLock, write_json, write_whole
from abtrain.errors import ConfigurationError
from abtrain.files import replacing


def test_what_is_written_is_read_and_nothing_else_is_left(tmp_path: Path) -> None:
    write_whole(tmp_path / "a.txt", "é\n")
    write_json(tmp_path / "b.json", {"x": [1, 2.5]})
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "é\n"
    assert json.loads((tmp_path / "b.json").read_text()) == {"x": [1, 2.5]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.json"]


def test_a_disk_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "a.txt", "before")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "a.txt", "after")
    assert (tmp_path / "a.txt").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_numbers_that_json_does_not_have_become_null(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": [float("nan"), 1.5], "y": {"z": float("-inf")}, "out": Path("runs/a")})
    held = json.loads((tmp_path / "a.json").read_text())
    assert held == {"x": [None, 1.5], "y": {"z": None}, "out": "runs/a"}


def test_a_file_that_other_code_writes_replaces_the_former_one_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"before")
    with replacing(tmp_path / "a.bin") as partial:
        partial.write_bytes(b"after")
        assert (tmp_path / "a.bin").read_bytes() == b"before"
    assert (tmp_path / "a.bin").read_bytes() == b"after"
    with pytest.raises(RuntimeError, match="disk"), replacing(tmp_path / "a.bin") as partial:
        partial.write_bytes(b"half")
        raise RuntimeError("disk")
    with pytest.raises(OSError, match="No such file"), replacing(tmp_path / "nowhere" / "b"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"] and (tmp_path / "a.bin").read_bytes() == b"after"


def test_one_process_at_a_time_locks_a_folder(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path / ".lock")
    with pytest.raises(ConfigurationError, match="in use by another process"):
        FolderLock(tmp_path / ".lock")
    lock.release()
    assert list(tmp_path.iterdir()) == []
    FolderLock(tmp_path / ".lock").release()
    (tmp_path / "file").write_text("mine")
    (tmp_path / ".lock").symlink_to("file")
    with pytest.raises(OSError, match="not a regular file"):
        FolderLock(tmp_path / ".lock")
    assert (tmp_path / "file").read_text() == "mine"
