"""Warnings of programs that have not set up logging begin with the library's name, as its other lines do."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

PROGRAM = "import logging, abtrain; {}logging.getLogger('abtrain').warning('%s is odd', 'this')"


@pytest.mark.parametrize(
    ("set_up", "said"),
    [("", "abtrain: this is odd\n"), ("logging.basicConfig(format='own: %(message)s'); ", "own: this is odd\n")],
)
def test_a_warning_is_shown_once_with_its_name(set_up: str, said: str) -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM.format(set_up)], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, said)


def test_a_logger_with_a_level_of_its_own_keeps_it(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("abtrain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "propagate", False)
        log.info("nobody asked for this")
        log.warning("look")
    assert capsys.readouterr().err == "abtrain: look\n"
