"""Workers that are processes: killed, frozen, stopped, and started again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from abtrain import faults

pytestmark = [
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs the signals of a POSIX system"),
    pytest.mark.timeout(600),
]

ABTRAIN = ("-m", "abtrain", "train", "ab", "--workers", "2", "--steps", "24", "--warmup-steps", "4", "--ab-steps", "6")
SETTINGS = ("--rebound-steps", "3", "--log-every", "1", "--checkpoint-every", "4", "--out", "run")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1")


def run(folder: Path, *command: str, plan: str = "") -> subprocess.CompletedProcess[str]:
    launched = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    environment = {name: value for name, value in os.environ.items() if name not in launched}
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment | {faults.VARIABLE: plan, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )


def digest(folder: Path) -> str:
    return str(json.loads((folder / "run" / "result.json").read_text())["weights_digest"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    ended = run(folder, *ABTRAIN, *SETTINGS)
    assert ended.returncode == 0, ended.stderr
    return digest(folder)


@pytest.mark.parametrize("place", ["1 2 step", "1 7 step", "0 10 merge.agreed", "0 8 checkpoint.rename"])
def test_a_worker_that_is_killed_is_started_again(place: str, whole: str, tmp_path: Path) -> None:
    ended = run(tmp_path, *ABTRAIN, *SETTINGS, "--max-restarts", "1", plan=f"kill {place}")
    assert ended.returncode == 0, ended.stderr
    assert digest(tmp_path) == whole


def test_torchrun_starts_it_again(whole: str, tmp_path: Path) -> None:
    ended = run(tmp_path, *TORCHRUN, *ABTRAIN, *SETTINGS, "--overwrite", plan="kill 1 9 step")
    assert ended.returncode == 0, ended.stderr
    assert "going on from the checkpoint of step 8" in ended.stderr
    assert digest(tmp_path) == whole


def test_a_run_that_was_killed_goes_on_when_it_is_run_again(whole: str, tmp_path: Path) -> None:
    killed = run(tmp_path, *ABTRAIN, *SETTINGS, plan="kill 1 10 merge.begin")
    assert killed.returncode == 6
    assert killed.stderr.splitlines()[-1].startswith("abtrain: error: worker 1 was killed by SIGKILL")
    again = run(tmp_path, *ABTRAIN, *SETTINGS)
    assert again.returncode == 0 and "going on from the checkpoint of step 8" in again.stderr
    assert digest(tmp_path) == whole


def test_one_worker_that_is_asked_to_stop_stops_all(whole: str, tmp_path: Path) -> None:
    stopped = run(tmp_path, *ABTRAIN, *SETTINGS, plan="term 1 6 step")
    assert stopped.returncode == 75, stopped.stderr
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert outcome["exit_code"] == 75 and outcome["step"] == 8  # where they meet for a checkpoint
    assert run(tmp_path, *ABTRAIN, *SETTINGS).returncode == 0
    assert digest(tmp_path) == whole


def test_a_worker_that_is_frozen_ends_the_run(tmp_path: Path) -> None:
    began = time.monotonic()
    ended = run(tmp_path, *ABTRAIN, *SETTINGS, "--timeout", "20", plan="freeze 1 9 step")
    assert ended.returncode == 6
    message = ended.stderr.splitlines()[-1]
    assert "rank 0" in message and os.uname().nodename in message and "step 10" in message and "'group'" in message
    assert "Current thread" in (tmp_path / "run" / "stacks-rank0.txt").read_text()
    # The frozen one is given the grace before it is killed.
    assert time.monotonic() - began < 20 + 30 + 120
