import os
import subprocess
import sys
from pathlib import Path

import pytest

from abtrain.commands.lab import namespaces

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


def test_labs_are_dead_once_their_process_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespaces, "FOLDER", tmp_path)
    own = namespaces.lab_prefix("lab")
    ended = subprocess.Popen(["true"])
    ended.wait()
    names = [
        f"{own}-switch",
        f"{own}-host0",
        f"abtrain-lab-{ended.pid}-123-host0",
        f"abtrain-lab-{ended.pid}-123-host12",
        # The number is in use again, by a process that started at another time.
        f"abtrain-x-{os.getpid()}-1-switch",
        "somebodys",
        f"somebodys-abtrain-lab-{ended.pid}-123-host0",
    ]
    for name in names:
        (tmp_path / name).touch()
    assert namespaces.dead_labs() == sorted([f"abtrain-lab-{ended.pid}-123", f"abtrain-x-{os.getpid()}-1"])
    assert namespaces.of_lab(own) == [f"{own}-host0", f"{own}-switch"]


def test_without_any_namespaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespaces, "FOLDER", tmp_path / "nowhere")
    assert namespaces.dead_labs() == []
    assert namespaces.processes_in(["abtrain-lab-1-1-host0"]) == []
