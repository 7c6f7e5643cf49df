"""Steps in a world of one worker: DDP does all its work, and sends nothing."""

import dataclasses
import gc
import sys
import weakref
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from abtrain.comm.hooks import make_hook
from abtrain.commands.plan import bench
from abtrain.commands.plan.bench import world_of_one
from abtrain.commands.tasks.choices import OptimizerName
from abtrain.commands.tasks.samples import Data, Split
from abtrain.commands.tasks.task import TASKS, cross_entropy
from abtrain.errors import UsageError
from abtrain.recipes.sync import GradientSync, GradientWire
from tests.cases import batch, build


@pytest.mark.parametrize("optimizer", get_args(OptimizerName))
def test_a_timed_step_is_that_of_training(optimizer: OptimizerName, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the precision, the gradient clipping and the weight decay of the task."""
    seen: list[object] = []

    def loss(output: Tensor, y: Tensor) -> Tensor:
        seen.append(output.dtype)
        return cross_entropy(output, y)

    def clip(optimizers: list[Optimizer], norm: float | None) -> None:
        seen.append((norm, optimizers[0].param_groups[0]["weight_decay"]))

    monkeypatch.setattr(bench, "clip_gradients", clip)
    split = Split(torch.rand(64, 64), torch.zeros(64, dtype=torch.int64))
    settings: dict[str, Any] = {"loss": loss, "precision": "bf16", "clip": 0.5, "weight_decay": 0.2}
    task = dataclasses.replace(TASKS["digits-mlp"], load=lambda folder: Data(split, split), **settings)
    step, muon = bench.Bench(task, optimizer=optimizer).step()
    assert (0 < muon < step) if optimizer == "muon" else (0 == muon < step)
    assert set(seen) == {torch.bfloat16, (0.5, 0.2)}


@pytest.mark.parametrize("wire", get_args(GradientWire))
def test_gradients_are_averaged_over_one_worker(wire: GradientWire) -> None:
    bare, wrapped = build("mlp", torch.float32), build("mlp", torch.float32)
    with world_of_one() as wrap:
        parallel = wrap(GradientSync(wire, rank=16), wrapped)
        for step in range(4):
            x, y = batch("mlp", 0, step)
            for model in (bare, parallel):
                F.cross_entropy(model(x.float()), y).backward()
            for mine, theirs in zip(bare.parameters(), wrapped.parameters(), strict=True):
                torch.testing.assert_close(theirs.grad, mine.grad, atol=2e-2, rtol=2e-2)
        parallel.close()
    assert not dist.is_initialized()


def test_it_is_left_also_after_an_error() -> None:
    shown = sys.excepthook
    with pytest.raises(ZeroDivisionError), world_of_one():
        raise ZeroDivisionError
    assert not dist.is_initialized()
    assert sys.excepthook is shown


def test_powersgd_factors_what_is_large_enough() -> None:
    torch.manual_seed(0)
    wide = torch.nn.Linear(64, 64)
    with world_of_one() as wrap:
        parallel = wrap(GradientSync("powersgd", rank=1), wide)
        for _ in range(4):
            wide.zero_grad()
            parallel(torch.randn(8, 64)).square().mean().backward()
        parallel.close()
    assert wide.weight.grad is not None
    # After two steps that share gradients as they are, what comes back is of rank 1.
    assert torch.linalg.matrix_rank(wide.weight.grad, rtol=1e-4) == 1


def test_not_in_a_process_that_has_joined_others() -> None:
    with world_of_one(), pytest.raises(UsageError, match="use a separate process"), world_of_one():
        pass


def test_callbacks_of_powersgd_keep_no_process_group() -> None:
    """A thread of Gloo drops them. If it dropped the group too, it would wait for its own end and abort the process."""
    with world_of_one():
        group = weakref.ref(dist.distributed_c10d._get_default_group())
        state = make_hook(GradientSync("powersgd", rank=1), None)._state  # type: ignore[attr-defined]
    gc.collect()
    assert group() is None
    with pytest.raises(RuntimeError, match="destroy it last"):
        state.process_group.size()
