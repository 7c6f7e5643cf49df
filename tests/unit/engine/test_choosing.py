"""Runs whose recipe is completed by what they measure."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch.nn.functional as F
from torch.optim import LBFGS, SGD, Optimizer

from abtrain import ABTraining, recipes, weights_digest
from abtrain.comm.communicator import Communicator
from abtrain.comm.in_process import run_in_process
from abtrain.engine import choosing
from abtrain.errors import CheckpointError
from tests.cases import batch, build

STEPS = 100
SLOW, FAST = 1e-3, 1e-12
"""Seconds for each byte."""


@pytest.fixture(autouse=True)
def steps_of_50_ms(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = WeakKeyDictionary[choosing.Choosing, Iterator[float]]()
    monkeypatch.setattr(
        choosing.Choosing, "_now", lambda self: next(clocks.setdefault(self, itertools.count(step=0.05)))
    )


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "reduce_seconds", lambda comm, most: (SLOW * (1 + comm.rank), 1e-4))


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "reduce_seconds", lambda comm, most: (FAST, 1e-9))


class Loop:
    """A worker with its model, its optimizer and its batches."""

    def __init__(self, comm: Communicator, state: Mapping[str, Any] | None = None) -> None:
        self.model, self.rank = build("mlp"), comm.rank
        self.optimizer: Optimizer = SGD(self.model.parameters(), 0.05, momentum=0.9)
        self.ab = ABTraining(self.model, self.optimizer, recipes.auto(STEPS), communicator=comm)
        if state is not None:
            self.ab.load_state_dict(state)

    def run(self, until: int = STEPS) -> Loop:
        while self.ab.steps_done < until:
            x, y = batch("mlp", self.rank, self.ab.steps_done)
            F.cross_entropy(self.ab(x), y).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.ab.step()
        return self

    @property
    def digest(self) -> str:
        return weights_digest(self.ab.dense_state_dict())


def test_all_workers_follow_the_choice_of_the_slowest(slow: None) -> None:
    def work(comm: Communicator) -> tuple[int | None, str, str]:
        loop = Loop(comm)
        left = loop.run(3).ab.recipe.chooses_at
        return left, repr(loop.run().ab.recipe.cycle), loop.digest

    ends = run_in_process(3, work)
    assert len(set(ends)) == 1 and ends[0][0] == 10
    assert "every=6, " in ends[0][1] and "delay=3" in ends[0][1]


def test_a_fast_link_leads_to_data_parallel_training(fast: None) -> None:
    def work(comm: Communicator) -> tuple[bool, str]:
        loop = Loop(comm).run()
        return loop.ab.recipe.cycle[0].shares_gradients, loop.digest

    ends = run_in_process(2, work)
    assert ends[0] == ends[1] and ends[0][0]


def test_cpus_do_not_hide_gradients_behind_their_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    # 15 ms of each step of 50 ms.
    monkeypatch.setattr(choosing, "reduce_seconds", lambda comm, most: (0.015 / most, 1e-9))
    ends = run_in_process(2, lambda comm: Loop(comm).run().ab.recipe.cycle[0].shares_gradients)
    assert ends == [False, False]


def in_turns_slow(rank: int) -> Iterator[float]:
    """The time at the beginning and the end of steps of 50 and 150 ms."""
    now = 0.0
    for step in itertools.count():
        yield now
        now += 0.15 if (step + rank) % 2 else 0.05
        yield now


def test_workers_that_are_slow_in_turns_wait_for_each_other_seldom(fast: None, monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = WeakKeyDictionary[choosing.Choosing, Iterator[float]]()
    monkeypatch.setattr(
        choosing.Choosing, "_now", lambda self: next(clocks.setdefault(self, in_turns_slow(self._comm.rank)))
    )
    ends = run_in_process(2, lambda comm: repr(Loop(comm).run().ab.recipe.cycle))
    assert ends[0] == ends[1] and "every=6, " in ends[0]


def test_real_links_are_measured() -> None:
    ends = run_in_process(2, lambda comm: repr(Loop(comm).run().ab.recipe))
    assert ends[0] == ends[1] and "choice=None" in ends[0]


@pytest.mark.parametrize("stop", [7, 10, 17])
def test_a_resumed_run_measures_nothing_that_was_measured(
    stop: int, slow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_in_process(2, lambda comm: Loop(comm).run().digest)
    states = run_in_process(2, lambda comm: copy.deepcopy(Loop(comm).run(stop).ab.state_dict()))
    if stop >= 10:
        monkeypatch.setattr(choosing, "reduce_seconds", None)
    assert run_in_process(2, lambda comm: Loop(comm, states[comm.rank]).run().digest) == whole


@pytest.mark.parametrize(
    "damage", [{"every": 0}, {"every": 20}, {"every": "x", "wire": 3, "delay": None}, {"other": 1}]
)
def test_a_damaged_choice_is_refused(damage: dict[str, Any], slow: None) -> None:
    states = run_in_process(2, lambda comm: copy.deepcopy(Loop(comm).run(17).ab.state_dict()))
    for state in states:
        state["chosen"] = damage
    with pytest.raises(CheckpointError, match="belongs to another recipe"):
        run_in_process(2, lambda comm: Loop(comm, states[comm.rank]))


def test_what_cannot_share_gradients_merges(fast: None) -> None:
    def work(comm: Communicator) -> bool:
        model = build("mlp")
        optimizer = LBFGS(model.parameters(), 0.01, max_iter=1)
        ab = ABTraining(model, optimizer, recipes.auto(STEPS), communicator=comm)
        while ab.steps_done < 10:
            x, y = batch("mlp", comm.rank, ab.steps_done)

            def closure() -> Any:
                optimizer.zero_grad()
                loss = F.cross_entropy(ab(x), y)  # noqa: B023  called at once
                loss.backward()
                return loss

            optimizer.step(closure)
            ab.step()
        chosen = ab.recipe.cycle[0].rounds is not None
        ab.close()
        return chosen

    assert all(run_in_process(2, work))


def test_one_worker_trains_alone() -> None:
    ends = run_in_process(1, lambda comm: Loop(comm).run().ab.recipe.cycle[0].shares_gradients)
    assert ends == [True]
