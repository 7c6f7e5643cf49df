"""Labs that were killed together with their watchers: the next lab removes what is left, and nothing of living ones."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from abtrain.commands.lab import Job, Lab, LabConfig, clean, namespaces
from abtrain.errors import LabError
from tests.lab.test_lab_command import left_of, runs, start, start_sleepers, watcher_of

pytestmark = pytest.mark.alone

# Dies with its watcher once so many commands of Network.build have begun; the last of them may still be under way.
VICTIM = """
import os, signal, subprocess, sys
from abtrain.commands.lab import Lab, LabConfig, lab, network
left, run, start, watchers = int(sys.argv[1]), network._run, lab._start_watcher, []
def start_and_keep(prefix):
    watchers.append(start(prefix))
    return watchers[0]
def run_or_die(*command):
    global left
    if not left:
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.kill(watchers[0].pid, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    run(*command)
lab._start_watcher, network._run = start_and_keep, run_or_die
with Lab(LabConfig(nodes=1, name="victim", network="10.99.0.0/24")):
    print("complete", flush=True)
"""
# Starts a process that takes a network namespace of its own, where the lab's names do not reach.
LEAVER = """
import subprocess, time
subprocess.Popen(["unshare", "--net", "sleep", "600"], start_new_session=True, stdout=subprocess.DEVNULL)
print("asleep", flush=True)
time.sleep(SECONDS)
"""


def kill_with_watcher(process: "subprocess.Popen[str]") -> None:
    os.kill(watcher_of(process), signal.SIGKILL)
    process.kill()
    process.communicate()


def sleepers_of(mark: str) -> list[int]:
    """Processes that sleep for 600 s and were started by the commands of a lab."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if (entry / "cmdline").read_bytes() == b"sleep\x00600\x00" and mark.encode() in (
                entry / "environ"
            ).read_bytes():
                found.append(int(entry.name))
    return found


@pytest.fixture
def leavers(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """A lab with a process that has left its host's namespace."""
    (tmp_path / "leaver.py").write_text(LEAVER.replace("SECONDS", "600"))
    process = start("--nodes", "1", "--launcher", "python", "--out", "out", "--", "leaver.py", cwd=tmp_path)
    assert process.stdout is not None
    while "asleep" not in (line := process.stdout.readline()):
        assert line, process.communicate()[1]
    deadline = time.monotonic() + 10
    while not sleepers_of(f"abtrain-lab-{process.pid}-") and time.monotonic() < deadline:
        time.sleep(0.05)
    yield process
    if process.poll() is None:
        process.terminate()
        process.communicate()


@pytest.fixture
def litter() -> Iterator[Path]:
    """A name in the folder of namespaces, of a lab whose process has ended."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    namespaces.FOLDER.mkdir(exist_ok=True)
    path = namespaces.FOLDER / f"abtrain-lab-{ended.pid}-123-host0"
    yield path
    while subprocess.run(["umount", path], capture_output=True).returncode == 0:
        pass
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)


@pytest.mark.parametrize("step", [0, 1, 3, 5, 7, 8, 10, 12])
def test_killed_while_it_was_built(step: int, tmp_path: Path) -> None:
    victim = subprocess.Popen((sys.executable, "-c", VICTIM, str(step)), cwd=tmp_path, stdout=subprocess.PIPE)
    said, _ = victim.communicate()
    assert victim.returncode == -signal.SIGKILL and said == b""
    time.sleep(0.3)  # in which the last command ends
    prefix = next(name for name in namespaces.dead_labs() if name.startswith(f"abtrain-victim-{victim.pid}-"))
    with Lab(LabConfig(nodes=1)):
        assert namespaces.of_lab(prefix) == []
    assert prefix not in namespaces.dead_labs()


@pytest.mark.parametrize("names", ["kept", "gone"])
def test_processes_that_have_left_or_whose_namespace_has_no_name(names: str, leavers: "subprocess.Popen[str]") -> None:
    process = leavers
    inside = namespaces.processes_in(left_of(process.pid))
    away = sleepers_of(f"abtrain-lab-{process.pid}-")
    assert len(away) == 1 and set(away) < set(inside)
    kill_with_watcher(process)
    if names == "gone":
        for name in left_of(process.pid):
            subprocess.run(["ip", "netns", "delete", name], check=True)
    assert all(runs(pid) for pid in away)
    with Lab(LabConfig(nodes=1)):
        assert not any(runs(pid) for pid in inside)
    assert left_of(process.pid) == []


def test_a_process_that_has_left_ends_with_the_job(tmp_path: Path) -> None:
    (tmp_path / "leaver.py").write_text(LEAVER.replace("SECONDS", "1"))
    with Lab(LabConfig(nodes=1)) as lab:
        lab.run(Job((str(tmp_path / "leaver.py"),), tmp_path / "out", launcher="python"))
        assert sleepers_of(f"abtrain-lab-{os.getpid()}-") == []


def test_a_living_lab_is_left_alone(tmp_path: Path) -> None:
    process = start_sleepers(tmp_path)
    try:
        names = left_of(process.pid)
        inside = namespaces.processes_in(names)
        assert not any(f"-{process.pid}-" in name for name in clean())
        with Lab(LabConfig(nodes=1)), Lab(LabConfig(nodes=1, name="second")):
            pass
        assert left_of(process.pid) == names and namespaces.processes_in(names) == inside
    finally:
        process.terminate()
        process.communicate()


@pytest.mark.parametrize("kind", ["a file", "a mount", "two mounts", "a frozen process"])
def test_names_that_are_left(kind: str, litter: Path) -> None:
    litter.touch()
    for _ in range({"a file": 0, "two mounts": 2}.get(kind, 1)):
        subprocess.run(["unshare", "--net", "mount", "--bind", "/proc/self/ns/net", litter], check=True)
    frozen = None
    if kind == "a frozen process":
        frozen = subprocess.Popen(["nsenter", f"--net={litter}", "sleep", "600"])
        time.sleep(0.2)
        frozen.send_signal(signal.SIGSTOP)
    assert clean().count(litter.name.rpartition("-")[0]) == 1
    assert not os.path.lexists(litter)
    assert frozen is None or frozen.wait(5) == -signal.SIGKILL


def test_leftovers_that_cannot_be_removed_do_not_prevent_a_lab(
    litter: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(namespaces, "_REMOVAL_SECONDS", 0.2)
    litter.mkdir()
    other = litter.with_name(litter.name.replace("-lab-", "-zzz-"))
    other.touch()
    with pytest.raises(LabError, match=f"{litter.name} cannot be removed"):
        clean()
    assert not other.exists()
    with Lab(LabConfig(nodes=1)):
        assert f"{litter.name} cannot be removed" in caplog.text


def test_torchrun_leaves_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    (tmp_path / "quick.py").write_text("print('done')\n")
    with Lab(LabConfig(nodes=1)) as lab:
        lab.run(Job((str(tmp_path / "quick.py"),), tmp_path / "out"))
    assert list(temporary.iterdir()) == []
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"lab.json", "host-0.log"}
