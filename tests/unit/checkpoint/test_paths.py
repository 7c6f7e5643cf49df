"""Folders of checkpoints may be strings or paths."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from abtrain import checkpoint
from abtrain.comm.communicator import SingleProcess


@pytest.mark.parametrize("kind", [str, Path])
def test_a_folder_may_be_a_string(kind: type[str] | type[Path], tmp_path: Path) -> None:
    folder, comm = kind(tmp_path / "checkpoints"), SingleProcess()
    assert checkpoint.latest(folder, comm) is None
    assert checkpoint.save(folder, 7, {"x": torch.arange(3)}, comm) == tmp_path / "checkpoints" / "step-000000000007"
    saved = checkpoint.latest(folder, comm)
    assert saved is not None and saved.step == 7 and torch.equal(saved.states[0]["x"], torch.arange(3))
