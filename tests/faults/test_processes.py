"""Workers that are processes: killed, frozen, slow, out of memory, alone, stopped, and started again."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from abtrain import failpoints as faults
from abtrain import recipes
from abtrain.checkpoint import store as checkpoint
from abtrain.comm.in_process import run_in_process
from abtrain.recipes.recipe import Recipe
from abtrain.recipes.sync import GradientSync
from tests.faults.processes import SAVING_SECONDS, Running, start
from tests.scripts import free_port, joining

pytestmark = [
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs the signals of a POSIX system"),
    pytest.mark.timeout(300),
]

AB = "ab:warmup_steps=4,ab_steps=6,rebound_steps=3,rank_rule=fixed:4"
OUTER = "ab_outer:warmup_steps=20,every=5,delay=2,fragments=2,wire=int8,rank_rule=fixed:4"
COMMON = ("--workers", "2", "--log-every", "1", "--checkpoint-every", "4", "--out", "run")
TRAIN = ("train", AB, "--steps", "24", *COMMON)


def digest(folder: Path) -> str:
    return str(json.loads((folder / "run" / "result.json").read_text())["weights_digest"])


def running(marker: str) -> list[str]:
    """The processes whose working folder names `marker`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if marker in str((entry / "cwd").readlink()):  # one that has ended has none
                    found.append(entry.name)
            except OSError:
                continue
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    ended = start(folder, *TRAIN).wait()
    assert ended.code == 0, ended.err
    return digest(folder)


IN_TRAINING = ["1 2 sync.begin", "0 2 sync.end", "1 7 step", "1 12 step"]
IN_MERGES = ["1 10 merge.begin", "0 10 merge.agreed", "1 10 merge.end"]
IN_CHECKPOINTS = [
    *(f"0 12 checkpoint.{point}" for point in ("prepare", "write", "fsync", "manifest", "rename", "prune")),
    *(f"1 12 checkpoint.{point}" for point in ("write", "fsync")),
]

# The second file of a part, and the manifest: at the points before, a worker is only slow.
LATER_FSYNCS = {
    f"{rank} 12 checkpoint.fsync {count + 1}": f"slow {rank} 12 checkpoint.fsync; " * count
    for rank, count in ((0, 1), (0, 2), (1, 1))
}


@pytest.mark.parametrize("place", [*IN_TRAINING, *IN_MERGES, *IN_CHECKPOINTS, *LATER_FSYNCS])
def test_a_worker_that_is_killed_is_started_again(place: str, whole: str, tmp_path: Path) -> None:
    kill = f"kill {' '.join(place.split()[:3])}"
    plan = LATER_FSYNCS.get(place, "") + kill
    ended = start(tmp_path, *TRAIN, "--max-restarts", "1", plan=plan).wait()
    assert ended.code == 0, ended.err
    assert digest(tmp_path) == whole
    step = int(place.split()[1])
    if step > 4:
        committed = 12 if "prune" in place or place == "1 12 step" else (step - 1) // 4 * 4
        assert f"resuming from the checkpoint of step {committed}\n" in ended.err
    assert not [path for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.startswith(".")]


def test_torchrun_starts_it_again(whole: str, tmp_path: Path) -> None:
    """As users start it: every process imports torch for itself."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1")
    launched = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    environment = {name: value for name, value in os.environ.items() if name not in launched}
    ended = subprocess.run(
        [sys.executable, *torchrun, "-m", "abtrain", *TRAIN, "--overwrite"],
        cwd=tmp_path,
        env=environment | {faults.VARIABLE: "kill 1 9 step", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert ended.returncode == 0, ended.stderr
    assert "resuming from the checkpoint of step 8" in ended.stderr
    assert digest(tmp_path) == whole


def test_a_killed_run_resumes_when_run_again(whole: str, tmp_path: Path) -> None:
    killed = start(tmp_path, *TRAIN, plan="kill 1 10 merge.begin").wait()
    assert killed.code == 6
    assert killed.err.splitlines()[-1].startswith("abtrain: error: worker 1 was killed by SIGKILL")
    again = start(tmp_path, *TRAIN).wait()
    assert again.code == 0 and "resuming from the checkpoint of step 8" in again.err
    assert digest(tmp_path) == whole


def places(recipe: Recipe, step: int, every: int) -> list[tuple[str, int]]:
    """The points that a run passes at a step, and the checkpoint from which it resumes if it ends there."""
    before = (step - 1) // every * every
    committed = step if step % every == 0 else before
    points = [("step", committed)]
    if isinstance(recipe.at(step).phase.sync, GradientSync):
        points += [("sync.begin", committed), ("sync.end", committed)]
    # A hidden merge is agreed on, and ends, at later steps.
    if recipe.at(step - 1).merges:
        points += [("merge.begin", before)]
    if step % every == 0:
        points += [(f"checkpoint.{point}", before) for point in ("write", "fsync")]
    return points


SOAKED = {"ab": AB, "ab_outer": OUTER}


class Soak(NamedTuple):
    """A run whose workers are killed again and again, one that is left alone, and where the former has to go on."""

    folder: Path
    killed: Running
    whole: Running
    commits: list[int]


@pytest.fixture(scope="module")
def soaks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Soak]]:
    """At the same time: most of what they do is to wait for the word of workers that were killed."""
    runs = {name: soak(text, tmp_path_factory.mktemp("soak")) for name, text in SOAKED.items()}
    yield runs
    for run in runs.values():
        run.killed.process.kill()
        run.whole.process.kill()


def soak(text: str, folder: Path) -> Soak:
    """Kills either worker twelve times, in a seeded order; the launcher starts them again each time."""
    steps, every, dice = 40, 2, random.Random(11)
    recipe = recipes.from_text(text, steps)
    kills, commits = [], []
    for step in sorted(dice.sample(range(1, steps), 12)):
        point, commit = dice.choice(places(recipe, step, every))
        kills.append(f"kill {dice.randrange(2)} {step} {point}")
        commits.append(commit)
    train = ("train", text, "--steps", str(steps), *COMMON, "--checkpoint-every", str(every))
    for part in ("run", "soak"):
        (folder / part).mkdir()
    killed = start(folder / "soak", *train, "--max-restarts", "12", plan="|".join(kills))
    return Soak(folder, killed, start(folder / "run", *train), commits)


@pytest.mark.parametrize("name", SOAKED)
def test_twelve_kills_at_random_places(name: str, soaks: dict[str, Soak]) -> None:
    folder, killed, whole, commits = soaks[name]
    ended = killed.wait()
    assert ended.code == 0 == whole.wait().code, ended.err
    gone_on = [int(step) for step in re.findall(r"resuming from the checkpoint of step (\d+)", ended.err)]
    assert gone_on == [commit for commit in commits if commit]
    assert digest(folder / "soak") == digest(folder / "run")


FROZEN = {
    "sharing gradients": ("1 2 step", "rank 0", "'warmup'"),
    "in a group of its own": ("1 7 step", "rank 0", "'group'"),
    "after a merge": ("1 11 step", "rank 0", "'rebound'"),
    "in a checkpoint": ("0 8 checkpoint.fsync", "rank 1", "'checkpoint'"),
}


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Running, Path]]]:
    """Runs in which a worker freezes. All that they do is to wait, so they do it at the same time."""
    runs = {}
    for when, (place, _, _) in FROZEN.items():
        folder = tmp_path_factory.mktemp("frozen")
        runs[when] = start(folder, *TRAIN, "--timeout", "8", plan=f"freeze {place}"), folder
    yield runs
    for run, _ in runs.values():
        run.process.kill()


@pytest.mark.parametrize("when", FROZEN)
def test_a_worker_that_is_frozen_ends_the_run(when: str, frozen: dict[str, tuple[Running, Path]]) -> None:
    run, folder = frozen[when]
    ended = run.wait()
    assert ended.code == 6
    message = ended.err.splitlines()[-1]
    place, who, phase = FROZEN[when]
    assert who in message and os.uname().nodename in message and "step " in message and phase in message
    assert f"No message from rank {place[0]} on {os.uname().nodename}: it died, froze, is out of reach" in message
    assert "Current thread" in (folder / "run" / f"stacks-{who.replace(' ', '')}.txt").read_text()


def test_a_slow_worker_is_waited_for(whole: str, tmp_path: Path) -> None:
    slow = "slow 1 2 sync.begin; slow 0 7 step; slow 1 8 checkpoint.fsync; slow 1 10 merge.agreed"
    ended = start(tmp_path, *TRAIN, plan=slow).wait()
    assert ended.code == 0, ended.err
    assert digest(tmp_path) == whole


def test_a_worker_without_memory(tmp_path: Path) -> None:
    ended = start(tmp_path, *TRAIN, plan="memory 1 7 step").wait()
    assert ended.code == 6
    assert ended.err.splitlines()[-1].startswith("abtrain: error: rank 1 ran out of memory (")
    assert "use a smaller --batch-size, or fewer --workers" in ended.err


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_whose_peer_does_not_come(rank: int, tmp_path: Path) -> None:
    ended = start(tmp_path, *TRAIN, "--timeout", "3", environment=joining(rank, 2, free_port())).wait()
    assert ended.code == 6
    told = ended.err.splitlines()[-1]
    assert (
        told.startswith(f"abtrain: error: rank {rank} waited 3 s for all 2 workers to connect to 127.0.0.1:")
        and "and some did not: look at the output of the other workers" in told
    )
    assert not (tmp_path / "run").exists()


def test_a_port_that_is_in_use(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as server:
        ended = start(tmp_path, *TRAIN, environment=joining(0, 2, server.getsockname()[1])).wait()
    assert ended.code == 2
    assert "another program listens at 127.0.0.1:" in ended.err and "--master-port" in ended.err


def test_one_worker_that_is_asked_to_stop_stops_all(whole: str, tmp_path: Path) -> None:
    stopped = start(tmp_path, *TRAIN, plan="term 1 6 step", grace=SAVING_SECONDS).wait()
    assert stopped.code == 75, stopped.err
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert outcome["exit_code"] == 75 and outcome["step"] == 8  # where they meet for a checkpoint
    assert start(tmp_path, *TRAIN).wait().code == 0
    assert digest(tmp_path) == whole


def test_a_request_to_stop_is_no_reason_to_start_again(whole: str, tmp_path: Path) -> None:
    stopped = start(tmp_path, *TRAIN, "--max-restarts", "2", plan="term 1 6 step", grace=SAVING_SECONDS).wait()
    assert stopped.code == 75 and "restarting all workers" not in stopped.err
    assert start(tmp_path, *TRAIN, "--max-restarts", "2").wait().code == 0
    assert digest(tmp_path) == whole


LONG_ROUND = ("ab:warmup_steps=4,ab_steps=150000,rank_rule=fixed:4", "--steps", "200000")


@pytest.mark.parametrize("everybody", [True, False], ids=["all workers", "one worker"])
def test_a_stop_does_not_wait_for_a_merge_that_is_far_away(everybody: bool, tmp_path: Path) -> None:
    """Workers that train alone agree on a step, save there, and go on from it."""
    arguments = ("train", *LONG_ROUND, "--workers", "2", "--log-every", "1", "--out", "run")
    run = start(tmp_path, *arguments, plan="" if everybody else "term 1 9 step", grace=SAVING_SECONDS)
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 100
    while everybody and not (metrics.exists() and '"group"' in metrics.read_text()):
        assert run.process.is_alive() and time.monotonic() < deadline
        time.sleep(0.05)
    if everybody:
        run.signal(signal.SIGTERM)
    ended = run.wait(60)
    assert ended.code == 75, ended.err
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    saved = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert outcome["step"] > 4 and saved == [f"step-{outcome['step']:012d}"]
    at = f"{outcome['step'] + 1} step"
    again = start(tmp_path, *arguments, plan=f"kill 0 {at}; kill 1 {at}").wait()
    assert f"resuming from the checkpoint of step {outcome['step']}\n" in again.err


@pytest.mark.parametrize("numbers", [("SIGINT", "SIGINT"), ("SIGTERM", "SIGTERM"), ("SIGTERM", "SIGINT")], ids="-".join)
def test_a_run_asked_to_stop_twice(numbers: tuple[str, str], tmp_path: Path) -> None:
    """The second signal comes at once, while the first is being obeyed."""
    run = start(tmp_path, "train", "ab:rank_rule=fixed:4", "--steps", "100000", *COMMON, grace=SAVING_SECONDS)
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 100
    while not (metrics.exists() and metrics.stat().st_size > 500):
        assert run.process.is_alive() and time.monotonic() < deadline
        time.sleep(0.05)
    for number in numbers:
        run.signal(signal.Signals[number])
    ended = run.wait()
    assert ended.code == 75, ended.err
    (told,) = (line for line in ended.err.splitlines() if "traffic between groups" not in line)
    assert told.partition(", ")[0] in {f"abtrain: error: stopped on request ({number})" for number in numbers}
    assert running(str(tmp_path)) == []
    # Whatever was begun, what is there is whole.
    for saved in run_in_process(2, lambda comm: checkpoint.latest(tmp_path / "run" / "checkpoints", comm)):
        assert saved is None or saved.step > 0
