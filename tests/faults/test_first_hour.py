"""Mistakes of a first hour with abtrain: each ends in an error or a warning that names the remedy, and none is silent.

Further ones have their tests beside others of their kind: a replaced optimizer, and LBFGS on several workers
(`test_loops.py`), optimizers that cannot be followed (`test_optimizers.py`), writes to factored weights
(`test_dense_use.py`), a stopped or finished run (`test_runs.py`), names of options (`tests/unit/recipes`), numbers of
parameters (`tests/unit/commands/plan`) and a model in a wrapper (`tests/unit/engine/test_ab_training.py`).
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.optim import LBFGS, AdamW

from abtrain import ABTraining, FixedRank, recipes
from abtrain.comm.communicator import Communicator, SingleProcess
from abtrain.comm.in_process import run_in_process
from abtrain.comm.peers import Peers
from abtrain.commands.train import worker
from abtrain.engine import progress
from abtrain.errors import CheckpointError, ConfigurationError, PeerLostError, UsageError
from abtrain.recipes.recipe import Recipe
from tests.cases import adamw, batch, build, sgd
from tests.faults.loops import Loop, told
from tests.gloo import run_gloo

LOCAL = recipes.local_sgd(8, every=4)
FACTORED = recipes.ab_outer(20, every=4, warmup_steps=0, rank_rule=FixedRank(3))


def backward(ab: ABTraining) -> None:
    x, y = batch("mlp", ab.communicator.rank, ab.steps_done)
    F.cross_entropy(ab(x), y).backward()


def texts(caplog: pytest.LogCaptureFixture, words: str) -> list[str]:
    return [text for text in caplog.messages if words in text]


# The arguments.


def test_the_optimizer_and_the_recipe_are_swapped() -> None:
    model = build("mlp")
    with pytest.raises(ConfigurationError, match=r"are swapped: call ABTraining\(model, optimizer, recipe\)"):
        ABTraining(model, LOCAL, adamw(model.parameters()))  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"^recipe is an AdamW, not a Recipe: build one"):
        ABTraining(model, adamw(model.parameters()), adamw(model.parameters()))  # type: ignore[arg-type]


# The optimizer.


@pytest.mark.parametrize("recipe", [LOCAL, FACTORED], ids=["dense", "factored"])
def test_an_optimizer_that_was_built_after_abtraining(recipe: Recipe) -> None:
    model = build("mlp")
    ab = ABTraining(model, sgd(model.parameters()), recipe)
    later = sgd(model.parameters())
    backward(ab)
    later.step()
    with pytest.raises(UsageError, match=r"no call to step\(\) of SGD. Build optimizers before ABTraining"):
        ab.step()


@pytest.mark.parametrize("warmup", [0, 4], ids=["at once", "later"])
def test_lbfgs_while_weights_are_factored(warmup: int) -> None:
    """It is refused before the run begins, and works with the recipe that the message names."""
    model = build("mlp")
    optimizer = LBFGS(model.parameters(), max_iter=4)
    with pytest.raises(ConfigurationError, match=r"LBFGS keeps one flat copy .* without factors such as local_sgd"):
        ABTraining(model, optimizer, recipes.ab_outer(20, every=4, warmup_steps=warmup, rank_rule=FixedRank(3)))
    ab = ABTraining(model, optimizer, LOCAL)
    losses = []

    def closure() -> float:
        optimizer.zero_grad()
        backward(ab)
        x, y = batch("mlp", 0, 0)
        losses.append(float(F.cross_entropy(model(x), y).detach()))
        return losses[-1]

    optimizer.step(closure)
    ab.step()
    assert len(losses) == 4 and losses[-1] < losses[0]


def test_a_closure_while_steps_are_preconditioned() -> None:
    loop = Loop(SingleProcess(), FACTORED)
    with pytest.raises(UsageError, match=r"call backward before optimizer.step\(\), or set damping=0"):
        loop.optimizer.step(lambda: 0.0)


def test_a_cell_of_a_notebook_that_is_run_again() -> None:
    model = build("mlp")
    optimizer = sgd(model.parameters())
    ab = ABTraining(model, optimizer, LOCAL)
    with pytest.raises(ConfigurationError, match=r"SGD belongs to another ABTraining: call close\(\)"):
        ABTraining(model, optimizer, LOCAL)
    ab.close()
    ABTraining(model, optimizer, LOCAL)


# The loop.


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("waits", [False, True])
def test_a_step_at_each_micro_batch(workers: int, waits: bool) -> None:
    def work(comm: Communicator) -> None:
        loop = Loop(comm, LOCAL)
        for micro in range(4):
            if waits:
                with loop.ab.no_sync():
                    backward(loop.ab)
            else:
                backward(loop.ab)
            if micro == 3:
                loop.optimizer.step()
                loop.optimizer.zero_grad()
            loop.ab.step()

    assert all(isinstance(e, UsageError) and "not at each micro batch" in str(e) for e in told(workers, work))


def test_steps_without_an_optimizer_step(caplog: pytest.LogCaptureFixture) -> None:
    model = build("mlp")
    optimizer = sgd(model.parameters())
    ab = ABTraining(model, optimizer, LOCAL)
    while not ab.finished:
        backward(ab)
        optimizer.zero_grad()
        ab.step()
    (text,) = texts(caplog, "no optimizer has stepped in the last 8 calls of ab.step()")
    assert "call it once after every optimizer.step()" in text


def test_a_step_that_is_left_out_on_purpose() -> None:
    model = build("mlp")
    optimizer = sgd(model.parameters())
    ab = ABTraining(model, optimizer, LOCAL)
    backward(ab)
    with pytest.raises(UsageError, match=r"call optimizer.zero_grad\(\) before ab.step\(\)"):
        ab.step()
    optimizer.zero_grad(set_to_none=False)
    ab.step()
    assert ab.steps_done == 1


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


def test_the_optimizer_is_saved_while_weights_are_factored(caplog: pytest.LogCaptureFixture) -> None:
    model = build("mlp")
    optimizer = adamw(model.parameters())
    ab = ABTraining(model, optimizer, FACTORED)
    for _ in range(2):
        backward(ab)
        optimizer.step()
        optimizer.zero_grad()
        ab.step()
        ab.state_dict()
    assert not texts(caplog, "state_dict()")
    optimizer.state_dict()
    saved = optimizer.state_dict()
    (text,) = texts(caplog, "optimizer.state_dict() holds the state of factors")
    assert "Save ab.state_dict()" in text and "load it by ab.load_state_dict()" in text
    with pytest.raises(ValueError, match="doesn't match the size"):
        adamw(build("mlp").parameters()).load_state_dict(saved)


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


@pytest.mark.parametrize(
    "keep", [lambda ab: torch.save(ab, io.BytesIO()), pickle.dumps, copy.deepcopy], ids=["save", "pickle", "copy"]
)
def test_the_whole_abtraining_is_saved(keep: Callable[[ABTraining], Any]) -> None:
    ab = Loop(SingleProcess(), LOCAL).ab
    with pytest.raises(UsageError, match=r"save ab\.state_dict\(\).* call ab\.save\(path\), or copy ab\.module"):
        keep(ab)


OTHER_STATES: dict[str, tuple[Callable[[Loop], Any], str]] = {
    "model": (lambda loop: loop.model.state_dict(), r"state of a model, .* ab.load_dense_state_dict\(state\)"),
    "factors": (lambda loop: loop.ab.factored_state_dict(), r"ab.save\(path\), and .* abtrain.load\(model, path\)"),
    "optimizer": (lambda loop: loop.optimizer.state_dict(), r"state of an optimizer: .* includes its optimizers"),
    "both": (
        lambda loop: {"epoch": 3, "model": loop.model.state_dict(), "optimizer": loop.optimizer.state_dict()},
        r"'model' is the state of a model: load it by ab.load_dense_state_dict\(state\['model'\]\)",
    ),
    "wrapped": (lambda loop: {"epoch": 3, "run": loop.ab.state_dict()}, r"contains one: load state\['run'\]"),
    "path": (lambda loop: "runs/a.pt", r"'runs/a.pt': read the file first, such as by torch.load\(path\)"),
    "version": (lambda loop: {**loop.ab.state_dict(), "version": 1}, "of version 1: .* with the version of abtrain"),
    "none": (lambda loop: {"epoch": 3}, r"a dict with 'epoch': load what ABTraining.state_dict\(\) returned"),
}


@pytest.mark.parametrize("which", OTHER_STATES)
def test_another_state_is_loaded(which: str) -> None:
    loop = Loop(SingleProcess(), FACTORED)
    loop.run(until=1)
    other, words = OTHER_STATES[which]
    with pytest.raises(CheckpointError, match=f"not a state of version .*{words}"):
        loop.ab.load_state_dict(other(loop))


def test_weights_of_one_group_are_called_so_once(caplog: pytest.LogCaptureFixture) -> None:
    def work(comm: Communicator) -> None:
        loop = Loop(comm, LOCAL)
        loop.ab.dense_state_dict()
        for _ in range(4):
            loop.step()
        loop.ab.dense_state_dict()
        loop.step()
        # abtrain's own uses, and the average.
        loop.ab.ema(0.9).update()
        loop.ab.state_dict()
        with loop.ab.merged():
            loop.ab.dense_state_dict()
        assert not texts(caplog, "rank 0's group")
        comm.barrier()
        loop.ab.dense_state_dict()
        loop.ab.factored_state_dict()

    run_in_process(2, work)
    (text,) = texts(caplog, "rank 0's group")
    assert text.startswith("dense_state_dict() at step 5, within a round") and "`with ab.merged():`" in text


# The end of the run.

_SCRIPT = """
import sys
import torch
import abtrain

def main():
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ab = abtrain.ABTraining(model, optimizer, abtrain.recipes.local_sgd(5, every=1))
    for _ in range(3):
        ab(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        ab.step()
    if sys.argv[1:]:
        raise KeyError("a mistake of the loop")

main()
"""


def test_a_program_that_ends_too_early_says_how_many_steps_are_missing() -> None:
    """It does not if an exception ends it."""
    programs = [
        subprocess.Popen([sys.executable, "-c", _SCRIPT, *more], stderr=subprocess.PIPE, text=True)
        for more in ((), ("raise",))
    ]
    early, failed = (program.communicate(timeout=200)[1] for program in programs)
    assert "the run ends at step 3, 2 steps before recipe 'local_sgd' ends: " in early
    assert "or loop `while not ab.finished`; ab.close() ends a run early" in early
    assert "a mistake of the loop" in failed and "steps before" not in failed


@pytest.mark.parametrize("end", ["none", "finished", "closed", "saved", "another worker"])
def test_which_runs_have_ended_too_early(end: str, caplog: pytest.LogCaptureFixture) -> None:
    def work(comm: Communicator) -> None:
        loop = Loop(comm, LOCAL)
        while not loop.ab.finished and (end == "finished" or loop.ab.steps_done < 4):
            loop.step()
        if end == "closed":
            loop.ab.close()
        if end == "saved":
            loop.ab.state_dict()
        comm.barrier()
        if comm.rank == (end == "another worker"):
            progress.warn()

    run_in_process(2, work)
    assert len(texts(caplog, "steps before recipe")) == (end in ("none", "another worker"))


@pytest.mark.parametrize("lost", [False, True])
def test_a_run_that_ends_because_a_worker_is_lost_is_not_too_early(
    lost: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The command `abtrain train` tells of the loss, and ends without an exception."""

    class Found(Peers):
        has_lost_one = lost

        def is_first(self, place: str) -> bool:
            return True

    comm = SingleProcess()
    comm.peers = Found(HashStore(), 0, 2)
    Loop(comm, LOCAL)
    progress.warn()
    assert len(texts(caplog, "steps before recipe")) == (not lost)


def test_a_run_that_never_began_has_ended_too_early(caplog: pytest.LogCaptureFixture) -> None:
    model = build("mlp")
    ABTraining(model, sgd(model.parameters()), LOCAL)
    progress.warn()
    (text,) = texts(caplog, "at step 0, 8 steps before recipe")
    assert "call ab.step() once after every optimizer.step()" in text


# Workers.


@pytest.mark.parametrize(
    ("recipe", "end"),
    [("ddp", "barrier"), ("ddp", "close"), ("local_sgd", "barrier"), ("local_sgd", "destroy"), ("local_sgd", "close")],
)
def test_a_worker_with_fewer_batches(recipe: str, end: str, tmp_path: Path) -> None:
    """It waits elsewhere or ends: the others end with exit code 6, within their time-out, and learn of its step."""
    code, message = run_gloo(2, _uneven, recipe, end, tmp_path / "warnings", may_die={1})[0]
    assert code == 6
    # Between rounds, close() ends a run early.
    expected = recipe == "local_sgd" or end != "close"
    assert (tmp_path / "warnings").read_text().count("rank 1: the run ends at step 5, 7 steps before") == expected
    assert "lost a peer in" in message
    assert "Rank 1 on" in message and f"the run ends at step 5, 7 steps before recipe '{recipe}' ends" in message


def _uneven(comm: Communicator, recipe: str, end: str, warnings: Path) -> tuple[int, str]:
    if comm.rank == 1:
        progress.log.addHandler(logging.FileHandler(warnings))
    worker._wait_as_long_as(timedelta(seconds=5), dist.distributed_c10d._get_default_store())  # type: ignore[attr-defined]
    loop = Loop(comm, recipes.build(recipe, 12, **({"every": 2} if recipe == "local_sgd" else {})))
    try:
        while loop.ab.steps_done < (5 if comm.rank else 12):
            loop.step()
    except PeerLostError as error:
        return error.exit_code, str(error)
    with contextlib.suppress(RuntimeError):
        {"barrier": dist.barrier, "destroy": dist.destroy_process_group, "close": loop.ab.close}[end]()
    # As in a program of its own, whose end the process of a test never sees.
    progress.warn()
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


def test_a_model_saved_within_a_round_names_the_call(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    def work(comm: Communicator) -> None:
        loop = Loop(comm, LOCAL)
        loop.step()
        if comm.rank == 0:
            loop.ab.save(tmp_path / "m.safetensors")

    run_in_process(2, work)
    (text,) = texts(caplog, "rank 0's group")
    assert text.startswith("ab.save() at step 1, within a round")


# What is said when weights are factored.


def test_how_many_weights_are_factored_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.getLogger("abtrain"), "propagate", False)
        Loop(SingleProcess(), FACTORED)
    assert "abtrain: step 0: 3 of 3 weights factored, 1." in capsys.readouterr().err


def test_why_the_others_stay_dense_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    Loop(SingleProcess(), recipes.ab_outer(20, every=4, warmup_steps=0, rank_rule=FixedRank(5)))
    (text,) = texts(caplog, "weights factored")
    assert text.endswith(
        "2 of 3 weights factored, 1.2 : 1; 1 stays dense (factors of rank 5 would save less than 10 %)"
    )


def test_no_weight_is_factored(caplog: pytest.LogCaptureFixture) -> None:
    Loop(SingleProcess(), recipes.ab_outer(20, every=4, warmup_steps=0, rank_rule=FixedRank(16)))
    (text,) = texts(caplog, "0 of 3 weights factored, so the model is no smaller")
    assert "0.weight: factors of rank 10 would save less than 10 %" in text and "larger sigma_cutoff" in text
