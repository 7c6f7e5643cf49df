"""Scripts with torchrun's variables, on forked workers: each of torchrun's own would import torch, for seconds."""

from __future__ import annotations

import os
import runpy
import socket
import sys
from pathlib import Path

from tests import forks


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def joining(rank: int, workers: int, port: int) -> dict[str, str]:
    """The variables by which a launcher tells a worker where to go."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    size = str(workers)
    return {"RANK": str(rank), "WORLD_SIZE": size, "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": size, **place}


def run_script(workers: int, script: Path, *arguments: str, cwd: Path, seconds: float = 200) -> str:
    """Runs a script on so many workers. Returns what they print, in rank order.

    A submodule that a script forgets to import may be there all the same.
    """
    port = free_port()
    environments = [{**joining(rank, workers, port), "TORCHELASTIC_RUN_ID": "tests"} for rank in range(workers)]
    outputs = [cwd / f".output-{rank}" for rank in range(workers)]
    processes = [
        forks.context().Process(target=_work, args=(script, arguments, cwd, variables, output), daemon=True)
        for variables, output in zip(environments, outputs, strict=True)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
        process.kill()
        process.join()
    shown = "".join(output.read_text() for output in outputs)
    assert [process.exitcode for process in processes] == [0] * workers, shown
    return shown


def _work(script: Path, arguments: tuple[str, ...], cwd: Path, variables: dict[str, str], output: Path) -> None:
    os.chdir(cwd)
    written = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for descriptor in (1, 2):
        os.dup2(written, descriptor)
    os.environ.update(variables)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
