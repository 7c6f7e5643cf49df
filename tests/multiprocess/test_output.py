"""Commands whose output nobody reads to its end, as under `head`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from abtrain.commands.cli import COMMANDS
from abtrain.commands.process import UNREAD
from tests.faults.processes import start


def unread(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs the command with a pipe as standard output that is closed at the other end."""
    reader, writer = os.pipe()
    os.close(reader)
    left_out = ("RANK", "WORLD_SIZE", "PYTHONUNBUFFERED")
    variables = {name: value for name, value in os.environ.items() if name not in left_out}
    command = (sys.executable, "-m", "abtrain", *arguments)
    try:
        return subprocess.run(
            command, cwd=cwd, env=variables, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120
        )
    finally:
        os.close(writer)


@pytest.mark.parametrize("arguments", [("--help",), ("train", "--help"), ("recipes",)], ids=" ".join)
def test_a_command_ends_quietly_with_its_reader(arguments: tuple[str, ...], tmp_path: Path) -> None:
    ended = unread(*arguments, cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (UNREAD, "")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_training_goes_on_without_a_reader(workers: str, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    arguments = ("train", "ddp", "--steps", "4", "--workers", workers, "--out", "run")
    if workers == "1":
        real = unread(*arguments, cwd=tmp_path)
        code, said = real.returncode, real.stderr
    else:  # forked, without the imports of a launcher and its workers
        code, _, said = start(tmp_path, *arguments, read=False).wait()
    assert code == 0 and (tmp_path / "run" / "result.json").exists()
    told = [line for line in said.splitlines() if "display" in line]
    assert len(told) == 1 and "BrokenPipeError" in told[0] and "Traceback" not in said


@pytest.mark.parametrize("arguments", [("--help",), *((command, "--help") for command in COMMANDS)], ids=" ".join)
def test_help_does_not_wait_for_torch(arguments: tuple[str, ...]) -> None:
    program = (
        "import sys\n"
        "from abtrain.commands.cli import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "finally:\n"
        "    assert 'torch' not in sys.modules\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0 and ended.stdout.startswith("usage: abtrain"), ended.stderr
