"""PyTorch's distributed checkpoints hold all that training needs to go on, in any phase."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.stateful import Stateful

from abtrain.checkpoint.dcp import TrainingState
from abtrain.comm.communicator import Communicator, SingleProcess
from abtrain.errors import CheckpointError
from tests.gloo import run_gloo
from tests.unit.engine.test_saved_state import RECIPES, Loop


def stopped_and_resumed(comm: Communicator, name: str, stops: list[int], folder: Path) -> str:
    loop = Loop(comm, RECIPES[name], "sgd")
    for stop in stops:
        loop.run(stop)
        dcp.save({"ab": TrainingState(loop.ab)}, checkpoint_id=folder / str(stop))
        schedule = loop.schedule.state_dict()
        loop = Loop(comm, RECIPES[name], "sgd", seed=9)
        dcp.load({"ab": TrainingState(loop.ab)}, checkpoint_id=folder / str(stop))
        loop.schedule.load_state_dict(schedule)
    loop.run(RECIPES[name].total_steps)
    return str(loop.outcome()[0])


@pytest.mark.parametrize("name", ["ab", "ab_outer"])
def test_two_workers_go_on_bit_by_bit(name: str, tmp_path: Path) -> None:
    whole = run_gloo(2, stopped_and_resumed, name, [], tmp_path)
    assert run_gloo(2, stopped_and_resumed, name, [2, 6, 12], tmp_path) == whole


def test_what_is_damaged_is_not_loaded() -> None:
    loop = Loop(SingleProcess(), RECIPES["ab"])
    adapter = TrainingState(loop.ab)
    assert isinstance(adapter, Stateful)
    ((key, saved),) = adapter.state_dict().items()
    with pytest.raises(CheckpointError, match="rank-0 is damaged"):
        adapter.load_state_dict({key: saved[:-1] + bytes([saved[-1] ^ 1])})
    adapter.load_state_dict({key: saved})
