"""What a loop asks ABTraining about the model in training."""

from __future__ import annotations

import torch
from torch import nn

from abtrain import FixedRank, recipes
from abtrain.comm.communicator import Communicator, SingleProcess
from abtrain.comm.in_process import run_in_process
from tests.faults.loops import Loop

OUTER = recipes.ab_outer(12, every=4, warmup_steps=4, rank_rule=FixedRank(3))


def test_modes_are_those_of_the_model() -> None:
    ab = Loop(SingleProcess(), OUTER).ab
    for set_mode, training in ((ab.eval, False), (ab.train, True), (lambda: ab.train(False), False)):
        assert set_mode() is ab
        assert ab.module.training == training


def test_parameters_are_the_current_ones() -> None:
    loop = Loop(SingleProcess(), OUTER)
    assert list(map(id, loop.ab.parameters())) == list(map(id, loop.model.parameters()))
    loop.run(until=6)
    now = list(loop.ab.parameters())
    assert sorted(tuple(p.shape) for p in now if p.ndim == 2) == [(3, 5), (3, 10), (3, 12), (12, 3), (16, 3), (16, 3)]
    assert all(type(p) is nn.Parameter for p in now) and len(now) == 9
    held = {id(p) for group in loop.optimizer.param_groups for p in group["params"]}
    assert held == set(map(id, now))
    assert torch.nn.utils.parameters_to_vector(loop.ab.parameters()).numel() == sum(p.numel() for p in now)


def test_bytes_sent_are_those_of_this_worker() -> None:
    def work(comm: Communicator) -> tuple[list[int], int]:
        loop, sent = Loop(comm, OUTER), []
        while not loop.ab.finished:
            sent.append(loop.ab.bytes_sent)
            loop.step()
        return [*sent, loop.ab.bytes_sent], comm.meter.payload()["total"]

    sent, total = run_in_process(2, work)[0]
    assert sent == sorted(sent) and sent[2] == sent[3] < sent[4] and sent[-1] == total
    assert Loop(SingleProcess(), OUTER).ab.bytes_sent == 0


def test_a_description_totals_what_is_there_now() -> None:
    loop = Loop(SingleProcess(), OUTER)
    full = sum(p.numel() for p in loop.model.parameters())
    before = loop.ab.describe()
    assert before.parameters == {"factored": 0, "averaged": full, "frozen": 0}
    assert f"{full:,} parameters: 0 factored (0.00%)" in str(before)
    assert "averaged  may be factored (Linear, computed in factored form); dense now" in str(before)
    loop.run(until=6)
    now = loop.ab.describe()
    count = sum(p.numel() for p in loop.ab.parameters())
    assert now.parameters["factored"] == 16 * 10 + 12 * 16 + 5 * 12 and sum(now.parameters.values()) == full
    assert f"; with factors {count}, {full / count:.1f} : 1" in str(now) and "dense now" not in str(now)
