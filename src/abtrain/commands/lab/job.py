"""Jobs on the hosts of a lab, and how each host starts its part."""

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
"""In the job's folder, for torchrun's own files while the job runs."""
_HOST_PROGRAM = "abtrain.commands.lab.host"
_PORT = "29500"  # torchrun's own; a lab's addresses are its own, so nothing else is in the way
# torchrun looks for dead workers this often, so that hosts fail in the order in which their workers did.
_MONITOR_SECONDS = "0.02"


@dataclass(frozen=True)
class Job:
    """A command for all hosts of a lab.

    Attributes:
        command: a script, or -m and a module, with its arguments.
        out: folder for lab.json and the output of each host; made if it is not there.
        faults: what happens to hosts and links meanwhile.
        launcher: torchrun; or python: each host runs the command once, and finds its number in LAB_HOST.
        environment: variables to set on all hosts.
        timeout: seconds after which the command is ended.
    """

    command: tuple[str, ...]
    out: Path
    faults: tuple[LabFault, ...] = ()
    launcher: Launcher = "torchrun"
    environment: Mapping[str, str] = field(default_factory=dict)
    timeout: float | None = None


def job_problems(job: Job, nodes: int) -> list[str]:
    """Everything that is wrong with a job in a lab of so many hosts, a message each."""
    problems = [*_command_problems(job.command), *fault_problems(job.faults, nodes)]
    if job.timeout is not None and job.timeout <= 0:
        problems.append(f"a time-out of {job.timeout:g} s is no time: use more")
    try:
        if job.out.exists() and (not job.out.is_dir() or any(job.out.iterdir())):
            problems.append(f"--out {job.out} is in use: name a folder that is empty or does not exist yet")
    except OSError as error:
        problems.append(f"--out {job.out} cannot be looked into: {error}")
    return problems


def host_command(job: Job, config: LabConfig, host: int) -> list[str]:
    """The command line of one host."""
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
        # By default torchrun leaves a folder where all programs put their temporary files, and never removes it.
        "--log-dir": str(job.out / LAUNCHER_FOLDER),
    }
    settings = [part for setting in torchrun.items() for part in setting]
    return [sys.executable, "-m", _HOST_PROGRAM, str(os.getpid()), *settings, *job.command]


def host_environment(job: Job, host: int) -> dict[str, str]:
    """All variables of one host's command."""
    return {
        # As torchrun does: workers that each take all cores are slower together.
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",  # what a host prints is seen when it prints it
        # Hosts have no names, and PyTorch would warn of that with every connection.
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        **os.environ,
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "NCCL_SOCKET_IFNAME": INTERFACE,
        "LAB_HOST": str(host),
        **job.environment,
    }


def _command_problems(command: tuple[str, ...]) -> list[str]:
    if not command:
        return ["there is no command: give one behind --, such as -- train.py --steps 100, or -- -m MODULE"]
    first = command[0]
    if first == "-m":
        if len(command) == 1:
            return ["-m needs a module: give one, such as -- -m abtrain train ddp"]
        return [] if _is_module(command[1]) else [f"there is no module {command[1]!r}: name one that Python can import"]
    if first.startswith("-"):
        return [f"command {first!r} is no script: begin it with a script or with -m MODULE"]
    if not Path(first).is_file():
        return [f"there is no script {first!r} in {Path.cwd()}: name a Python file, or use -m MODULE"]
    return []


def _is_module(name: str) -> bool:
    # As `python -m` does, which looks into the folder that it is called in.
    before = list(sys.path)
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
    finally:
        sys.path[:] = before
