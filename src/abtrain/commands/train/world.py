"""Reads the launcher's variables: which worker this process is, and where the others are."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from abtrain.errors import ConfigurationError
from abtrain.failpoints import ATTEMPT, RESTARTS

_MOST = 10**6  # workers, and attempts; what is more is no number that a launcher wrote
_SET_BY = "start workers with torchrun, which sets it, or unset RANK and WORLD_SIZE to train without a launcher"


class WorldError(ConfigurationError):
    """Variables of a launcher that cannot be. They differ between workers, so each of them speaks for itself."""


class World(NamedTuple):
    """Which worker this process is."""

    rank: int
    size: int
    local_rank: int


def is_joined() -> bool:
    """Whether a launcher has started this process as one of several workers."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def joined_world(at_master: bool = True) -> World:
    """Which worker a launcher has started this process as.

    Args:
        at_master: whether workers meet where MASTER_ADDR and MASTER_PORT say.

    Raises:
        WorldError: variables that cannot be.
    """
    check_world(at_master=at_master)
    return World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", "0")))


def local_size(default: int) -> int:
    """Workers on this machine, as the launcher says; `default` if it says nothing.

    Raises:
        WorldError: variables that cannot be.
    """
    check_world()
    return int(os.environ.get("LOCAL_WORLD_SIZE", default))


def check_world(variables: Mapping[str, str] = os.environ, at_master: bool = True) -> None:
    """Makes sure that the variables of a launcher make sense; none need be set.

    Args:
        variables: by name.
        at_master: as for `joined_world`.

    Raises:
        WorldError: all of them that do not.
    """
    problems = [_count(variables, name, 0, _MOST, "unset it") for name in (RESTARTS, ATTEMPT)]
    problems.append(_count(variables, "LOCAL_WORLD_SIZE", 1, _most_here(variables), _SET_BY))
    given = [name for name in ("RANK", "WORLD_SIZE") if name in variables]
    if len(given) == 1:
        other = "WORLD_SIZE" if given == ["RANK"] else "RANK"
        problems.append(f"{given[0]} is {variables[given[0]]!r}, but {other} is not set: set both, or neither")
    if len(given) == 2:
        problems += _rank_problems(variables)
        problems += _master_problems(variables) if at_master else []
    found = [problem for problem in problems if problem]
    if found:
        raise WorldError(found)


def _rank_problems(variables: Mapping[str, str]) -> list[str]:
    return [
        _place(variables, "RANK", "WORLD_SIZE", _MOST),
        _count(variables, "WORLD_SIZE", 1, _MOST, _SET_BY),
        _place(variables, "LOCAL_RANK", "LOCAL_WORLD_SIZE", _most_here(variables)),
    ]


def _master_problems(variables: Mapping[str, str]) -> list[str]:
    problems = [_count(variables, "MASTER_PORT", 1, 2**16 - 1, _SET_BY, needed=True)]
    if not variables.get("MASTER_ADDR", "").strip():
        held = f"is {variables['MASTER_ADDR']!r}" if "MASTER_ADDR" in variables else "is not set"
        problems.append(f"MASTER_ADDR {held}, but must name the host where workers meet: {_SET_BY}")
    return problems


def _most_here(variables: Mapping[str, str]) -> int:
    """The most workers that a machine can have."""
    return _number(variables.get("WORLD_SIZE", "")) or _MOST


def _place(variables: Mapping[str, str], name: str, size: str, most: int) -> str:
    """Returns the problem of a rank, which counts from 0 and is below `size` if that is known."""
    known = _number(variables.get(size, ""))
    below = f" (below {size})" if known else ""
    return _count(variables, name, 0, (known or most) - 1, _SET_BY, below=below)


def _count(
    variables: Mapping[str, str],
    name: str,
    least: int,
    most: int,
    remedy: str,
    *,
    needed: bool = False,
    below: str = "",
) -> str:
    """Returns the problem of a variable that holds a whole number; empty if there is none."""
    if name not in variables:
        return f"{name} is not set, but must be a whole number from {least} to {most}: {remedy}" if needed else ""
    number = _number(variables[name])
    if number is not None and least <= number <= most:
        return ""
    return f"{name} is {variables[name]!r}, but must be a whole number from {least} to {most}{below}: {remedy}"


def _number(text: str) -> int | None:
    """A number in plain digits; anything else that `int` would take is no launcher's."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 9 else None
