"""Finds and removes the network namespaces of labs and the processes in them.

The name of a namespace is abtrain-NAME-PID-START-PART. PID and START are the id and the start time of the process
that created it. They show whether a lab's process has ended.

A process may leave its namespace, and a namespace may lose its name while processes run in it. For this reason, the
commands of hosts and all processes that they start also have an environment variable with the namespace's name.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from abtrain.errors import LabError

Result = TypeVar("Result")

FOLDER = Path("/run/netns")
MARK = "ABTRAIN_LAB_NAMESPACE"
"""The environment variable with the name of the namespace in which a host's command was started."""
_PATTERN = re.compile(r"(?P<lab>abtrain-[a-z0-9]+-(?P<pid>\d+)-(?P<start>\d+))-(?:switch|host\d+)")
_VARIABLE = re.compile(rf"(?:^|\0){MARK}=([^\0]*)".encode())
_CLONE_NEWNET = 0x40000000
_REMOVAL_SECONDS = 10.0


def lab_prefix(name: str) -> str:
    """Returns the prefix of all namespaces of the lab `name` in this process."""
    return f"abtrain-{name}-{os.getpid()}-{_start_time(os.getpid())}"


def of_lab(prefix: str) -> list[str]:
    """Returns the names of the existing namespaces of a lab."""
    return [name for name in _all() if name.startswith(f"{prefix}-")]


def dead_labs() -> list[str]:
    """Returns the prefixes of labs whose process has ended, but whose namespaces or processes still exist."""
    found = {}
    for name in (*_all(), *_marks().values()):
        parts = _PATTERN.fullmatch(name)
        if parts is not None:
            found[parts["lab"]] = _start_time(int(parts["pid"])) == int(parts["start"])
    return sorted(prefix for prefix, alive in found.items() if not alive)


def remove_lab(prefix: str) -> None:
    """Removes the namespaces of a lab, and kills the processes in them and all processes that its commands started.

    Several processes may remove the same lab at the same time.

    Raises:
        LabError: a namespace cannot be removed.
    """
    deadline = time.monotonic() + _REMOVAL_SECONDS
    reason = "its processes do not end"
    while names := sorted({name for name in (*_all(), *_marks().values()) if name.startswith(f"{prefix}-")}):
        kill_all(names)
        for name in of_lab(prefix):
            reason = subprocess.run(["ip", "netns", "delete", name], capture_output=True, text=True).stderr or reason
        if time.monotonic() > deadline:
            raise LabError(f"namespace {names[0]} cannot be removed: {reason.strip()}. Try `abtrain lab --clean`")


def kill_all(names: Iterable[str]) -> None:
    """Kills the processes of these namespaces, including frozen ones, and waits until they have ended."""
    names = list(names)
    deadline = time.monotonic() + _REMOVAL_SECONDS
    while time.monotonic() < deadline and signal_all(names, signal.SIGKILL):
        time.sleep(0.01)


def signal_all(names: Iterable[str], number: signal.Signals) -> list[int]:
    """Sends a signal to all processes of these namespaces, and returns the ids of the processes."""
    reached = processes_in(names)
    for pid in reached:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    return reached


def processes_in(names: Iterable[str]) -> list[int]:
    """Returns the ids of the processes in these namespaces, and of all processes that their commands have started.

    Zombies, which have ended but still wait for their parent, are not included.
    """
    names = set(names)
    wanted = set()
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            wanted.add(_identity(FOLDER / name))
    found = {pid for pid, mark in _marks().items() if mark in names}
    for entry in _processes():
        with contextlib.suppress(OSError):
            if _identity(entry / "ns/net") in wanted:
                found.add(int(entry.name))
    return sorted(found)


def inside(name: str, act: Callable[[], Result]) -> Result:
    """Calls `act` inside a namespace and returns its result. Only a new thread enters the namespace for this.

    Sockets and files of /proc that `act` opens still belong to the namespace after the call.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def move_and_act() -> None:
        try:
            _move_to(name)
            results.append(act())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=move_and_act)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _move_to(name: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(FOLDER / name, os.O_RDONLY)
    try:
        if libc.setns(descriptor, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter namespace {name}")
    finally:
        os.close(descriptor)


def _identity(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_dev, state.st_ino


def _marks() -> dict[int, str]:
    """Returns the value of the variable `MARK` for each process that has it, by process id."""
    found = {}
    for entry in _processes():
        with contextlib.suppress(OSError):
            mark = _VARIABLE.search((entry / "environ").read_bytes())
            if mark is not None:
                found[int(entry.name)] = mark[1].decode(errors="replace")
    return found


def _processes() -> list[Path]:
    return [entry for entry in Path("/proc").iterdir() if entry.name.isdecimal()]


def _all() -> list[str]:
    try:
        return sorted(path.name for path in FOLDER.iterdir())
    except FileNotFoundError:
        return []


def _start_time(pid: int) -> int | None:
    """Returns the start time of a process in ticks since the machine booted, or None if the process has ended."""
    try:
        # The name of the program, in parentheses, may contain anything; the fields after it are numbers.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, start = fields[0], int(fields[19])
    return None if state in "ZX" else start
