"""Skips the tests of labs without root, Linux, iproute2 and a kernel that permits labs."""

from pathlib import Path

import pytest

from abtrain.commands.lab import Lab, LabConfig
from abtrain.commands.lab.config import system_problems
from abtrain.errors import AbtrainError


@pytest.fixture(scope="session")
def _lab_works() -> str:
    """Why labs cannot run here; empty if they can."""
    if problems := system_problems():
        return "; ".join(problems)
    try:
        with Lab(LabConfig(nodes=1)):
            return ""
    except AbtrainError as error:
        # Other errors are for the tests to find.
        return str(error) if "Operation not permitted" in str(error) or "not supported" in str(error) else ""


@pytest.fixture(autouse=True)
def _needs_lab(_lab_works: str) -> None:
    if _lab_works:
        pytest.skip(_lab_works)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """Path for the script that hosts run."""
    return tmp_path / "script.py"
