"""Mistakes of a first hour with abtrain: each ends in an error or a warning that names the remedy, and none is silent.

Further ones have their tests beside others of their kind: a replaced optimizer and LBFGS (`test_loops.py`), optimizers
that cannot be followed (`test_optimizers.py`), writes to factored weights (`test_dense_use.py`), names of options
(`tests/unit/recipes/test_options.py`) and a model in a wrapper (`tests/unit/engine/test_ab_training.py`).
"""

from __future__ import annotations

import contextlib
import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.optim import AdamW

from abtrain import ABTraining, FixedRank, recipes
from abtrain.comm.communicator import Communicator, SingleProcess
from abtrain.commands.train import worker
from abtrain.errors import ConfigurationError, PeerLostError, UsageError
from abtrain.recipes.recipe import Recipe
from tests.cases import batch, build, sgd
from tests.faults.loops import Loop, told
from tests.gloo import run_gloo

LOCAL = recipes.local_sgd(8, every=4)
FACTORED = recipes.ab_outer(20, every=4, warmup_steps=0, rank_rule=FixedRank(3))


def backward(ab: ABTraining) -> None:
    x, y = batch("mlp", ab.communicator.rank, ab.steps_done)
    F.cross_entropy(ab(x), y).backward()


# The optimizer.


@pytest.mark.parametrize("recipe", [LOCAL, FACTORED], ids=["dense", "factored"])
def test_an_optimizer_that_was_built_after_abtraining(recipe: Recipe) -> None:
    model = build("mlp")
    ab = ABTraining(model, sgd(model.parameters()), recipe)
    later = sgd(model.parameters())
    backward(ab)
    later.step()
    with pytest.raises(UsageError, match=r"no call to step\(\) of SGD.*optimizers that were passed to"):
        ab.step()


# The loop.


@pytest.mark.parametrize("workers", [1, 2])
def test_a_loop_that_is_left_as_it_was(workers: int) -> None:
    def work(comm: Communicator) -> None:
        loop = Loop(comm, LOCAL)
        for step in range(2):
            x, y = batch("mlp", comm.rank, step)
            loop.optimizer.zero_grad()
            F.cross_entropy(loop.model(x), y).backward()
            loop.optimizer.step()

    assert all("call ab(x) in place of model(x), ab.step() once after every" in str(e) for e in told(workers, work))


def test_a_loop_that_calls_the_model_itself() -> None:
    def work(comm: Communicator) -> None:
        loop = Loop(comm, LOCAL)
        F.cross_entropy(loop.model(batch("mlp", 0, 0)[0]), batch("mlp", 0, 0)[1]).backward()
        loop.optimizer.step()
        loop.ab.step()

    assert all("call ab(x) in place of model(x)" in str(e) for e in told(2, work))


@pytest.mark.parametrize("call", ["forward", "step"])
def test_more_steps_than_the_recipe_has(call: str) -> None:
    loop = Loop(SingleProcess(), LOCAL)
    loop.run()
    with pytest.raises(UsageError, match=r"ended after its 8 steps: stop the loop there, or .* larger total_steps"):
        backward(loop.ab) if call == "forward" else loop.ab.step()


# What is saved.


def test_model_and_run_survive_torch_save(tmp_path: Path) -> None:
    loop = Loop(SingleProcess(), FACTORED)
    loop.run(until=3)
    torch.save(loop.model.state_dict(), tmp_path / "model.pt")
    torch.save(loop.ab.state_dict(), tmp_path / "run.pt")
    plain, x = build("mlp", seed=1), batch("mlp", 0, 0)[0]
    plain.load_state_dict(torch.load(tmp_path / "model.pt"))
    torch.testing.assert_close(plain(x), loop.model(x))
    again = Loop(loop.comm, FACTORED, build("mlp", seed=1))
    again.ab.load_state_dict(torch.load(tmp_path / "run.pt"))
    assert all(torch.equal(one, other) for one, other in zip(again.run().values(), loop.run().values(), strict=True))


# Workers.


@pytest.mark.parametrize(("recipe", "end"), [("ddp", "barrier"), ("local_sgd", "barrier"), ("local_sgd", "destroy")])
def test_a_worker_with_fewer_batches(recipe: str, end: str) -> None:
    """It waits elsewhere or ends. The others end with exit code 6, at the latest after the time-out of their group."""
    code, message = run_gloo(2, _uneven, recipe, end, may_die={1})[0]
    assert code == 6
    assert "lost a peer in" in message and "No message from rank 1 on" in message and "or waits elsewhere" in message


def _uneven(comm: Communicator, recipe: str, end: str) -> tuple[int, str]:
    worker._wait_as_long_as(timedelta(seconds=5), dist.distributed_c10d._get_default_store())  # type: ignore[attr-defined]
    loop = Loop(comm, recipes.build(recipe, 12, **({"every": 2} if recipe == "local_sgd" else {})))
    try:
        while loop.ab.steps_done < (5 if comm.rank else 12):
            loop.step()
    except PeerLostError as error:
        return error.exit_code, str(error)
    with contextlib.suppress(RuntimeError):
        dist.barrier() if end == "barrier" else dist.destroy_process_group()
    os._exit(0)


# The model.


def test_a_model_without_values() -> None:
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    with pytest.raises(ConfigurationError, match=r"on the meta device \(weight, bias\): give it values"):
        ABTraining(model, AdamW(model.parameters()), LOCAL)


def test_a_model_in_ddp() -> None:
    assert all("pass the bare model" in text for text in run_gloo(2, _wrapped))


def _wrapped(comm: Communicator) -> str:
    model = nn.parallel.DistributedDataParallel(build("mlp"))
    with pytest.raises(ConfigurationError) as error:
        ABTraining(model, sgd(model.parameters()), LOCAL, communicator=comm)
    return str(error.value)


@pytest.mark.parametrize("compiles", ["wraps", "in place"])
def test_a_compiled_model_trains(compiles: str) -> None:
    torch._dynamo.reset()
    model = build("mlp")
    if compiles == "in place":
        model.compile(backend="eager")
    loop = Loop(SingleProcess(), FACTORED, torch.compile(model, backend="eager") if compiles == "wraps" else model)
    plain = Loop(SingleProcess(), FACTORED)
    assert all(torch.equal(one, other) for one, other in zip(loop.run().values(), plain.run().values(), strict=True))
