"""Runs every planned run once: a run whose result is recorded is not repeated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar


class Once(Protocol):
    """A run that can tell whether its result is recorded."""

    @property
    def done(self) -> bool:
        """Whether it was run to its end, with the settings that it has now."""


OnceT = TypeVar("OnceT", bound=Once)


def run_once(
    planned: Sequence[OnceT],
    runner: AbstractContextManager[Callable[[OnceT], object]],
    say: Callable[[str], object],
    in_short: Callable[[OnceT], str],
) -> None:
    """Runs what is not done, in order. What has finished stays done if this is stopped or fails.

    Args:
        planned: all runs, each once.
        runner: gives the function that runs one and records its result. It is entered only if a run is missing:
            building a lab or loading data takes time.
        say: prints a line.
        in_short: describes the result of a run, for the line that reports its end.
    """
    missing = [run for run in planned if not run.done]
    say(f"{len(planned)} runs, {len(planned) - len(missing)} of them done before")
    if not missing:
        return
    with runner as run_one:
        for number, run in enumerate(missing, 1):
            run_one(run)
            say(f"{number}/{len(missing)} {run}: {in_short(run)}")
