"""How workers that train alone agree on the step at which all stop, without waiting for the next merge."""

from __future__ import annotations

import time

from torch.distributed import Store  # type: ignore[attr-defined]

_LOOK_SECONDS = 1.0
_PATIENCE_SECONDS = 10.0
"""Of a worker that has stopped to wait for the others' answers. Who waits at a merge cannot answer."""
_PAUSE_SECONDS = 0.02
_ASKED, _COUNT, _VERDICT = "asked", "count", "verdict"
_GO, _TOO_LATE = "go", "too late"


class Between:
    """One worker's part in it.

    Whoever is asked to stop says so in the store. Every worker that reads it there writes down its step and waits until
    all have; the largest of these steps is the one to stop at, which the others still have to come to. If somebody does
    not answer in time, because it waits at the merge for those who wait here, all train on, and stop where they meet.

    Args:
        store: of this run alone.
        world_size: workers that look into it.
    """

    def __init__(self, store: Store, world_size: int) -> None:
        self._store = store
        self._world_size = world_size
        self._looked = time.monotonic()
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
        if self._target is None and self._was_asked(asked):
            self._target = self._settle(step)
            self._given_up = self._target is None
        return self._number if step == self._target else 0

    def _was_asked(self, asked: int) -> bool:
        now = time.monotonic()
        if not asked and now - self._looked < _LOOK_SECONDS:
            return False
        self._looked = now
        if asked and not self._store.check([_ASKED]):
            self._store.set(_ASKED, str(asked))
        if not self._store.check([_ASKED]):
            return False
        self._number = int(self._store.get(_ASKED))
        return True

    def _settle(self, step: int) -> int | None:
        """The step to stop at; None where not all answer."""
        place = self._store.add(_COUNT, 1)
        self._store.set(f"step/{place}", str(step))
        deadline = time.monotonic() + _PATIENCE_SECONDS
        everyone = [f"step/{place}" for place in range(1, self._world_size + 1)]
        while not self._store.check([_VERDICT]):
            if self._store.check(everyone):
                self._decide(_GO)
            elif time.monotonic() > deadline:
                self._decide(_TOO_LATE)
            else:
                time.sleep(_PAUSE_SECONDS)
        if self._store.get(_VERDICT).decode() == _TOO_LATE:
            return None
        return max(int(self._store.get(key)) for key in everyone)

    def _decide(self, verdict: str) -> None:
        # Of several the first one counts, for all.
        self._store.compare_set(_VERDICT, "", verdict)
