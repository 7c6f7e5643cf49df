"""Validates a job of a lab, and builds the command line and the environment of each host."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from abtrain.commands.lab.config import LabConfig
from abtrain.commands.lab.faults import LabFault, fault_problems
from abtrain.commands.lab.network import INTERFACE

Launcher = Literal["torchrun", "python"]

LAUNCHER_FOLDER = ".torchrun"
"""The folder for torchrun's files, inside the job's folder. It exists while the job runs."""
_HOST_PROGRAM = "abtrain.commands.lab.host"
_PORT = "29500"  # torchrun's default; no other program uses the addresses of a lab
# torchrun checks its workers this often, so that hosts fail in the same order as their workers.
_MONITOR_SECONDS = "0.02"


@dataclass(frozen=True)
class Job:
    """A command that all hosts of a lab run.

    Attributes:
        command: a script, or -m and a module, followed by its arguments.
        out: the folder for lab.json and the output of each host. It is created if it does not exist.
        faults: the faults to inject while the job runs.
        launcher: the program that runs the command, `torchrun` or `python`. `python` runs it once on each host, with
            the host's number in the environment variable LAB_HOST.
        environment: the environment variables to set on all hosts.
        timeout: the seconds after which the job is stopped.
    """

    command: tuple[str, ...]
    out: Path
    faults: tuple[LabFault, ...] = ()
    launcher: Launcher = "torchrun"
    environment: Mapping[str, str] = field(default_factory=dict)
    timeout: float | None = None


def job_problems(job: Job, nodes: int) -> list[str]:
    """Returns a message for each problem of a job in a lab of `nodes` hosts; empty if there are none."""
    problems = [*_command_problems(job.command), *fault_problems(job.faults, nodes)]
    if job.timeout is not None and job.timeout <= 0:
        problems.append(f"--timeout {job.timeout:g} is too short: use a number of seconds above 0")
    try:
        if job.out.exists() and (not job.out.is_dir() or any(job.out.iterdir())):
            problems.append(f"--out {job.out} is not an empty folder: name one that is empty or does not exist yet")
    except OSError as error:
        problems.append(f"--out {job.out} cannot be read: {error}. Name another folder")
    return problems


def host_command(job: Job, config: LabConfig, host: int) -> list[str]:
    """Returns the command line of one host."""
    if job.launcher == "python":
        return [sys.executable, *job.command]
    torchrun = {
        "--nnodes": str(config.nodes),
        "--node-rank": str(host),
        "--nproc-per-node": str(config.workers_per_node),
        "--master-addr": config.address(0),
        "--master-port": _PORT,
        "--local-addr": config.address(host),
        "--monitor-interval": _MONITOR_SECONDS,
        # By default torchrun creates a temporary folder that it never removes.
        "--log-dir": str(job.out / LAUNCHER_FOLDER),
    }
    settings = [part for setting in torchrun.items() for part in setting]
    return [sys.executable, "-m", _HOST_PROGRAM, str(os.getpid()), *settings, *job.command]


def host_environment(job: Job, host: int) -> dict[str, str]:
    """Returns the environment variables of the command of one host."""
    return {
        # torchrun sets this too, because workers that each use all cores slow each other down.
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",  # shows output immediately
        # Hosts have no names, and PyTorch would warn about that at every connection.
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        **os.environ,
        "GLOO_SOCKET_IFNAME": INTERFACE,
        # NCCL would see that the hosts are one machine, and go round the links or refuse to share a GPU.
        "CUDA_VISIBLE_DEVICES": "",
        "LAB_HOST": str(host),
        **job.environment,
    }


def _command_problems(command: tuple[str, ...]) -> list[str]:
    if not command:
        return ["there is no command: give one after --, such as -- train.py --steps 100, or -- -m MODULE"]
    first = command[0]
    if first == "-m":
        if len(command) == 1:
            return ["-m needs a module: give one, such as -- -m abtrain train ddp"]
        return (
            [] if _is_module(command[1]) else [f"module {command[1]!r} is not found: name one that Python can import"]
        )
    if first.startswith("-"):
        return [f"command {first!r} is not a script: begin the command with a Python file, or with -m MODULE"]
    if not Path(first).is_file():
        return [f"script {first!r} is not in {Path.cwd()}: name a Python file, or use -m MODULE"]
    return []


def _is_module(name: str) -> bool:
    # Like `python -m`, this also searches the current folder.
    before = list(sys.path)
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
    finally:
        sys.path[:] = before
