"""Injects faults for tests: makes a worker fail at a named point of the code.

    ABTRAIN_FAULTS="kill 1 12 merge.begin; ENOSPC 0 20 checkpoint.write"

kills rank 1 at the point `merge.begin` of step 12, and makes rank 0 find a full disk at step 20. `*` means any step.
If a launcher restarts the run, `|` separates the faults of the first start from those of the first restart, and so on.

Actions: `kill` (SIGKILL), `freeze` (SIGSTOP), `term`, `int` and `hup` (these signals), `slow` (sleeps for a second),
`memory` (allocates beyond a limit), `fail` (a RuntimeError), and names of system errors, such as ENOSPC (an OSError).

Points: `sync.begin` (before a forward pass whose gradients are averaged), `sync.end` (before the optimizer's step),
`step` (`ABTraining.step` begins; STEP counts the steps done before), `merge.begin`, `merge.agreed` (the workers' states
have been compared; nothing is averaged yet), `merge.end`, `checkpoint.prepare`, `checkpoint.write`, `checkpoint.fsync`,
`checkpoint.manifest`, `checkpoint.rename`, `checkpoint.replace` (the step has a checkpoint) and `checkpoint.prune`.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Iterator
from typing import NamedTuple

from abtrain.errors import ConfigurationError, nearest

VARIABLE = "ABTRAIN_FAULTS"
ATTEMPT = "ABTRAIN_ATTEMPT"
"""The environment variable in which abtrain's launcher counts restarts."""
RESTARTS = "TORCHELASTIC_RESTART_COUNT"
"""The environment variable in which torchrun counts restarts."""
_SIGNALS = {"kill": "SIGKILL", "freeze": "SIGSTOP", "term": "SIGTERM", "int": "SIGINT", "hup": "SIGHUP"}
_ACTIONS = (*_SIGNALS, "slow", "memory", "fail")
POINTS = (
    *("sync.begin", "sync.end", "step", "merge.begin", "merge.agreed", "merge.end"),
    *(f"checkpoint.{point}" for point in ("prepare", "write", "fsync", "manifest", "rename", "replace", "prune")),
)
_FORM = "ACTION RANK STEP POINT, as in 'kill 1 12 merge.begin'; STEP may be *"


class Fault(NamedTuple):
    action: str
    rank: int
    step: int | None  # None: any step
    point: str


def parse(plan: str) -> list[Fault]:
    """Parses a plan of faults for one start of a run. Raises a ConfigurationError that lists every malformed fault."""
    parts = list(filter(None, map(str.strip, plan.split(";"))))
    problems = [f"{VARIABLE}: {part!r} cannot be read: {problem}" for part in parts for problem in _problems(part)]
    if problems:
        raise ConfigurationError(problems)
    words = [part.split() for part in parts]
    return [Fault(action, int(rank), None if step == "*" else int(step), point) for action, rank, step, point in words]


def _problems(part: str) -> Iterator[str]:
    words = part.split()
    if len(words) != 4:
        yield f"it has {len(words)} words, but a fault has 4: {_FORM}"
        return
    action, rank, step, point = words
    if action not in _ACTIONS and action not in errno.errorcode.values():
        yield f"unknown action {action!r}: {nearest(action, _ACTIONS)}, or a system error such as ENOSPC"
    if not _is_number(rank):
        yield f"rank {rank!r} is not a whole number of at least 0: {_FORM}"
    if step != "*" and not _is_number(step):
        yield f"step {step!r} is not a whole number of at least 0, or *: {_FORM}"
    if point not in POINTS:
        yield f"unknown point {point!r}: {nearest(point, POINTS)}"


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 18


_planned: list[Fault] = []
_unreadable: list[ConfigurationError] = []


def load() -> None:
    """Reads the faults for this start of the run from the environment. `check` raises any error found here."""
    _planned.clear()
    _unreadable.clear()
    text = os.environ.get(VARIABLE, "")
    try:
        if text.strip():
            _planned.extend(dict(enumerate(map(parse, text.split("|")))).get(attempt(), []))
    except ConfigurationError as error:
        _unreadable.append(error)


def check() -> None:
    """Raises a ConfigurationError if `load` could not read the faults in the environment."""
    if _unreadable:
        raise ConfigurationError(_unreadable[0].problems)


def attempt() -> int:
    """Returns how often this run was restarted. Raises ConfigurationError if a variable is not a whole number."""
    held = {name: os.environ.get(name, "0") for name in (RESTARTS, ATTEMPT)}
    wrong = [name for name, text in held.items() if not _is_number(text)]
    if wrong:
        raise ConfigurationError([f"{name} is {held[name]!r}, but must be a whole number: unset it" for name in wrong])
    return sum(map(int, held.values()))


load()


def fail_at(rank: int, step: int, point: str) -> None:
    """Makes this worker fail, once, if a fault is planned for its rank, this step and this named point of the code."""
    check()
    for fault in _planned:
        if (fault.rank, fault.point) == (rank, point) and fault.step in (None, step):
            _planned.remove(fault)
            _act(fault)
            return


def _act(fault: Fault) -> None:
    if fault.action in _SIGNALS:
        os.kill(os.getpid(), getattr(signal, _SIGNALS[fault.action]))
    elif fault.action == "slow":
        time.sleep(1)
    elif fault.action == "memory":
        import resource

        import torch

        limit = 2**40
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
        torch.empty(2 * limit, dtype=torch.uint8)
    elif hasattr(errno, fault.action):
        number = getattr(errno, fault.action)
        raise OSError(number, os.strerror(number), fault.point)
    else:
        raise RuntimeError(f"injected fault: {fault}")
