"""Links that are cut, and links that are slow, between workers on hosts of an emulated cluster."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from abtrain.commands.lab import Job, Lab, LabConfig, LabFault
from abtrain.errors import HostFailedError
from tests.faults.processes import start
from tests.lab.conftest import _lab_works, _needs_lab  # noqa: F401  they skip these tests where there can be no labs

pytestmark = pytest.mark.alone

# A worker on each host, as torchrun would start it, without the time that torchrun takes.
WORKER = """
import os, sys
from abtrain.commands.cli import main
rank = os.environ["LAB_HOST"]
os.environ |= {"RANK": rank, "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
os.environ |= {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29500"}
main(sys.argv[1:])
"""
# Gradients of 85,002 numbers at every step: 2.7 Mbit.
TRAIN = ("train", "ddp", "--log-every", "1", "--checkpoint-every", "2")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(LabConfig(nodes=2, rates=(1_000_000,), name="links", tolerance=0.5)) as lab:
        yield lab


def run(lab: Lab, folder: Path, *arguments: str, faults: tuple[LabFault, ...] = ()) -> str:
    """The digest of a run on both hosts, in a folder that they share."""
    script = folder / "worker.py"
    script.write_text(WORKER)
    command = (str(script), *TRAIN, "--out", str(folder / "run"), *arguments)
    lab.run(Job(command, folder / "lab", faults=faults, launcher="python", timeout=200))
    return str(json.loads((folder / "run" / "result.json").read_text())["weights_digest"])


def test_a_link_that_is_slow_and_cut_for_a_moment_changes_nothing(lab: Lab, tmp_path: Path) -> None:
    """At 1 Mbit/s a step takes seconds, and none of them counts as silence."""
    ended = start(tmp_path, *TRAIN, "--steps", "2", "--workers", "2", "--out", "fast").wait()
    assert ended.code == 0, ended.err
    cut = LabFault("cut", host=1, at=6, duration=2)
    slow = run(lab, tmp_path, "--steps", "2", "--timeout", "30", faults=(cut,))
    assert slow == json.loads((tmp_path / "fast" / "result.json").read_text())["weights_digest"]


def test_a_link_that_is_cut_for_good_ends_the_run(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(HostFailedError) as failed:
        run(lab, tmp_path, "--steps", "1000", "--timeout", "8", faults=(LabFault("cut", host=1, at=8),))
    said = "".join(log.read_text() for log in (tmp_path / "lab").glob("host-*.log"))
    assert failed.value.exit_code == 6, said
    # On a machine that is slow itself, the link may be gone before the workers have met.
    lost = "lost a peer in" in said and "did not answer in time" in said
    assert lost or ("to connect to" in said and "some did not" in said)
    if lost:
        # Host 0 holds the store: it names the other one, which cannot reach it. The first one to end, ends the run.
        assert "No message from rank 1 on " in said or "torch.distributed's store cannot be reached" in said
    assert not (tmp_path / "run" / "result.json").exists()
