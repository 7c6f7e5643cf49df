"""Faults on demand: what happens to a worker at a named point of the code. For tests; nothing happens by itself.

    ABTRAIN_FAULTS="kill 1 12 merge.begin; ENOSPC 0 20 checkpoint.write"

kills rank 1 at the point `merge.begin` of step 12, and lets rank 0's disk be full at step 20. Step `*` is any step. Of
a run that is started again (see `attempt`), the first attempt has the faults before the first `|`, the second those
behind it, and so on.

Actions: `kill` (SIGKILL), `freeze` (SIGSTOP), `term`, `int` and `hup` (the signals, at this worker), `slow` (it sleeps
for a second), `memory` (a limit leaves it no more of it), `fail` (a RuntimeError), and the names of system errors, such
as ENOSPC and EIO (an OSError).

Points: `sync.begin` and `sync.end` (before a forward pass whose gradients are shared, and before the optimizer steps by
them), `step` (`ABTraining.step` begins; STEP is how many are done), `merge.begin`, `merge.agreed` (all have proven that
they merge the same, nothing is averaged yet), `merge.end`, and `checkpoint.prepare`, `checkpoint.write`,
`checkpoint.fsync`, `checkpoint.manifest`, `checkpoint.rename`, `checkpoint.replace` (of a step that is saved again),
`checkpoint.prune`.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from typing import NamedTuple

from abtrain.errors import ConfigurationError, nearest

VARIABLE = "ABTRAIN_FAULTS"
ATTEMPT = "ABTRAIN_ATTEMPT"
"""How often our own launcher has started the workers again."""
RESTARTS = "TORCHELASTIC_RESTART_COUNT"
"""How often torchrun has."""
_SIGNALS = {"kill": "SIGKILL", "freeze": "SIGSTOP", "term": "SIGTERM", "int": "SIGINT", "hup": "SIGHUP"}
ACTIONS = (*_SIGNALS, "slow", "memory", "fail")
"""Beside the names of system errors."""
POINTS = (
    *("sync.begin", "sync.end", "step", "merge.begin", "merge.agreed", "merge.end"),
    *(f"checkpoint.{point}" for point in ("prepare", "write", "fsync", "manifest", "rename", "replace", "prune")),
)
_FORM = "ACTION RANK STEP POINT, as in 'kill 1 12 merge.begin'; STEP may be *"


class Fault(NamedTuple):
    """One thing that goes wrong. `step` None: at any step."""

    action: str
    rank: int
    step: int | None
    point: str


def parse(plan: str) -> list[Fault]:
    """The faults of one attempt.

    Raises:
        ConfigurationError: every part of the plan that cannot be read.
    """
    parts = list(filter(None, map(str.strip, plan.split(";"))))
    problems = [problem for part in parts for problem in _part_problems(part)]
    if problems:
        raise ConfigurationError(problems)
    words = [part.split() for part in parts]
    return [Fault(action, int(rank), None if step == "*" else int(step), point) for action, rank, step, point in words]


def _part_problems(part: str) -> list[str]:
    where = f"{VARIABLE}: {part!r} cannot be read"
    words = part.split()
    if len(words) != 4:
        return [f"{where}: it has {len(words)} words, and a fault has 4: {_FORM}"]
    action, rank, step, point = words
    problems = []
    if action not in ACTIONS and action not in errno.errorcode.values():
        problems.append(f"{where}: unknown action {action!r}: {nearest(action, ACTIONS)}, or a system error as ENOSPC")
    if not _is_number(rank):
        problems.append(f"{where}: rank {rank!r} is not a whole number of at least 0: {_FORM}")
    if step != "*" and not _is_number(step):
        problems.append(f"{where}: step {step!r} is not a whole number of at least 0, or *: {_FORM}")
    if point not in POINTS:
        problems.append(f"{where}: unknown point {point!r}: {nearest(point, POINTS)}")
    return problems


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 18


_planned: list[Fault] = []
_unreadable: list[ConfigurationError] = []


def load() -> None:
    """Plans what the variable says for this attempt. What is wrong with it is told when the plan is used."""
    _planned.clear()
    _unreadable.clear()
    text = os.environ.get(VARIABLE, "")
    if not text.strip():
        return
    try:
        plans = [parse(plan) for plan in text.split("|")]
        _planned[:] = plans[attempt()] if attempt() < len(plans) else []
    except ConfigurationError as error:
        _unreadable.append(error)


def check() -> None:
    """Makes sure that the plan can be read.

    Raises:
        ConfigurationError: it cannot.
    """
    if _unreadable:
        raise ConfigurationError(_unreadable[0].problems)


def attempt() -> int:
    """How often the workers of this run have been started again, by torchrun or by our own launcher.

    Raises:
        ConfigurationError: the variables that say so hold no numbers.
    """
    held = {name: os.environ.get(name, "0") for name in (RESTARTS, ATTEMPT)}
    wrong = [
        f"{name} is {text!r}, but must be a whole number: unset it"
        for name, text in held.items()
        if not _is_number(text)
    ]
    if wrong:
        raise ConfigurationError(wrong)
    return sum(map(int, held.values()))


load()


def fail_at(rank: int, step: int, point: str) -> None:
    """Lets happen what is planned for this place; usually nothing.

    Raises:
        ConfigurationError: the plan cannot be read.
    """
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
        _exhaust_memory()
    elif hasattr(errno, fault.action):
        number = getattr(errno, fault.action)
        raise OSError(number, os.strerror(number), fault.point)
    else:
        raise RuntimeError(f"a fault was asked for: {fault}")


def _exhaust_memory() -> None:
    import resource

    import torch

    limit = 2**40
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    torch.empty(2 * limit, dtype=torch.uint8)
