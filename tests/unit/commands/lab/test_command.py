"""What `abtrain lab` shows while a job runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from abtrain.commands.lab import LabConfig, command
from abtrain.commands.lab.arguments import LabRequest
from abtrain.commands.lab.job import Job
from abtrain.errors import LabError


class TalkingLab:
    """A lab whose hosts print lines, until it breaks."""

    measured = ()

    def __init__(self, config: LabConfig) -> None:
        pass

    def __enter__(self) -> TalkingLab:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def run(self, job: Job, show: Callable[[int, str], None], check: bool) -> Any:
        for host, line in ((0, "step 1"), (1, ""), (0, "  "), (1, "step 2")):
            show(host, line)
        raise LabError("broken")


def test_empty_lines_of_hosts_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    request = LabRequest(LabConfig(), Job(("train.py",), tmp_path))
    monkeypatch.setattr(command, "parse_arguments", lambda arguments: request)
    monkeypatch.setattr(command, "Lab", TalkingLab)
    with pytest.raises(LabError, match="broken"):
        command.main([])
    assert capsys.readouterr().out == "host 0 | step 1\nhost 1 | step 2\n"
