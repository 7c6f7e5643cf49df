"""Reports at the end of a run how many tests of faults passed."""

from __future__ import annotations

import atexit
import sys

import pytest
from hypothesis import settings

# How long an example takes depends on who else works on the machine.
settings.register_profile("without deadline", deadline=None)
settings.load_profile("without deadline")

FOLDER = "tests/faults/"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts = {
        outcome: sum(
            report.nodeid.startswith(FOLDER) and (report.when == "call" or outcome == "error")
            for report in terminalreporter.getreports(outcome)
            if isinstance(report, pytest.TestReport)
        )
        for outcome in ("passed", "failed", "error")
    }
    total = sum(counts.values())
    skipped = sum(report.nodeid.startswith(FOLDER) for report in terminalreporter.getreports("skipped"))
    if total or skipped:
        note = f", {skipped} skipped" if skipped else ""
        terminalreporter.write_line(f"faults: {counts['passed']} of {total} ended as expected{note}")


def pytest_unconfigure() -> None:
    """Tests leave runs unfinished, which a user's program would be warned of at its end."""
    progress = sys.modules.get("abtrain.engine.progress")
    if progress is not None:
        atexit.unregister(progress.warn)
