"""How workers that train alone agree on the step at which all stop, without waiting for the next merge."""

from __future__ import annotations

import time

from torch.distributed import Store  # type: ignore[attr-defined]

_LOOK_SECONDS = 1.0
_MOST_STEPS_AHEAD = 1000
_PATIENCE_SECONDS, _HIDDEN_PATIENCE_SECONDS = 10.0, 2.0
"""Of a worker that has stopped to wait for the others' answers. The second one holds while a merge is hidden behind
steps, in any of which another worker may wait for this one."""
_PAUSE_SECONDS = 0.02
_ASKED, _COUNT, _VERDICT, _MEETINGS = "asked", "count", "verdict", "meetings"
_GO, _TOO_LATE = "go", "too late"


class Between:
    """One worker's part in it.

    Whoever is asked to stop says so in the store. Every worker that reads it there writes down its step and waits until
    all have; the largest of these steps is the one to stop at, which the others still have to come to. A worker that
    waits at a merge for those who wait here cannot answer: then all train on, and stop where they meet.

    Workers of a group share gradients, so one that waits here holds up the others at their next step. They look into
    the store at the same steps, and the first one there decides for all of them what they see.

    Args:
        store: of this run alone.
        world_size: workers that look into it.
        group: the name of this worker's group; None if it trains alone.
    """

    def __init__(self, store: Store, world_size: int, group: str | None = None) -> None:
        self._store = store
        self._world_size = world_size
        self._group = group
        self._looked = time.monotonic()
        self._looked_at = self._next_look = -1
        self._meetings = 0
        self._patience = _PATIENCE_SECONDS
        self._number = 0
        self._target: int | None = None
        self._given_up = False

    def agreed(self, asked: int, step: int) -> int:
        """The signal by which a worker was asked to stop, if this is the step to stop at; else 0.

        Args:
            asked: the signal by which this worker was; 0 if it was not.
            step: how many steps this worker has done.
        """
        if self._given_up:
            return 0
        if self._target is None and self._was_asked(asked, step):
            self._number = int(self._store.get(_ASKED))
            self._target = self._settle(step)
            self._given_up = self._target is None
        return self._number if step == self._target else 0

    def before_step(self, waits: bool, hides: bool) -> None:
        """A step begins.

        Args:
            waits: whether this worker is about to wait for all others, at a merge or a checkpoint.
            hides: whether a merge is hidden behind the step.
        """
        self._patience = _HIDDEN_PATIENCE_SECONDS if hides else _PATIENCE_SECONDS
        if waits:
            self._meetings += 1
            self._store.set(_MEETINGS, str(self._meetings))

    def _was_asked(self, asked: int, step: int) -> bool:
        if self._group is not None:
            return self._group_was_asked(self._group, asked, step)
        now = time.monotonic()
        if not asked and now - self._looked < _LOOK_SECONDS:
            return False
        self._looked = now
        return self._is_asked(asked)

    def _group_was_asked(self, group: str, asked: int, step: int) -> bool:
        if step < self._next_look:
            return False
        now = time.monotonic()
        # As many steps as take about as long as workers go without a look.
        pace = (step - self._looked_at) / max(now - self._looked, 1e-6) if self._looked_at >= 0 else 0
        ahead = min(max(int(pace * _LOOK_SECONDS), 1), _MOST_STEPS_AHEAD)
        self._looked, self._looked_at = now, step
        mine = f"{int(self._is_asked(asked))} {step + ahead}"
        found, self._next_look = map(int, self._store.compare_set(f"look/{group}/{step}", "", mine).split())
        return bool(found)

    def _is_asked(self, asked: int) -> bool:
        if asked and not self._store.check([_ASKED]):
            self._store.set(_ASKED, str(asked))
        return bool(self._store.check([_ASKED]))

    def _settle(self, step: int) -> int | None:
        """The step to stop at; None where not all answer."""
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
        """Whether another worker has come to where it waits for this one."""
        return bool(self._store.check([_MEETINGS])) and int(self._store.get(_MEETINGS)) > self._meetings

    def _decide(self, verdict: str) -> None:
        # Of several the first one counts, for all.
        self._store.compare_set(_VERDICT, "", verdict)
