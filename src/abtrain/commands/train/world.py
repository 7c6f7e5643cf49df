"""Reads the rank of this process from the launcher's environment variables, and checks all of these variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from abtrain.errors import ConfigurationError
from abtrain.failpoints import ATTEMPT, RESTARTS

LAUNCH = "ABTRAIN_LAUNCH"
"""The environment variable with the name of one start of abtrain's launcher, shared by all its attempts."""
_MAX_COUNT = 10**6  # the largest number of workers or attempts; no launcher writes a larger one
_SET_BY = "start workers with torchrun, which sets it, or unset RANK and WORLD_SIZE to train without a launcher"


class WorldError(ConfigurationError):
    """The launcher's variables have invalid values. Values differ between workers, so each worker reports its own."""


class World(NamedTuple):
    """The rank of this process among all workers, their number, and its rank on this machine."""

    rank: int
    size: int
    local_rank: int


def is_joined() -> bool:
    """Whether a launcher has started this process as one of several workers."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_first() -> bool:
    """Whether this process is rank 0 or has no launcher. The values of the variables are not checked."""
    return os.environ.get("RANK", "0") == "0"


def joined_world(at_master: bool = True) -> World:
    """Returns the rank of this process among the launcher's workers, their number, and its rank on this machine.

    Args:
        at_master: whether workers connect through MASTER_ADDR and MASTER_PORT. If so, these variables must be set.

    Raises:
        WorldError: a variable has an invalid value.
    """
    check_world(at_master=at_master)
    return World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", "0")))


def local_size(default: int) -> int:
    """Returns the number of workers on this machine; `default` if the launcher does not set it.

    Raises:
        WorldError: a variable has an invalid value.
    """
    check_world(at_master=False)
    return int(os.environ.get("LOCAL_WORLD_SIZE", default))


def is_restarted_by_torchrun() -> bool:
    """Whether torchrun started this process and restarts all workers if one of them fails."""
    return os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"


def check_world(variables: Mapping[str, str] = os.environ, at_master: bool = True) -> None:
    """Checks the values of the launcher's variables. All of them may be missing.

    Args:
        variables: the values by name.
        at_master: whether MASTER_ADDR and MASTER_PORT must be set if RANK and WORLD_SIZE are.

    Raises:
        WorldError: at least one variable has an invalid value. The error lists all of these.
    """
    problems = [_count_problem(variables, name, 0, _MAX_COUNT, "unset it") for name in (RESTARTS, ATTEMPT)]
    problems.append(_count_problem(variables, "LOCAL_WORLD_SIZE", 1, _max_local_size(variables), _SET_BY))
    given = [name for name in ("RANK", "WORLD_SIZE") if name in variables]
    if len(given) == 1:
        other = "WORLD_SIZE" if given == ["RANK"] else "RANK"
        problems.append(f"{given[0]} is {variables[given[0]]!r}, but {other} is not set: set both, or neither")
    if len(given) == 2:
        problems += [
            _rank_problem(variables, "RANK", "WORLD_SIZE", _MAX_COUNT),
            _count_problem(variables, "WORLD_SIZE", 1, _MAX_COUNT, _SET_BY),
            _rank_problem(variables, "LOCAL_RANK", "LOCAL_WORLD_SIZE", _max_local_size(variables)),
        ]
        problems += _master_problems(variables) if at_master else []
    found = [problem for problem in problems if problem]
    if found:
        raise WorldError(found)


def _master_problems(variables: Mapping[str, str]) -> list[str]:
    problems = []
    if "MASTER_PORT" in variables:
        problems.append(_count_problem(variables, "MASTER_PORT", 1, 2**16 - 1, _SET_BY))
    else:
        problems.append(f"MASTER_PORT is not set, but must be a whole number from 1 to {2**16 - 1}: {_SET_BY}")
    if not variables.get("MASTER_ADDR", "").strip():
        state = f"is {variables['MASTER_ADDR']!r}" if "MASTER_ADDR" in variables else "is not set"
        problems.append(f"MASTER_ADDR {state}, but must name the host through which workers connect: {_SET_BY}")
    return problems


def _max_local_size(variables: Mapping[str, str]) -> int:
    return _number(variables.get("WORLD_SIZE", "")) or _MAX_COUNT


def _rank_problem(variables: Mapping[str, str], name: str, size: str, default: int) -> str:
    """Returns a message if a rank is not below the variable `size`, or below `default` if `size` is not set."""
    known = _number(variables.get(size, ""))
    bound = f" (below {size})" if known else ""
    return _count_problem(variables, name, 0, (known or default) - 1, _SET_BY, bound)


def _count_problem(variables: Mapping[str, str], name: str, low: int, high: int, remedy: str, bound: str = "") -> str:
    """Returns a message if a variable is not a whole number in range; empty if it is valid or not set."""
    if name not in variables:
        return ""
    number = _number(variables[name])
    if number is not None and low <= number <= high:
        return ""
    return f"{name} is {variables[name]!r}, but must be a whole number from {low} to {high}{bound}: {remedy}"


def _number(text: str) -> int | None:
    """Parses a number that has only digits. `int` would also accept signs, spaces and underscores."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 9 else None
