"""The map in docs/architecture.md is the one that the modules' docstrings make."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_map_is_up_to_date() -> None:
    ended = subprocess.run([sys.executable, ROOT / "docs" / "make_map.py", "--check"], check=False)
    assert ended.returncode == 0, "run python docs/make_map.py"
