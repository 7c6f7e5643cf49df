"""Faults on demand: what happens to a worker at a named point of the code. For tests; nothing happens by itself.

    ABTRAIN_FAULTS="kill 1 12 merge.begin; ENOSPC 0 20 checkpoint.write"

kills rank 1 at the point `merge.begin` of step 12, and lets rank 0's disk be full at step 20. Step `*` is any step. Of
a run that is started again (see `attempt`), the first attempt has the faults before the first `|`, the second those
behind it, and so on.

Actions: `kill` (SIGKILL), `freeze` (SIGSTOP), `term` and `int` (the signals, at this worker), `slow` (it sleeps for a
second), `memory` (a limit leaves it no more of it), `fail` (a RuntimeError), and the names of system errors, such as
ENOSPC and EIO (an OSError).

Points: `sync.begin` and `sync.end` (before a forward pass whose gradients are shared, and before the optimizer steps by
them), `step` (`ABTraining.step` begins; STEP is how many are done), `merge.begin`, `merge.agreed` (all have proven that
they merge the same, nothing is averaged yet), `merge.end`, and `checkpoint.prepare`, `checkpoint.write`,
`checkpoint.fsync`, `checkpoint.manifest`, `checkpoint.rename`, `checkpoint.prune`.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from typing import NamedTuple

VARIABLE = "ABTRAIN_FAULTS"
ATTEMPT = "ABTRAIN_ATTEMPT"
"""How often our own launcher has started the workers again."""
_SIGNALS = {"kill": "SIGKILL", "freeze": "SIGSTOP", "term": "SIGTERM", "int": "SIGINT"}


class Fault(NamedTuple):
    """One thing that goes wrong. `step` None: at any step."""

    action: str
    rank: int
    step: int | None
    point: str


def parse(plan: str) -> list[Fault]:
    """The faults of a plan as the variable holds it.

    Raises:
        ValueError: a plan that cannot be read.
    """
    faults = []
    for line in filter(None, map(str.strip, plan.split(";"))):
        action, rank, step, point = line.split()
        faults.append(Fault(action, int(rank), None if step == "*" else int(step), point))
    return faults


_planned: list[Fault] = []


def load() -> None:
    """Plans what the variable says for this attempt."""
    plans = os.environ.get(VARIABLE, "").split("|")
    _planned[:] = parse(plans[attempt()]) if attempt() < len(plans) else []


def attempt() -> int:
    """How often the workers of this run have been started again, by torchrun or by our own launcher."""
    return sum(int(os.environ.get(name, "0")) for name in ("TORCHELASTIC_RESTART_COUNT", ATTEMPT))


load()


def fail_at(rank: int, step: int, point: str) -> None:
    """Lets happen what is planned for this place; usually nothing."""
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
