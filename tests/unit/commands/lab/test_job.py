import os
import sys
from pathlib import Path

import pytest

from abtrain.commands.lab import Job, LabConfig, LabFault
from abtrain.commands.lab.job import host_command, host_environment, job_problems


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()


@pytest.mark.parametrize("command", [("train.py", "--steps", "5"), ("-m", "abtrain", "train"), ("-m", "train")])
def test_commands_that_are_there(command: tuple[str, ...]) -> None:
    before = list(sys.path)
    assert job_problems(Job(command, Path("out")), nodes=2) == []
    assert sys.path == before


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ((), "there is no command"),
        (("trian.py",), "script 'trian.py' is not in"),
        (("-m",), "-m needs a module"),
        (("-m", "trian"), "module 'trian' is not found"),
        (("-m", "no.such.package"), "module 'no.such.package' is not found"),
        (("--steps", "5"), "'--steps' is not a script"),
    ],
)
def test_commands_that_are_not_there(command: tuple[str, ...], problem: str) -> None:
    (found,) = job_problems(Job(command, Path("out")), nodes=2)
    assert problem in found


def test_a_folder_that_is_in_use() -> None:
    (found,) = job_problems(Job(("train.py",), Path()), nodes=2)
    assert "is not an empty folder" in found
    (found,) = job_problems(Job(("train.py",), Path("train.py")), nodes=2)
    assert "is not an empty folder" in found


def test_all_problems_are_found_at_once() -> None:
    job = Job(("nowhere.py",), Path("out"), faults=(LabFault("kill", 5, 1),), timeout=0)
    assert len(job_problems(job, nodes=2)) == 3


def test_every_host_joins_the_first() -> None:
    job, config = Job(("train.py", "--steps", "5"), Path("out")), LabConfig(nodes=3, workers_per_node=2)
    line = " ".join(host_command(job, config, 1))
    assert "--nnodes 3 --node-rank 1 --nproc-per-node 2 --master-addr 10.77.0.1 " in line
    assert line.endswith(" train.py --steps 5")
    assert host_command(Job(("x.py",), Path("out"), launcher="python"), config, 1) == [sys.executable, "x.py"]


def test_hosts_train_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert host_environment(Job(("train.py",), Path("out")), 0)["CUDA_VISIBLE_DEVICES"] == ""


def test_threads_are_one_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(("train.py",), Path("out"), environment={"COLOR": "red"})
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    environment = host_environment(job, 1)
    assert environment["OMP_NUM_THREADS"] == "1" and environment["GLOO_SOCKET_IFNAME"] == "eth0"
    assert (environment["COLOR"], environment["LAB_HOST"]) == ("red", "1")
    assert environment["PATH"] == os.environ["PATH"]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert host_environment(job, 1)["OMP_NUM_THREADS"] == "3"
