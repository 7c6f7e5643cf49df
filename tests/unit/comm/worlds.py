"""Every form of the contract, to be held to the same assertions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from abtrain.comm import Communicator, SingleProcess, run_in_process
from abtrain.comm.communicator import Scope
from tests.gloo import run_gloo


class World(NamedTuple):
    """A form of communicator and a topology to run workers on."""

    form: str
    world_size: int = 1
    group_size: int = 1

    def __str__(self) -> str:
        return f"{self.form}-{self.world_size}-by-{self.group_size}"

    def run(self, worker: Callable[..., Any], *args: Any) -> list[Any]:
        """The results of `worker(comm, *args)` in rank order. For Gloo it has to be picklable."""
        if self.form == "single":
            return [worker(SingleProcess(), *args)]
        if self.form == "threads":
            return run_in_process(self.world_size, lambda comm: worker(comm, *args), self.group_size)
        return run_gloo(self.world_size, worker, *args, group_size=self.group_size)


WORLDS = [
    World("single"),
    World("threads", 1, 1),
    World("threads", 2, 1),
    World("threads", 2, 2),
    World("threads", 3, 1),
    World("threads", 4, 2),
    World("gloo", 2, 1),
    World("gloo", 2, 2),
    World("gloo", 3, 1),
    World("gloo", 4, 2),
]

SCOPES: list[Scope] = ["world", "group"]


def peers(comm: Communicator, scope: Scope) -> tuple[int, ...]:
    """The ranks of a scope."""
    return comm.ranks(scope)
