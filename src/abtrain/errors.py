"""All errors that abtrain raises, with the command's exit code for each.

AbtrainError                 1
├── ConfigurationError       2
│   └── UsageError           2
├── DataError                3
├── CheckpointError          4
├── RanksDisagreeError       5
├── PeerLostError            6
│   └── OutOfMemoryError     6
├── NonFiniteError           7
├── LabError                 8
│   └── HostFailedError          the exit code of the command that failed
└── StoppedError            75   sysexits' EX_TEMPFAIL: the same command resumes the run

A message gives the value, the constraint that it breaks, and the remedy.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Literal


class AbtrainError(Exception):
    """Base of all errors that abtrain raises on purpose."""

    exit_code: int = 1


class ConfigurationError(AbtrainError):
    """One or more invalid settings, all reported at once: one message, or one for each setting."""

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class UsageError(ConfigurationError):
    """The training loop calls abtrain in an invalid order: a forgotten `ab.step()`, or a step after the end."""


class DataError(AbtrainError):
    """Data that is missing, incomplete or malformed."""

    exit_code = 3


class CheckpointError(AbtrainError):
    """A checkpoint that is missing, incomplete or damaged, or that belongs to another run."""

    exit_code = 4


class RanksDisagreeError(AbtrainError):
    """Workers differ in their step, phase, shapes or weights where they must be equal."""

    exit_code = 5


class PeerLostError(AbtrainError):
    """Another worker died or did not answer in time."""

    exit_code = 6


class OutOfMemoryError(PeerLostError):
    """This worker has run out of memory, so the other workers have lost a peer."""


class NonFiniteError(AbtrainError):
    """NaN or infinity with which training cannot continue."""

    exit_code = 7


class LabError(AbtrainError):
    """An emulated cluster that cannot be built, or whose links do not have the rate that was set."""

    exit_code = 8


class HostFailedError(LabError):
    """A command failed on a host of an emulated cluster, with this exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class StoppedError(AbtrainError):
    """The run was stopped on request."""

    exit_code = 75


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns the remedy for an unknown name: the most similar known name, if there is one, and all known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(names)}"


OnNonFinite = Literal["stop", "drop_worker", "skip"]
"""A policy for NaN and infinity: stop the run, drop a worker from a merge, or skip steps."""
