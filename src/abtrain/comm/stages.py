"""Work that is done in stages: a generator that yields whenever a collective is under way.

To go on with it is to wait for that collective and to start the next. So one piece of code serves a caller that waits
for everything at once and one that computes in between, and all collectives are started by the caller's own thread, in
an order that its calls decide.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")
Stages = Generator[None, None, T]


def finish(stages: Stages[T]) -> T:
    """Goes through all stages at once; what they return."""
    try:
        while True:
            next(stages)
    except StopIteration as ended:
        result: T = ended.value
        return result


def together(first: Stages[T], second: Stages[U]) -> Stages[tuple[T, U]]:
    """Both at once, the first one's collectives always started before the second one's."""
    results: dict[int, Any] = {}
    running: dict[int, Stages[Any]] = {0: first, 1: second}
    while running:
        for place, stages in list(running.items()):
            try:
                next(stages)
            except StopIteration as ended:
                results[place] = ended.value
                del running[place]
        if running:
            yield
    return results[0], results[1]


def stages_due(count: int, steps: int, passed: int) -> int:
    """How many of `count` stages, to be done in `steps` steps, are due after `passed` of them.

    The first stage, a few bytes, gets one step; the others share what is left.
    """
    return count if passed >= steps else min(1, count - 1) + (count - 1) * (passed - 1) // (steps - 1)


class Background(Generic[T]):
    """Stages that are spread over some steps of training. The first begins here and now.

    Args:
        stages: what to do.
        count: how often it yields; it is paced by this, so a wrong number costs overlap and nothing else.
        steps: after how many calls of `advance` it has to be done.
    """

    def __init__(self, stages: Stages[T], count: int, steps: int) -> None:
        self._stages = stages
        self._count = count
        self._steps = steps
        self._passed = self._done = 0
        self._ended = False
        self._next()

    def advance(self) -> bool:
        """One step has passed: as many stages as are due by now. True once all is done."""
        self._passed += 1
        due = stages_due(self._count, self._steps, self._passed)
        while not self._ended and (self._done < due or self._passed >= self._steps):
            self._next()
            self._done += 1
        return self._ended

    def go_ahead(self, steps: int) -> bool:
        """Begins now what would be begun in the next steps. True once all has begun, and is only to be waited for."""
        due = min(stages_due(self._count, self._steps, self._passed + steps), self._count - 1)
        while self._done < due:
            self._next()
            self._done += 1
        return self._done >= self._count - 1

    @property
    def progress(self) -> tuple[int, int]:
        """How many steps have passed, and how many stages were gone on with since the first."""
        return self._passed, self._done

    def catch_up(self, passed: int, done: int) -> None:
        """Goes on, at once, to where stages were that had this `progress`."""
        while self._done < done and not self._ended:
            self._next()
            self._done += 1
        self._passed = passed

    def finish(self) -> None:
        """All that is left, now."""
        while not self._ended:
            self._next()

    def _next(self) -> None:
        try:
            next(self._stages)
        except StopIteration:
            self._ended = True
