"""Work in stages: at once, together, or spread over steps."""

from __future__ import annotations

import pytest

from abtrain.comm.stages import Background, Stages, finish, stages_due, timed, together


def counting(to: int, log: list[str], name: str = "") -> Stages[int]:
    for i in range(to):
        log.append(f"{name}{i}")
        yield
    return to


def test_all_at_once_and_together() -> None:
    log: list[str] = []
    assert finish(counting(3, log)) == 3
    assert finish(together(counting(2, log, "a"), counting(3, log, "b"))) == (2, 3)
    assert log == ["0", "1", "2", "a0", "b0", "a1", "b1", "b2"]


def test_only_the_time_in_stages_counts() -> None:
    now = [100.0]

    def working() -> Stages[str]:
        for seconds in (1.0, 2.0):
            now[0] += seconds
            yield
        now[0] += 4.0
        return "done"

    stages = timed(working(), lambda: now[0])
    for _ in range(2):
        next(stages)
        now[0] += 50.0
    assert finish(stages) == ("done", 7.0)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("steps", [1, 2, 4, 9])
def test_in_the_background_it_ends_with_the_last_step_and_not_before(count: int, steps: int) -> None:
    log: list[str] = []
    work = Background(counting(count, log), count, steps)
    assert log == ["0"]
    assert [work.advance() for _ in range(steps)] == [False] * (steps - 1) + [True]
    assert len(log) == count
    assert [stages_due(count, steps, p) for p in range(1, steps + 1)][-1] == count


def test_the_first_stage_gets_one_step_and_the_rest_share_the_others() -> None:
    assert [stages_due(3, 7, passed) for passed in range(1, 8)] == [1, 1, 1, 2, 2, 2, 3]
    assert [stages_due(2, 5, passed) for passed in range(1, 6)] == [1, 1, 1, 1, 2]


def test_what_is_left_can_be_done_at_once_and_errors_come_out() -> None:
    log: list[str] = []
    work = Background(counting(4, log), 4, 10)
    work.finish()
    assert len(log) == 4

    def breaks() -> Stages[None]:
        yield
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        Background(breaks(), 1, 1).advance()
