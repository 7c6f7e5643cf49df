"""A request to stop, which all workers obey at the same step: SIGTERM, SIGINT or SIGHUP, at any of them."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
from torch.distributed import Store  # type: ignore[attr-defined]

from abtrain.comm.communicator import Communicator, Pending
from abtrain.commands.train.requests import PASSED_ON, SIGNALS, Afterwards, Requests
from abtrain.commands.train.stop_vote import Between
from abtrain.errors import StoppedError


class Stopping:
    """Inside it, a request asks for a stop at the next step at which workers meet; a second one stops at once.

    Every worker enters it before any of them begins to train. A worker that a signal could still end at once, while
    others train, would cost them the checkpoint.

    Workers find out about each other's signals by a number that they add up where they meet anyway: at merges, and
    beside the gradients, hidden behind the next step. Where the next merge is far away, they agree on a step through
    the store, which they look into about once a second.

    Args:
        comm: of this worker.
        store: that all workers reach; None: they agree where they meet only.
    """

    def __init__(self, comm: Communicator, store: Store | None = None) -> None:
        self._comm = comm
        self._between = None if store is None else _between(store, comm)
        self._requests = Requests()
        self._before: dict[int, Any] = {}
        self._hidden_until: int | None = None
        self._under_way: tuple[torch.Tensor, Pending[None]] | None = None

    def __enter__(self) -> Stopping:
        # Only the main thread may set handlers, and only it is interrupted.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in (*SIGNALS, PASSED_ON)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            # The end takes a moment, in which the same request may come again by another way.
            signal.signal(number, Afterwards(self._requests, handler) if self._requests.number else handler)

    def before_step(self, step: int, waits: bool, hidden: int) -> None:
        """Says in the store where this worker is about to wait for workers that may be at an earlier step.

        They may wait there for it to agree on a stop, and learn by this that it cannot answer.

        Args:
            step: that comes next, of a phase in which workers train alone.
            waits: whether a merge or a checkpoint begins in it, or the run ends.
            hidden: how many steps a merge goes on after the one in which it begins.
        """
        if self._between is None or self._comm.topology.world_size == 1:
            return
        # Where a run goes on, a merge may be under way.
        if waits or self._hidden_until is None:
            self._hidden_until = step + hidden
        self._between.before_step(waits, hides=step <= self._hidden_until)

    def agreed(self, meets: bool, wait: bool) -> int:
        """The signal by which a worker was asked to stop, the same on all; 0 if none was. Collective where they meet.

        Args:
            meets: whether this is a step at which workers meet; where they do not, nothing new is asked.
            wait: for the newest answer; otherwise it is the one of the last meeting, and 0 where workers do not meet.
        """
        if self._comm.topology.world_size == 1:
            return self._requests.number
        if not meets:
            return self._answer() if wait else 0
        answer = self._answer()
        asked = torch.tensor([self._requests.number], dtype=torch.int32, device=self._comm.device)
        self._under_way = asked, self._comm.launch_all_reduce(asked, "max")
        return answer or (self._answer() if wait else 0)

    def agreed_between(self, step: int) -> int:
        """Likewise, amid a round, where workers do not meet. Stops within seconds, if all workers are amid that round.

        Args:
            step: how many steps this worker has done.
        """
        if self._comm.topology.world_size == 1:
            return self._requests.number
        return 0 if self._between is None else self._between.agreed(self._requests.number, step)

    def _answer(self) -> int:
        if self._under_way is None:
            return 0
        asked, pending = self._under_way
        self._under_way = None
        pending.wait()
        return int(asked.item())

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._requests.note(number):
            raise StoppedError(f"stopped at once on a second request ({signal.Signals(number).name})")


def _between(store: Store, comm: Communicator) -> Between:
    topology = comm.topology
    group = str(topology.group_of(comm.rank)) if topology.group_size > 1 else None
    return Between(store, topology.world_size, group)
