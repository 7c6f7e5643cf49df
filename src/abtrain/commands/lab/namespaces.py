"""Network namespaces: their names, what runs in them, and how they are removed.

A namespace's name tells whose it is: abtrain-NAME-PID-START-PART, PID and START being the number and the start time of
the process that made it. A lab whose process is gone is known by that, whatever became of it.

A process may leave its namespace, and a namespace may lose its name while processes are in it. So the commands of
hosts, and all that they start, are known by a variable of their environment too.
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
"""The variable that names the namespace in which a host's command was started."""
_PATTERN = re.compile(r"(?P<lab>abtrain-[a-z0-9]+-(?P<pid>\d+)-(?P<start>\d+))-(?:switch|host\d+)")
_VARIABLE = re.compile(rf"(?:^|\0){MARK}=([^\0]*)".encode())
_CLONE_NEWNET = 0x40000000
_REMOVAL_SECONDS = 10.0


def lab_prefix(name: str) -> str:
    """Returns the prefix of all namespaces of this process's lab called `name`."""
    return f"abtrain-{name}-{os.getpid()}-{_start_time(os.getpid())}"


def of_lab(prefix: str) -> list[str]:
    """The namespaces of one lab that there are."""
    return [name for name in _all() if name.startswith(f"{prefix}-")]


def dead_labs() -> list[str]:
    """The prefixes of labs whose process is gone, and of which namespaces or processes are left."""
    found = {}
    for name in (*_all(), *_marks().values()):
        parts = _PATTERN.fullmatch(name)
        if parts is not None:
            found[parts["lab"]] = _start_time(int(parts["pid"])) == int(parts["start"])
    return sorted(prefix for prefix, alive in found.items() if not alive)


def remove_lab(prefix: str) -> None:
    """Removes a lab: its namespaces with all that is in them, and the processes that its commands have started.

    More than one may try.

    Raises:
        LabError: it cannot be removed.
    """
    deadline = time.monotonic() + _REMOVAL_SECONDS
    said = "its processes do not end"
    while names := sorted({name for name in (*_all(), *_marks().values()) if name.startswith(f"{prefix}-")}):
        kill_all(names)
        for name in of_lab(prefix):
            said = subprocess.run(["ip", "netns", "delete", name], capture_output=True, text=True).stderr or said
        if time.monotonic() > deadline:
            raise LabError(f"namespace {names[0]} cannot be removed: {said.strip()}: try `abtrain lab --clean`")


def kill_all(names: Iterable[str]) -> None:
    """Kills what runs in these namespaces or was started there, frozen or not, and waits until it is gone."""
    names = list(names)
    deadline = time.monotonic() + _REMOVAL_SECONDS
    while time.monotonic() < deadline and signal_all(names, signal.SIGKILL):
        time.sleep(0.01)


def signal_all(names: Iterable[str], number: signal.Signals) -> list[int]:
    """Sends a signal to everything that runs in these namespaces; returns the processes that got it."""
    reached = processes_in(names)
    for pid in reached:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    return reached


def processes_in(names: Iterable[str]) -> list[int]:
    """The processes in these namespaces, and those that a command started there has started, wherever they are now.

    Processes that have ended and await their parent are none.
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
    """Calls `act` in a namespace. Sockets and files of /proc that it opens stay there for good.

    A thread of its own moves there: the others of this process stay where they are.
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
    """By process, the namespace in which its host's command was started."""
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
    """When a process started, in ticks since the machine did; nothing if there is no such process."""
    try:
        # The name of the program, in parentheses, may hold anything; the fields behind it are numbers.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, start = fields[0], int(fields[19])
    return None if state in "ZX" else start
