"""Stops all workers at the same step if any of them receives a request to stop.

Workers learn of a request from a number that they all-reduce whenever they communicate. If the next merge is many steps
away, they agree on a step through the store instead (`StopVote`).
"""

from __future__ import annotations

import contextlib
import signal
import time
from types import FrameType, TracebackType

import torch
from torch.distributed import Store  # type: ignore[attr-defined]

from abtrain.comm.communicator import Communicator, Pending
from abtrain.commands.process import PASSED_ON, SIGNALS, Requests
from abtrain.consistency.agreement import largest
from abtrain.errors import StoppedError

_LOOK_SECONDS = 2.0
_MAX_STEPS_AHEAD = 1000
_PATIENCE_SECONDS, _HIDDEN_PATIENCE_SECONDS = 10.0, 2.0
"""The seconds for which a worker waits for the votes of the others. The second value is for steps that overlap with a
hidden merge, because another worker may then be waiting for this one."""
_PAUSE_SECONDS = 0.02
_REQUEST, _COUNT, _VERDICT, _MEETINGS = "asked", "count", "verdict", "meetings"
_GO, _TOO_LATE = "go", "too late"


class Stopping:
    """Stops all workers together at a request, inside this context. A second request stops this worker immediately.

    Every worker enters the context before any worker starts to train. Otherwise a signal could end one worker while the
    others train, and the others could not write a checkpoint.

    Args:
        comm: the communicator of this worker.
        store: a store that all workers can reach; without one they agree only when they communicate.
    """

    def __init__(self, comm: Communicator, store: Store | None = None) -> None:
        self._comm = comm
        self._vote = None if store is None else _vote_of(comm, store)
        self._requests = Requests()
        self._handlers = contextlib.ExitStack()
        self._hidden_until: int | None = None
        self._under_way: tuple[torch.Tensor, Pending[None]] | None = None

    def __enter__(self) -> Stopping:
        self._handlers.enter_context(self._requests.handled_by(self._note, (*SIGNALS, PASSED_ON)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handlers.close()

    def before_step(self, step: int, waits: bool, hidden: int) -> None:
        """Announces in the store that this worker is about to wait for workers that may be at an earlier step.

        The other workers may be waiting for this worker's vote. The announcement tells them that it cannot vote.

        Args:
            step: the next step. It belongs to a phase in which workers do not share gradients.
            waits: whether all workers wait for each other in this step: at a merge, a checkpoint, a validation, or the
                end of the run.
            hidden: the number of steps for which a hidden merge continues after the step in which it begins.
        """
        if self._vote is None or self._comm.topology.world_size == 1:
            return
        # A resumed run may begin with a merge under way.
        if waits or self._hidden_until is None:
            self._hidden_until = step + hidden
        self._vote.before_step(waits, hides=step <= self._hidden_until)

    def agreed(self, meets: bool, wait: bool) -> int:
        """Returns the signal number of a request, the same on all workers; 0 if there is none. Collective if `meets`.

        Args:
            meets: whether workers communicate at this step. A new answer is requested only then.
            wait: whether to wait for the newest answer. Otherwise the result is the answer of the last step at which
                workers communicated, or 0 if they do not communicate at this step.
        """
        if self._comm.topology.world_size == 1:
            return self._requests.number
        if not meets:
            return self._answer() if wait else 0
        answer = self._answer()
        number = torch.tensor([self._requests.number], dtype=torch.int32, device=self._comm.device)
        self._under_way = number, self._comm.launch_all_reduce(number, "max")
        return answer or (self._answer() if wait else 0)

    def agreed_between(self, step: int) -> int:
        """Returns the signal number of a request if all workers stop at this step; 0 otherwise.

        It serves steps between merges. Workers do not communicate there, so they vote through the store.

        Args:
            step: the number of steps that this worker has done.
        """
        if self._comm.topology.world_size == 1:
            return self._requests.number
        return 0 if self._vote is None else self._vote.agreed(self._requests.number, step)

    def _answer(self) -> int:
        if self._under_way is None:
            return 0
        number, pending = self._under_way
        self._under_way = None
        pending.wait()
        return int(number.item())

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._requests.note(number):
            raise StoppedError(f"stopped at once on a second request ({signal.Signals(number).name})")


def _vote_of(comm: Communicator, store: Store) -> StopVote:
    return StopVote(store, comm.topology.world_size, comm if comm.topology.group_size > 1 else None)


class StopVote:
    """Lets workers agree on a step at which all stop, before they communicate again at the next merge.

    A worker that receives a request announces it in the store. All workers read the store about every two seconds,
    which is a few bytes on slow links. A worker that finds a request writes its step and waits until all have done so.
    All workers then train up to the largest step and stop there. A worker that already waits at a merge cannot vote. In
    this case all workers stop at the merge.

    Workers of a group share gradients, so a worker that waits for votes also blocks its group at the next step. All
    workers of a group therefore agree at the same steps, and only the first of them reads the store.

    Args:
        store: a store that only this run uses.
        world_size: the number of workers.
        group: the communicator of this worker; None if it trains alone.
    """

    def __init__(self, store: Store, world_size: int, group: Communicator | None = None) -> None:
        self._store = store
        self._world_size = world_size
        self._group = group
        self._reads = group is None or group.topology.place_of(group.rank) == 0
        self._looked = time.monotonic()
        self._looked_at = self._next_look = -1
        self._meetings = 0
        self._patience = _PATIENCE_SECONDS
        self._number = 0
        self._target: int | None = None
        self._given_up = False

    def agreed(self, requested: int, step: int) -> int:
        """Returns the signal number of a request if all workers stop at this step; 0 otherwise.

        Args:
            requested: the signal number of a request to this worker; 0 if there is none.
            step: the number of steps that this worker has done.
        """
        if self._given_up:
            return 0
        if self._target is None and self._is_request_seen(requested, step):
            self._number = int(self._store.get(_REQUEST))
            self._target = self._settle(step)
            self._given_up = self._target is None
        return self._number if step == self._target else 0

    def before_step(self, waits: bool, hides: bool) -> None:
        """Announces whether this worker is about to wait for all others.

        Args:
            waits: whether it waits for them in the next step.
            hides: whether the next step overlaps with a hidden merge.
        """
        self._patience = _HIDDEN_PATIENCE_SECONDS if hides else _PATIENCE_SECONDS
        if waits:
            self._meetings += 1
        if waits and self._reads:
            self._store.set(_MEETINGS, str(self._meetings))

    def _is_request_seen(self, requested: int, step: int) -> bool:
        if self._group is not None:
            return self._is_request_seen_by(self._group, requested, step)
        now = time.monotonic()
        if not requested and now - self._looked < _LOOK_SECONDS:
            return False
        self._looked = now
        return self._is_announced(requested)

    def _is_request_seen_by(self, group: Communicator, requested: int, step: int) -> bool:
        if step < self._next_look:
            return False
        now = time.monotonic()
        # The number of steps that take about `_LOOK_SECONDS`.
        pace = (step - self._looked_at) / max(now - self._looked, 1e-6) if self._looked_at >= 0 else 0
        ahead = min(max(int(pace * _LOOK_SECONDS), 1), _MAX_STEPS_AHEAD)
        self._looked, self._looked_at = now, step
        mine = self._is_announced(requested) if self._reads or requested else False
        seen, self._next_look = largest(group, [int(mine), step + ahead], torch.int64, "group")
        return bool(seen)

    def _is_announced(self, requested: int) -> bool:
        """Whether the store has a request to stop. Writes this worker's own request to the store first."""
        if requested and not self._store.check([_REQUEST]):
            self._store.set(_REQUEST, str(requested))
        return bool(self._store.check([_REQUEST]))

    def _settle(self, step: int) -> int | None:
        """Votes, and returns the step at which all workers stop; None if not all workers vote."""
        place = self._store.add(_COUNT, 1)
        self._store.set(f"step/{place}", str(step))
        deadline = time.monotonic() + self._patience
        everyone = [f"step/{place}" for place in range(1, self._world_size + 1)]
        while not self._store.check([_VERDICT]):
            if self._store.check(everyone):
                self._decide(_GO)
            elif self._is_waited_for() or time.monotonic() > deadline:
                self._decide(_TOO_LATE)
            else:
                time.sleep(_PAUSE_SECONDS)
        if self._store.get(_VERDICT).decode() == _TOO_LATE:
            return None
        return max(int(self._store.get(key)) for key in everyone)

    def _is_waited_for(self) -> bool:
        """Whether another worker has announced that it waits for this worker, so that it cannot vote."""
        return bool(self._store.check([_MEETINGS])) and int(self._store.get(_MEETINGS)) > self._meetings

    def _decide(self, verdict: str) -> None:
        # The first verdict counts for all.
        self._store.compare_set(_VERDICT, "", verdict)
