"""Requests to stop that reach several processes, several times, at any moment."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.elastic.multiprocessing import SignalException

from abtrain.comm.communicator import SingleProcess
from abtrain.commands import cli
from abtrain.commands import process as requests
from abtrain.commands.process import PASSED_ON, Afterwards, Requests
from abtrain.commands.tasks import images as image_data
from abtrain.commands.train import launcher
from abtrain.commands.train.launcher import PassingOn
from abtrain.commands.train.stopping import Stopping
from abtrain.errors import PeerLostError, StoppedError
from tests.faults.processes import SAVING_SECONDS, Running, start
from tests.unit.commands.train.test_launch import failure

pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")

RECIPES = {
    "ddp": "ddp",
    "local_sgd": "local_sgd",
    "diloco": "diloco:every=500",
    "ab": "ab:warmup_steps=4,ab_steps=30000,rank_rule=fixed:4",
    "ab_outer": "ab_outer:warmup_steps=8,every=4,delay=2,rank_rule=fixed:4",
}
LONG = ("--steps", "200000", "--log-every", "1", "--out", "run")
ENDS = (*requests.SIGNALS, PASSED_ON)


def begun(folder: Path, recipe: str, workers: int) -> tuple[Running, tuple[str, ...]]:
    """A run that would take long, from the moment on at which it has a folder."""
    command = ("train", RECIPES[recipe], *LONG, "--workers", str(workers))
    run = start(folder, *command, grace=SAVING_SECONDS)
    deadline = time.monotonic() + 100
    while not (folder / "run" / "metrics.jsonl").exists():
        assert run.process.is_alive() and time.monotonic() < deadline
        time.sleep(0.002)
    return run, command


def assert_saved(run: Running, folder: Path) -> int:
    """Makes sure that a run was stopped and has saved; at which step."""
    ended = run.wait(60)
    assert ended.code == 75, ended.err
    outcome = json.loads((folder / "run" / "outcome.json").read_text())
    saved = [path.name for path in (folder / "run" / "checkpoints").iterdir()]
    assert saved == [f"step-{outcome['step']:012d}"], ended.err
    assert "Traceback" not in ended.err
    assert f"step {outcome['step']} is saved: the same command with --out run continues" in ended.err
    return int(outcome["step"])


@pytest.mark.parametrize(
    ("number", "recipe", "workers"),
    [
        ("SIGTERM", "ddp", 2),
        ("SIGTERM", "local_sgd", 3),
        ("SIGTERM", "diloco", 2),
        ("SIGTERM", "ab", 2),
        ("SIGTERM", "ab_outer", 2),
        ("SIGTERM", "ddp", 1),
        ("SIGINT", "local_sgd", 2),
        ("SIGINT", "ab", 1),
        ("SIGHUP", "ab_outer", 4),
        ("SIGHUP", "ddp", 1),
    ],
)
def test_a_signal_to_all_processes_at_once_is_one_request(
    number: str, recipe: str, workers: int, tmp_path: Path
) -> None:
    """At a random moment of the first second: the launcher passes on what its workers have been told already."""
    run, command = begun(tmp_path, recipe, workers)
    time.sleep(random.Random(f"{number} {recipe} {workers}").random() * 0.8)
    run.signal_all(signal.Signals[number])
    time.sleep(0.05)
    run.signal_all(signal.Signals[number])
    step = assert_saved(run, tmp_path)
    again = start(tmp_path, *command, plan="; ".join(f"term {rank} {step + 2} step" for rank in range(workers))).wait()
    assert again.code == 75 and f"resuming from the checkpoint of step {step}\n" in again.err


def test_workers_in_groups_stop_during_a_round(tmp_path: Path) -> None:
    """One that waits for the others' answers would hold up the rest of its group, which then could not answer."""
    command = ("train", RECIPES["ab"], *LONG, "--workers", "4", "--group-size", "2")
    run = start(tmp_path, *command, plan="term 1 40 step", grace=SAVING_SECONDS)
    assert assert_saved(run, tmp_path) > 40


@pytest.mark.parametrize("workers", [1, 2])
def test_a_signal_as_soon_as_there_is_a_folder_is_obeyed_after_the_first_step(workers: int, tmp_path: Path) -> None:
    run, _ = begun(tmp_path, "ddp", workers)
    run.signal_all(signal.SIGTERM)
    assert assert_saved(run, tmp_path) >= 1


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", "SIGHUP"])
@pytest.mark.parametrize("seconds", [0.0, 0.1, 0.2, 0.4])
def test_a_signal_to_all_before_training_begins(number: str, seconds: float, tmp_path: Path) -> None:
    """During imports, at the meeting, while the folder is opened: the run ends, and the same command can begin."""
    command = ("train", "local_sgd", "--workers", "2", "--log-every", "1", "--out", "run", "--max-restarts", "1")
    run = start(tmp_path, *command, "--steps", "200000")
    deadline = time.monotonic() + 60
    while not (tmp_path / "stderr").exists() or (not run.workers() and run.process.is_alive()):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(seconds)
    run.signal_all(signal.Signals[number])
    ended = run.wait(60)
    assert ended.code == 75 and "restarting all workers" not in ended.err, ended.err
    assert ended.err.splitlines()[-1].startswith("abtrain: error: stopped on request")
    plan = "term 0 * step; term 1 * step"
    assert start(tmp_path, *command, "--steps", "200000", plan=plan).wait().code == 75


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)


def test_a_signal_while_the_command_imports_ends_it_with_its_code(tmp_path: Path) -> None:
    """As a user starts it: torch alone takes seconds to import."""
    for number, pause in ((signal.SIGTERM, 0.0), (signal.SIGINT, 0.4), (signal.SIGHUP, 0.8)):
        process = subprocess.Popen(
            [sys.executable, "-m", "abtrain", "train", "ddp", "--out", "run"],
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 60
        while not all(catches(process.pid, awaited) for awaited in requests.SIGNALS):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(pause)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 75
        assert said == f"abtrain: error: stopped on request ({signal.Signals(number).name})\n"


def test_what_the_launcher_passes_on_is_no_second_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """However late it comes, and in whatever order."""
    monkeypatch.setattr(requests, "SAME_REQUEST_SECONDS", 0.0)
    for numbers in ((signal.SIGTERM, PASSED_ON, PASSED_ON), (PASSED_ON, PASSED_ON)):
        with Stopping(SingleProcess()) as stopping:
            for number in numbers:
                os.kill(os.getpid(), number)
                time.sleep(0.01)
            assert stopping.agreed(True, True) == signal.SIGTERM


@pytest.mark.parametrize("first", ENDS)
@pytest.mark.parametrize("second", requests.SIGNALS)
def test_a_second_request_is_one_that_comes_five_seconds_later(
    first: int, second: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(requests.time, "monotonic", lambda: now)
    asked = Requests()
    assert not asked.note(first) and asked.number in requests.SIGNALS
    now = 104.9
    assert not asked.note(second)
    now = 105.1
    assert not asked.note(PASSED_ON)
    assert asked.note(second)


def test_the_same_request_seen_again_does_not_disturb_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        for _ in range(2):
            with Stopping(SingleProcess()):
                os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            assert seen == []
        left = signal.getsignal(signal.SIGTERM)
        assert isinstance(left, Afterwards) and not isinstance(left.before, Afterwards)
        monkeypatch.setattr(requests, "SAME_REQUEST_SECONDS", 0.0)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_launcher_passes_a_request_on_once_and_ends_workers_at_another_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with PassingOn():
        with pytest.raises(SignalException, match=r"on request \(SIGHUP\)") as passed:
            os.kill(os.getpid(), signal.SIGHUP)
        assert passed.value.sigval == PASSED_ON
        os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.setattr(requests, "SAME_REQUEST_SECONDS", 0.0)
        time.sleep(0.01)
        with pytest.raises(SignalException, match=r"at once on a second request \(SIGINT\)") as ended:
            os.kill(os.getpid(), signal.SIGINT)
        assert ended.value.sigval == signal.SIGTERM


def test_a_second_request_to_the_launcher_ends_the_run_at_once(tmp_path: Path) -> None:
    """Its workers are told, even those that cannot stop by themselves."""
    run, _ = begun(tmp_path, "ddp", 2)
    stuck = run.workers()[0]
    os.kill(stuck, signal.SIGSTOP)
    assert run.process.pid is not None
    os.kill(run.process.pid, signal.SIGINT)
    time.sleep(requests.SAME_REQUEST_SECONDS + 0.2)
    began = time.monotonic()
    os.kill(stuck, signal.SIGCONT)
    os.kill(run.process.pid, signal.SIGINT)
    ended = run.wait(60)
    assert ended.code == 75 and time.monotonic() - began < 20
    assert run.workers() == []


@pytest.mark.parametrize("number", ENDS)
def test_a_worker_that_a_request_ended_before_it_trained_is_no_lost_peer(number: int, tmp_path: Path) -> None:
    told = failure(tmp_path, 0, PeerLostError.exit_code, "PeerLostError: rank 0 lost a peer", when=int(time.time()) + 9)
    for failures in ([failure(tmp_path, 1, -number)], [failure(tmp_path, 1, -number), told]):
        error = launcher._first_error(failures)
        assert type(error) is StoppedError and signal.Signals(number).name in str(error)


def test_the_same_request_does_not_disturb_a_command_that_ends(capsys: pytest.CaptureFixture[str]) -> None:
    def command(arguments: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            for number in requests.SIGNALS:
                os.kill(os.getpid(), number)

    assert cli._run(command, ()) == 75
    assert capsys.readouterr().err == "abtrain: error: stopped on request (SIGTERM)\n"


def test_a_request_at_the_end_of_the_program_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its workers have been told first, and have ended; it reports that, and gets the signal itself."""
    before = {number: signal.getsignal(number) for number in ENDS}

    def command(arguments: Any) -> None:
        raise StoppedError("stopped on request")

    def late(error: StoppedError) -> int:
        os.kill(os.getpid(), signal.SIGHUP)
        return error.exit_code

    monkeypatch.setattr(cli, "_fail", late)
    try:
        assert cli._run(command, (), last=True) == 75
        for number in ENDS:
            os.kill(os.getpid(), number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_loader_outlasts_a_request_to_all_processes() -> None:
    """A worker that has lost the processes which read its images could not make the step that it saves after."""
    loaders = torch.utils.data.DataLoader(
        Slow(), batch_size=None, num_workers=1, worker_init_fn=image_data._outlast_requests
    )
    values = iter(loaders)
    assert next(values) == 0
    (loader,) = values._workers  # type: ignore[attr-defined]
    for number in ENDS:
        os.kill(loader.pid, number)
    assert list(values) == list(range(1, 20))


class Slow(torch.utils.data.Dataset[int]):
    """Numbers that take a moment each."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> int:
        time.sleep(0.02)
        return index
