"""Defines all errors that abtrain raises, and the exit code of the `abtrain` command for each.

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
    """Is the base class of all errors that abtrain raises on purpose."""

    exit_code: int = 1


class ConfigurationError(AbtrainError):
    """Reports one or more invalid settings at once. `problems` is one message, or one for each setting."""

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class UsageError(ConfigurationError):
    """Reports invalid use of abtrain by the training loop, such as a forgotten `ab.step()` or a step after the end."""


class DataError(AbtrainError):
    """Reports that training data is missing, incomplete or malformed."""

    exit_code = 3


class CheckpointError(AbtrainError):
    """Reports that a checkpoint is missing, incomplete or damaged, or that it belongs to another run."""

    exit_code = 4


class RanksDisagreeError(AbtrainError):
    """Reports that workers differ in their step, phase, shapes or weights, which must be equal."""

    exit_code = 5


class PeerLostError(AbtrainError):
    """Reports that another worker died or did not answer in time."""

    exit_code = 6


class OutOfMemoryError(PeerLostError):
    """Reports that this worker ran out of memory. The other workers raise PeerLostError."""


class NonFiniteError(AbtrainError):
    """Reports a NaN or an infinity, after which training cannot continue."""

    exit_code = 7


class LabError(AbtrainError):
    """Reports that an emulated cluster cannot be built, or that a link does not reach the rate set for it."""

    exit_code = 8


class HostFailedError(LabError):
    """Reports that a command failed on a host of an emulated cluster. `exit_code` is that of the command."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class StoppedError(AbtrainError):
    """Reports that a command was stopped on request, such as by a signal."""

    exit_code = 75


def a_or_an(noun: str) -> str:
    """Returns a noun, such as the name of a class, with its indefinite article."""
    # Most names with U, such as UserDict, begin with a consonant.
    return f"{'an' if noun[:1].lower() in tuple('aeio') else 'a'} {noun}"


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns a hint for an unknown name: the most similar known name, if there is one, and all known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(names)}"


OnNonFinite = Literal["stop", "drop_worker", "skip"]
"""The reaction to NaN or infinity: stop the run, leave a worker out of the average, or skip optimizer steps."""
