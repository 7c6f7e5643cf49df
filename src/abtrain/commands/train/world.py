"""Reads the launcher's environment variables: which worker this process is, and where the workers meet."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from abtrain.errors import ConfigurationError
from abtrain.failpoints import ATTEMPT, RESTARTS

LAUNCH = "ABTRAIN_LAUNCH"
"""Identifies one start of our own launcher, with all its attempts."""
_MAX_COUNT = 10**6  # the largest number of workers or attempts; no launcher writes a larger one
_SET_BY = "start workers with torchrun, which sets it, or unset RANK and WORLD_SIZE to train without a launcher"


class WorldError(ConfigurationError):
    """A launcher's variables have impossible values. They differ between workers, so each worker reports its own."""


class World(NamedTuple):
    """The place of this process among the workers."""

    rank: int
    size: int
    local_rank: int


def is_joined() -> bool:
    """Whether a launcher has started this process as one of several workers."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_first() -> bool:
    """Whether this process is rank 0 or has no launcher. Does not check the variables."""
    return os.environ.get("RANK", "0") == "0"


def joined_world(at_master: bool = True) -> World:
    """Returns the place of this process among the launcher's workers.

    Args:
        at_master: whether workers meet at MASTER_ADDR and MASTER_PORT, which then must be set.

    Raises:
        WorldError: a variable has an impossible value.
    """
    check_world(at_master=at_master)
    return World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", "0")))


def local_size(default: int) -> int:
    """Returns the number of workers on this machine; `default` if the launcher does not say.

    Raises:
        WorldError: a variable has an impossible value.
    """
    check_world(at_master=False)
    return int(os.environ.get("LOCAL_WORLD_SIZE", default))


def is_restarted_by_torchrun() -> bool:
    """Whether torchrun starts workers again if one of them fails."""
    return os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"


def check_world(variables: Mapping[str, str] = os.environ, at_master: bool = True) -> None:
    """Checks the launcher's variables, none of which has to be set.

    Args:
        variables: values by name.
        at_master: as for `joined_world`.

    Raises:
        WorldError: lists every variable that has an impossible value.
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
        problems.append(f"MASTER_ADDR {state}, but must name the host where workers meet: {_SET_BY}")
    return problems


def _max_local_size(variables: Mapping[str, str]) -> int:
    return _number(variables.get("WORLD_SIZE", "")) or _MAX_COUNT


def _rank_problem(variables: Mapping[str, str], name: str, size: str, default: int) -> str:
    """Returns the problem of a rank, which must be below `size` if that is known, else below `default`."""
    known = _number(variables.get(size, ""))
    bound = f" (below {size})" if known else ""
    return _count_problem(variables, name, 0, (known or default) - 1, _SET_BY, bound)


def _count_problem(variables: Mapping[str, str], name: str, low: int, high: int, remedy: str, bound: str = "") -> str:
    """Returns the problem of a variable that must hold a whole number; empty if there is none or it is not set."""
    if name not in variables:
        return ""
    number = _number(variables[name])
    if number is not None and low <= number <= high:
        return ""
    return f"{name} is {variables[name]!r}, but must be a whole number from {low} to {high}{bound}: {remedy}"


def _number(text: str) -> int | None:
    """Parses plain digits. `int` would also accept signs, spaces and underscores, which no launcher writes."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 9 else None
