"""Workers that train alone agree on the step to stop at."""

import threading
import time
from collections.abc import Callable
from typing import cast

import pytest
from torch.distributed import HashStore, Store  # type: ignore[attr-defined]

from abtrain.comm import Communicator, run_in_process
from abtrain.commands.train import stopping
from abtrain.commands.train.stopping import StopVote


def stopped_at(workers: list[Callable[[StopVote], int]]) -> list[int]:
    """Runs each worker on a thread; returns the steps at which they stop."""
    store, ended = HashStore(), [0] * len(workers)

    def run(rank: int) -> None:
        ended[rank] = workers[rank](StopVote(store, len(workers)))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(workers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return ended


def training(pause: float, asked_at: int | None, steps: int = 100_000) -> Callable[[StopVote], int]:
    def worker(part: StopVote) -> int:
        for step in range(steps):
            number = part.agreed(15 if asked_at is not None and step >= asked_at else 0, step)
            if number:
                assert number == 15
                return step
            time.sleep(pause)
        return -1

    return worker


def test_all_stop_at_the_step_of_the_foremost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_LOOK_SECONDS", 0.1)
    slow, fast = training(0.01, asked_at=20), training(0.001, asked_at=None)
    first, second, third = stopped_at([slow, fast, fast])
    assert first == second == third > 20


def test_one_who_cannot_answer_lets_the_others_train_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits at a merge, and answers once it is too late."""
    monkeypatch.setattr(stopping, "_PATIENCE_SECONDS", 0.5)

    def waiting(part: StopVote) -> int:
        time.sleep(2.5)
        return training(0.001, None, steps=50)(part)

    assert stopped_at([training(0.001, asked_at=5, steps=600), waiting]) == [-1, -1]


def test_who_waits_at_a_merge_is_not_waited_for() -> None:
    """It has said that it would, so the others train on at once."""
    store = HashStore()
    ahead, behind = StopVote(store, 2), StopVote(store, 2)
    ahead.before_step(waits=True, hides=False)
    began = time.monotonic()
    assert behind.agreed(15, 7) == 0
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("asked", [0, 1])
def test_workers_of_a_group_find_out_at_the_same_step(asked: int) -> None:
    store = HashStore()

    def worker(comm: Communicator) -> list[int]:
        vote = StopVote(store, 2, comm)
        return [vote.agreed(0, 5), vote.agreed(15 if comm.rank == asked else 0, 6)]

    assert run_in_process(2, worker, group_size=2) == [[0, 15]] * 2


def test_only_the_first_worker_of_a_group_uses_the_store() -> None:
    """The store is on one machine, so the bytes to it should not grow with the workers of the others."""
    store, unused = HashStore(), cast(Store, object())

    def worker(comm: Communicator) -> list[int]:
        vote = StopVote(unused if comm.rank else store, 2, comm)
        vote.before_step(waits=True, hides=False)
        return [vote.agreed(0, step) for step in range(3)]

    assert run_in_process(2, worker, group_size=2) == [[0, 0, 0]] * 2
