"""Divides work with collectives into stages: a generator yields whenever a collective is under way.

The next stage waits for that collective and starts another one. The same code serves callers that wait at once and
callers that compute between stages. All collectives start in the caller's own thread, in the order of its calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from typing import Any, Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")
Stages = Generator[None, None, T]


def finish(stages: Stages[T]) -> T:
    """Runs all stages at once and returns their result."""
    try:
        while True:
            next(stages)
    except StopIteration as ended:
        result: T = ended.value
        return result


def timed(stages: Stages[T], clock: Callable[[], float]) -> Stages[tuple[T, float]]:
    """Runs stages, and returns their result and the time on `clock` that they took, without the time between stages."""
    seconds = -clock()
    while True:
        try:
            next(stages)
        except StopIteration as ended:
            return ended.value, seconds + clock()
        seconds += clock()
        yield
        seconds -= clock()


def together(first: Stages[T], second: Stages[U]) -> Stages[tuple[T, U]]:
    """Runs two generators stage by stage. In each stage, collectives of `first` start before those of `second`."""
    results = yield from in_step((first, second))
    return results[0], results[1]


def in_step(several: Sequence[Stages[Any]]) -> Stages[list[Any]]:
    """Runs generators stage by stage, in their order, and returns their results."""
    results: dict[int, Any] = {}
    running = dict(enumerate(several))
    while running:
        for place, stages in list(running.items()):
            try:
                next(stages)
            except StopIteration as ended:
                results[place] = ended.value
                del running[place]
        if running:
            yield
    return [results[place] for place in range(len(several))]


def begun(stages: Stages[T]) -> Callable[[], T]:
    """Runs the first stage. Returns a function that runs the others and returns the result."""
    try:
        next(stages)
    except StopIteration as ended:
        result: T = ended.value
        return lambda: result
    return lambda: finish(stages)


def stages_due(count: int, steps: int, passed: int) -> int:
    """Returns how many of `count` stages, spread over `steps` training steps, are due after `passed` of these steps.

    The first stage sends a few bytes and gets one step. The other stages share the remaining steps.
    """
    return count if passed >= steps else min(1, count - 1) + (count - 1) * (passed - 1) // (steps - 1)


class Background(Generic[T]):
    """Spreads stages over several training steps. The first one runs at once.

    All stages are done after `steps` calls of `advance`. `count` is the number of times that they yield. It sets the
    pace only: a wrong number reduces overlap, but changes no result.
    """

    def __init__(self, stages: Stages[T], count: int, steps: int) -> None:
        self._stages, self._count, self._steps = stages, count, steps
        self._passed, self._done = 0, -1
        self._ended = False
        self._run_to(0)

    def advance(self) -> bool:
        """Runs the stages that are due after one more training step. Returns whether all stages are done."""
        self._passed += 1
        due = stages_due(self._count, self._steps, self._passed)
        self._run_to(math.inf if self._passed >= self._steps else due)
        return self._ended

    def go_ahead(self, steps: int) -> bool:
        """Runs the stages that are due in the next `steps` steps now. Returns whether all collectives have started."""
        last = self._count - 1
        self._run_to(min(stages_due(self._count, self._steps, self._passed + steps), last))
        return self._ended or self._done >= last

    @property
    def progress(self) -> tuple[int, int]:
        """The numbers of steps that have passed and of stages that have run, not counting the first stage."""
        return self._passed, self._done

    def catch_up(self, passed: int, done: int) -> None:
        """Runs stages at once until `progress` has these two values."""
        self._run_to(done)
        self._passed = passed

    def finish(self) -> None:
        """Runs all remaining stages now."""
        self._run_to(math.inf)

    def _run_to(self, done: float) -> None:
        while self._done < done and not self._ended:
            self._ended = next(self._stages, "ended") == "ended"
            self._done += 1
