"""The command as a user runs it: processes, signals, files and exit codes. Most runs are forked: imports take long."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.faults.processes import SAVING_SECONDS, Running
from tests.faults.processes import start as forked

needs_proc = pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
ABTRAIN = (sys.executable, "-m", "abtrain", "train")
# Long enough for every phase of `ab`, and two of its cycles.
SHORT = ("ab:warmup_steps=6,ab_steps=6,rebound_steps=3", "--steps", "24", "--log-every", "6")
KEYS = {
    "recipe",
    "task",
    "seed",
    "world_size",
    "group_size",
    "steps",
    "top1",
    "loss",
    "seconds",
    "payload_bytes",
    "payload_ratio",
    "peak_memory",
    "compression",
    "ranks",
    "weights_digest",
    "versions",
    "config",
}


def environment() -> dict[str, str]:
    """Without what a launcher around the tests may have set."""
    return {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=240)


def result_of(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def running(marker: str) -> list[int]:
    """The processes whose command line or environment names `marker`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                told = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            except OSError:
                continue
            if marker.encode() in told:
                found.append(int(entry.name))
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with two workers."""
    folder = tmp_path_factory.mktemp("finished")
    ended = run(*ABTRAIN, *SHORT, "--workers", "2", "--out", "run", cwd=folder)
    assert ended.returncode == 0, ended.stderr
    # Each note comes once, not from every worker, and there are no others.
    travels = (
        "abtrain: note: 2 workers in 2 groups of 1; traffic between groups: gradients at every step (warmup, rebound) "
        "and merges every 6 steps (group)"
    )
    told = [line.split(" after ")[0] for line in ended.stderr.splitlines()]
    assert told[:2] == [travels, "abtrain: note: weights are factored"]
    assert len(told) == 4 and all("3 of 3 weights factored" in line for line in told[2:])
    assert "2 workers in 2 groups" in ended.stdout and "weights digest" in ended.stdout
    return folder / "run"


def test_the_run_folder_tells_everything(finished: Path) -> None:
    assert sorted(path.name for path in finished.iterdir()) == [
        "config.toml",
        "metrics.jsonl",
        "model-dense.safetensors",
        "model.json",
        "model.safetensors",
        "result.json",
    ]
    result = result_of(finished)
    assert result.keys() >= KEYS
    assert (result["recipe"], result["task"], result["world_size"], result["steps"]) == ("ab", "digits-mlp", 2, 24)
    assert 0 < result["payload_ratio"] < 1 and result["top1"] > 10
    assert result["peak_memory"].keys() == {"host"} and result["peak_memory"]["host"] > 10**8
    assert result["payload_bytes"].keys() == {"total", "between_groups", "within_groups", "by_phase", "of_group"}
    assert {"warmup", "group", "rebound"} <= result["payload_bytes"]["by_phase"].keys()
    assert [entry["cycle"] for entry in result["ranks"]] == [0, 1]
    seconds = result["seconds"]
    assert seconds["compute"] + seconds["sync"] + seconds["svd"] == pytest.approx(seconds["total"])
    every_line = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    merges = [line for line in every_line if "merge" in line]
    assert [(line["step"], line["merge"]["ranks"]) for line in merges] == [(12, [0, 1]), (21, [0, 1])]
    assert all(0 < line["merge"]["loss_mean"] <= line["merge"]["loss_max"] for line in merges)
    assert all(0 <= line["merge"]["wait_seconds"] <= line["merge"]["seconds"] for line in merges)
    lines = [line for line in every_line if "merge" not in line]
    assert [line["step"] for line in lines] == [6, 12, 18, 24]
    assert [line["phase"] for line in lines] == ["warmup", "group", "group", "rebound"]
    assert lines[-1]["payload_bytes"] == result["payload_bytes"]["total"]


def test_missing_data_is_found_out_before_anything_starts(tmp_path: Path) -> None:
    ended = run(*ABTRAIN, "--task", "fashion-cnn", "--data", "nowhere", cwd=tmp_path)
    assert ended.returncode == 3
    assert ended.stderr.startswith("abtrain: error: nowhere is not a folder")
    assert len(ended.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_workers_error_is_the_runs_error(tmp_path: Path) -> None:
    ended = forked(tmp_path, "train", *SHORT, "--lr", "1e30", "--out", "run", "--workers", "2").wait()
    assert ended.code == 7
    errors = [line for line in ended.err.splitlines() if not line.startswith("abtrain: note: ")]
    assert len(errors) == 1 and errors[0].startswith("abtrain: error: the loss of worker ")
    # Training that went wrong leaves its trace, but no result.
    # The worker that waits in vain may be ended before it has tidied up.
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names - {".lock", "stacks-rank0.txt", "stacks-rank1.txt"} == {"config.toml", "metrics.jsonl"}


LONG = ("--workers", "2", "--steps", "100000", "--log-every", "1", "--out", "run")


def begun(folder: Path) -> Running:
    """A run that would take long, once it is training."""
    process = forked(folder, "train", *LONG, grace=SAVING_SECONDS)
    process.wait_for(folder / "run" / "metrics.jsonl")
    assert len(process.workers()) == 2
    return process


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def errors_in(said: str) -> list[str]:
    """The lines of standard error, except the note at the start of every run."""
    return [line for line in said.splitlines() if "traffic between groups" not in line]


@needs_proc
def test_stopped_on_request(tmp_path: Path) -> None:
    process = begun(tmp_path)
    workers = process.workers()
    process.signal(signal.SIGINT)
    ended = process.wait(90)
    assert ended.code == 75
    (error,) = errors_in(ended.err)
    assert error.startswith("abtrain: error: stopped on request (SIGINT), step ")
    assert error.endswith(" is saved: the same command with --out run continues")
    assert not any(map(exists, workers))
    names = ["checkpoints", "config.toml", "metrics.jsonl", "outcome.json"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == names
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert (outcome["outcome"], outcome["exit_code"]) == ("stopped", 75)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{outcome['step']:012d}"]
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line)


@needs_proc
def test_workers_do_not_outlive_a_launcher_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    variables = environment() | {"TMPDIR": str(tmp_path / "tmp")}
    process = subprocess.Popen(
        (*ABTRAIN, *LONG), cwd=tmp_path, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    assert len(running(str(tmp_path))) == 3
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while running(str(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert running(str(tmp_path)) == []
    assert list((tmp_path / "tmp").glob("abtrain-*")) == []


@needs_proc
def test_a_worker_that_is_killed_ends_the_run(tmp_path: Path) -> None:
    process = begun(tmp_path)
    workers = process.workers()
    os.kill(workers[0], signal.SIGKILL)
    ended = process.wait(90)
    assert ended.code == 6
    (error,) = errors_in(ended.err)
    assert error.startswith("abtrain: error: worker ") and "was killed by SIGKILL" in error
    assert not any(map(exists, workers))
