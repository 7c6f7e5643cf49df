"""Every error that abtrain raises, each with the exit code of the command.

AbtrainError                 1
├── ConfigurationError       2   a setting, or how the library is called
│   └── UsageError           2   the training loop breaks a rule (a forgotten `ab.step()`, a step after the end)
├── DataError                3   data that is missing or cannot be read
├── CheckpointError          4   a checkpoint that is missing, incomplete or does not fit
├── RanksDisagreeError       5   workers that ought to agree do not
├── PeerLostError            6   a worker died, or did not answer in time
│   └── OutOfMemoryError     6   this worker has no memory left: to the others it is lost
├── NonFiniteError           7   NaN or infinity where a number is needed
├── LabError                 8   an emulated cluster that cannot be built, or is not as fast as it should be
│   └── HostFailedError          a command failed on a host of it; the exit code is the command's
└── StoppedError            75   stopped on request (sysexits' EX_TEMPFAIL: run again to go on)

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
    """One or more settings that cannot be. All of them are reported at once.

    Args:
        problems: one message, or one message a setting.
    """

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class UsageError(ConfigurationError):
    """The training loop calls abtrain in an order that cannot be right."""


class DataError(AbtrainError):
    """Data that is missing, incomplete or not what it says it is."""

    exit_code = 3


class CheckpointError(AbtrainError):
    """A checkpoint that is missing, incomplete, damaged or of another run."""

    exit_code = 4


class RanksDisagreeError(AbtrainError):
    """Workers hold different steps, phases or shapes where they ought to hold the same."""

    exit_code = 5


class PeerLostError(AbtrainError):
    """Another worker died or did not answer in time."""

    exit_code = 6


class OutOfMemoryError(PeerLostError):
    """This worker has no memory left."""


class NonFiniteError(AbtrainError):
    """NaN or infinity where training cannot go on with it."""

    exit_code = 7


class LabError(AbtrainError):
    """An emulated cluster that cannot be built, or whose links do not carry what they should."""

    exit_code = 8


class HostFailedError(LabError):
    """A command failed on a host of an emulated cluster.

    Args:
        message: which host, and how.
        exit_code: that of the command.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class StoppedError(AbtrainError):
    """The run was stopped on request."""

    exit_code = 75


def nearest(name: str, known: Iterable[str]) -> str:
    """The remedy for an unknown name: the nearest known one if there is one, and all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(names)}"


OnNonFinite = Literal["stop", "drop_worker", "skip"]
"""A policy for NaN and infinity: stop, leave a worker out of a merge, or leave steps out."""
