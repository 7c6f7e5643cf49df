"""Runs that end before their time, and what becomes of them when they are started again. Workers are threads here."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from abtrain import failpoints as faults
from abtrain.checkpoint import store as checkpoint
from abtrain.comm.communicator import Communicator, SingleProcess
from abtrain.comm.in_process import run_in_process
from abtrain.commands import process as requests
from abtrain.commands.compare import comparison as arguments
from abtrain.commands.compare import plots
from abtrain.commands.compare.command import write_results
from abtrain.commands.tasks.datasets import Data, Split
from abtrain.commands.train import loop, trackers
from abtrain.commands.train import trainer as trainers
from abtrain.commands.train.config import TrainConfig, resolve
from abtrain.commands.train.config_file import from_toml
from abtrain.commands.train.config_problems import validate
from abtrain.commands.train.display import Display
from abtrain.commands.train.loop import agree_on_start, train
from abtrain.commands.train.run_folder import RunFolder
from abtrain.engine import choosing
from abtrain.errors import (
    CheckpointError,
    ConfigurationError,
    DataError,
    NonFiniteError,
    RanksDisagreeError,
    StoppedError,
)
from tests.unit.commands.made_up import outcomes, requested

STEPS = 24
RECIPES = {
    "ab": "ab:warmup_steps=4,ab_steps=6,rebound_steps=3,lr_rebound_steps=3,sigma_cutoff=0.5",
    "ab_outer": "ab_outer:every=5,delay=2,fragments=2,wire=int8,warmup_steps=10,rank_rule=fixed:4",
}


def settings(folder: Path, recipe: str = "ab", **changed: Any) -> TrainConfig:
    text = RECIPES[recipe]
    config = TrainConfig(text, workers=2, steps=STEPS, device="cpu", log_every=1, checkpoint_every=4, out=folder)
    return resolve(dataclasses.replace(config, **changed))


def run(config: TrainConfig, plan: str = "", monkeypatch: pytest.MonkeyPatch | None = None) -> dict[str, Any]:
    """The result of a run of threads in which faults happen, after which RuntimeError is the error."""
    if monkeypatch is not None:
        monkeypatch.setattr(faults, "_planned", faults.parse(plan))
    return run_in_process(config.workers, lambda comm: train(config, comm))[0]


@pytest.fixture(scope="module", autouse=True)
def one_model_after_the_other() -> Iterator[None]:
    """Threads share torch's generator, so only one at a time may draw initial weights. Each computes by itself."""
    lock, build_model, intra_op = threading.Lock(), loop.build_model, torch.get_num_threads()
    torch.set_num_threads(1)

    def locked(*args: Any) -> Any:
        with lock:
            return build_model(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build_model", locked)
        yield
    torch.set_num_threads(intra_op)


@pytest.fixture(scope="module")
def whole(one_model_after_the_other: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """By recipe, the digest of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    return {recipe: run(settings(folder / recipe, recipe, checkpoint_every=0))["weights_digest"] for recipe in RECIPES}


def recorded(folder: Path) -> list[int]:
    """The steps whose metrics are logged. Merges have lines of their own."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    merges = [(line["step"], line["merge"]["began"]) for line in lines if "merge" in line]
    assert len(merges) == len(set(merges))
    return [line["step"] for line in lines if "merge" not in line]


@pytest.mark.parametrize("plan", ["1 2 step", "0 7 step", "1 10 merge.begin", "0 10 merge.agreed", "1 12 step"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_worker_that_fails(
    recipe: str, plan: str, tmp_path: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError, match="injected fault"):
        run(settings(tmp_path, recipe), f"fail {plan}", monkeypatch)
    assert not (tmp_path / "result.json").exists()
    assert run(settings(tmp_path, recipe))["weights_digest"] == whole[recipe]
    assert recorded(tmp_path) == list(range(1, STEPS + 1))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_worker_that_fails_under_muon(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(settings(tmp_path / "whole", recipe, optimizer="muon", checkpoint_every=0))
    config = settings(tmp_path / "failed", recipe, optimizer="muon")
    with pytest.raises(RuntimeError, match="injected fault"):
        run(config, "fail 1 14 step", monkeypatch)
    assert run(config)["weights_digest"] == whole["weights_digest"]


@pytest.mark.parametrize("steps", [1, 15])
def test_a_worker_that_fails_under_auto(steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """config.toml has what was chosen, and the same command resumes the run."""
    monkeypatch.setitem(RECIPES, "auto", "auto")
    monkeypatch.setattr(choosing, "reduce_seconds", lambda comm, most: (1.0, 1.0))
    options: dict[str, Any] = {"steps": 80, "checkpoint_every": 1}
    whole = run(settings(tmp_path / "whole", "auto", **options))
    config = settings(tmp_path / "failed", "auto", **options)
    with pytest.raises(RuntimeError, match="injected fault"):
        run(config, f"fail 1 {steps} step", monkeypatch)
    monkeypatch.setattr(faults, "_planned", faults.parse(""))
    result = run(config)
    assert result["weights_digest"] == whole["weights_digest"]
    recorded = from_toml(tmp_path / "failed" / "config.toml")
    assert recorded.recipe == result["config"]["recipe"] == "auto:every=6,wire=ternary,delay=3"


@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_a_disk_that_fails_does_not_end_the_run(
    error: str,
    tmp_path: Path,
    whole: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    result = run(settings(tmp_path), f"{error} 1 12 checkpoint.fsync", monkeypatch)
    assert result["weights_digest"] == whole["ab"]
    assert "the run continues with the older checkpoints" in caplog.text
    assert sorted(path.name[-2:] for path in (tmp_path / "checkpoints").iterdir()) == ["20", "24"]


def test_a_disk_that_fails_ends_the_run_where_that_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(tmp_path, on_checkpoint_error="stop")
    with pytest.raises(CheckpointError, match="rank 1: No space left on device") as told:
        run(config, "ENOSPC 1 12 checkpoint.write", monkeypatch)
    assert told.value.exit_code == 4
    assert sorted(path.name[-2:] for path in (tmp_path / "checkpoints").iterdir()) == ["04", "08"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 2.5 MB, which is room for some checkpoints and not for all."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system needs root and mount")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2500k", "tmpfs", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_full_ends_the_run_where_that_is_wanted(small_disk: Path, whole: dict[str, str]) -> None:
    config = settings(small_disk / "run", keep=10, on_checkpoint_error="stop")
    with pytest.raises(CheckpointError, match="No space left on device") as told:
        run(config)
    assert told.value.exit_code == 4
    kept = sorted((small_disk / "run" / "checkpoints").iterdir())
    assert kept and all((folder / "manifest.json").exists() for folder in kept)
    subprocess.run(["mount", "-o", "remount,size=10m", str(small_disk)], check=True)
    assert run(config)["weights_digest"] == whole["ab"]


def test_a_disk_that_stays_full_costs_no_weights(small_disk: Path, whole: dict[str, str]) -> None:
    """Not even the outcome can be written: the run says so at its end, and is finished once there is room."""
    config = settings(small_disk / "run", keep=10)
    filler, log_step = small_disk / "filler", RunFolder.log

    def fill(folder: RunFolder, record: Any) -> None:
        if record["step"] == 10:
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        log_step(folder, record)

    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(
            CheckpointError, match=r"the run has finished, but its model cannot be saved: .*No space left"
        ) as told,
    ):
        patch.setattr(RunFolder, "log", fill)
        run(config)
    assert told.value.exit_code == 4
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=10m", str(small_disk)], check=True)
    assert run(config)["weights_digest"] == whole["ab"]
    assert recorded(small_disk / "run") == list(range(1, STEPS + 1))


@pytest.mark.parametrize("loss", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("step", "policy", "ends"),
    [
        (2, "stop", "the loss of worker 1 is"),
        (2, "drop_worker", "the loss of worker 1 is"),
        (2, "skip", ""),
        (7, "stop", "the loss of worker 1 is"),
        (7, "drop_worker", ""),
        (7, "skip", ""),
    ],
    ids=lambda value: str(value) or "goes on",
)
def test_a_loss_that_is_not_finite(
    loss: float, step: int, policy: str, ends: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one worker, where gradients are shared (step 2) and where groups are alone (step 7)."""
    calls, loss_of = {0: 0, 1: 0}, trainers.loss_of

    def spoilt(model: Any, *arguments: Any) -> torch.Tensor:
        rank = model.communicator.rank
        calls[rank] += 1
        value = loss_of(model, *arguments)
        return value * loss if (rank, calls[rank]) == (1, step + 1) else value

    monkeypatch.setattr(trainers, "loss_of", spoilt)
    config = settings(tmp_path / "run", on_nonfinite=policy)
    if ends:
        with pytest.raises(NonFiniteError, match=f"{ends} {loss} at step {step} .*lower --lr") as told:
            run(config)
        assert told.value.exit_code == 7
    else:
        assert math.isfinite(run(config)["loss"])


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(
    tmp_path: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with pytest.raises(RuntimeError):
        run(settings(tmp_path), "fail 0 18 step", monkeypatch)
    damaged = tmp_path / "checkpoints" / "step-000000000016" / "part-1.json"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert run(settings(tmp_path))["weights_digest"] == whole["ab"]
    assert str(damaged) in caplog.text and "resuming from the checkpoint of step 12" in caplog.text


def test_a_run_with_only_damaged_checkpoints_does_not_start_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError):
        run(settings(tmp_path), "fail 0 18 step", monkeypatch)
    for part in (tmp_path / "checkpoints").glob("*/part-0.safetensors"):
        part.unlink()
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints .*part-0.safetensors is missing"):
        run(settings(tmp_path))


@pytest.mark.parametrize(("before", "workers"), [(2, 1), (2, 3), (3, 2)])
@pytest.mark.parametrize(
    ("recipe", "every", "stop", "saved", "goes_on"),
    [
        ("ab", 5, 12, 10, "step 10"),
        ("ab", 3, 17, 15, "step 15, at the last merge before it (step 13)"),
        ("ab_outer", 4, 18, 16, "step 16, at the last merge before it (step 10)"),
    ],
    ids=["at a merge", "during a round", "a merge under way"],
)
def test_another_number_of_workers(
    before: int,
    workers: int,
    recipe: str,
    every: int,
    stop: int,
    saved: int,
    goes_on: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """They go on from the newest checkpoint: from its last merge, if workers were alone when it was written."""
    caplog.set_level(logging.INFO)
    with pytest.raises(RuntimeError):
        run(
            settings(tmp_path, recipe, workers=before, checkpoint_every=every, keep=1),
            f"fail 0 {stop} step",
            monkeypatch,
        )
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"step-{saved:012d}"]
    result = run(settings(tmp_path, recipe, workers=workers, checkpoint_every=every, keep=1))
    assert (
        f"resuming from the checkpoint of {goes_on}" in caplog.text
        and "samples are divided among the new workers" in caplog.text
    )
    assert result["steps"] == STEPS and result["world_size"] == workers
    assert recorded(tmp_path) == list(range(1, STEPS + 1))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"step-{STEPS // every * every:012d}"]


def test_a_finished_run_is_not_touched(tmp_path: Path) -> None:
    first = run(settings(tmp_path))
    (problem,) = validate(settings(tmp_path))
    assert "contains a finished run, with its results in result.json: name another folder for a new run, or" in problem
    assert json.loads((tmp_path / "result.json").read_text())["weights_digest"] == first["weights_digest"]


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    with RunFolder(settings(tmp_path)), pytest.raises(ConfigurationError, match="in use by another process"):
        run(settings(tmp_path))


def test_files_of_a_run_that_are_damaged(
    tmp_path: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readable lines of the metrics stay; unreadable settings are reported."""
    with pytest.raises(RuntimeError):
        run(settings(tmp_path), "fail 0 7 step", monkeypatch)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\xfe\n{")
    kept = (tmp_path / "config.toml").read_text()
    (tmp_path / "config.toml").write_text(kept[: len(kept) // 2] + "[")
    with pytest.raises(ConfigurationError, match=r"--out .* contains a run whose config\.toml is damaged"):
        run(settings(tmp_path))
    (tmp_path / "config.toml").write_text(kept)
    assert run(settings(tmp_path))["weights_digest"] == whole["ab"]
    assert recorded(tmp_path) == list(range(1, STEPS + 1))


def test_an_evaluation_that_takes_longer_than_workers_wait(
    tmp_path: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, config = trainers.evaluate, settings(tmp_path)

    def slowly(*arguments: Any) -> Any:
        time.sleep(6)
        return evaluate(*arguments)

    monkeypatch.setattr(trainers, "evaluate", slowly)
    result = run_in_process(config.workers, lambda comm: train(config, comm), timeout=4)[0]
    assert result["weights_digest"] == whole["ab"]


def test_a_stopped_run_whose_workers_are_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun does so, whatever made them end; the next start by a person resumes."""
    monkeypatch.setattr(faults, "_planned", faults.parse("term 0 7 step"))
    with pytest.raises(StoppedError):
        train(alone(tmp_path), SingleProcess())
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(StoppedError, match="was stopped on request: run again to resume it"):
        train(alone(tmp_path), SingleProcess())
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    assert train(alone(tmp_path), SingleProcess())["steps"] == STEPS


def test_an_unfinished_run_of_other_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError):
        run(settings(tmp_path), "fail 0 9 step", monkeypatch)
    with pytest.raises(ConfigurationError, match="seed was 0 and is 1 now"):
        run(settings(tmp_path, seed=1))


def test_workers_with_different_settings(tmp_path: Path) -> None:
    def start(comm: Communicator) -> str:
        with pytest.raises(RanksDisagreeError) as told:
            agree_on_start(settings(tmp_path, seed=comm.rank, out=None), comm)
        return str(told.value)

    assert set(run_in_process(3, start)) == {
        "workers were started with different software or settings: seed is 0 on rank 0 and 1 on rank 1 and 2 on "
        "rank 2. Start all of them with the same command and the same versions"
    }


@pytest.mark.parametrize("software", ["abtrain", "torch"])
def test_workers_with_different_versions(software: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = loop.check_equal

    def other(comm: Communicator, values: dict[str, Any], *words: str) -> None:
        check(comm, values | {software: "0.0.1"} if comm.rank == 1 else values, *words)

    monkeypatch.setattr(loop, "check_equal", other)
    with pytest.raises(RanksDisagreeError, match=f"{software} is .* on rank 0 and '0.0.1' on rank 1") as told:
        run(settings(tmp_path))
    assert told.value.exit_code == 5


def broken(*arguments: Any, **options: Any) -> None:
    raise OSError(28, "No space left on device")


class Broken:
    """A tracker that fails where it is called for the first time."""

    log = finish = broken


@pytest.mark.parametrize("part", ["heading", "__enter__", "show", "__exit__", "summary", "metrics", "tracker"])
def test_what_only_shows_a_run_cannot_end_it(
    part: str,
    tmp_path: Path,
    whole: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    owner, name = (RunFolder, "log") if part == "metrics" else (Display, part)
    if part == "tracker":
        monkeypatch.setitem(trackers.TRACKERS, "broken", ("json", lambda folder, config: Broken()))
    else:
        monkeypatch.setattr(owner, name, broken)
    track = ("broken",) if part == "tracker" else ()
    assert run(settings(tmp_path, track=track))["weights_digest"] == whole["ab"]
    assert json.loads((tmp_path / "result.json").read_text())["weights_digest"] == whole["ab"]
    told = [record.getMessage() for record in caplog.records if "the run continues without it" in record.getMessage()]
    assert len(told) == 1 and "No space left on device" in told[0]


@pytest.mark.parametrize(
    ("train_samples", "test_samples", "error", "why"),
    [
        (0, 9, DataError, "0 training samples"),
        (9, 0, DataError, "and 0 test samples"),
        (2, 9, ConfigurationError, "2 training samples are too few for 3 workers: use --workers 2 or fewer"),
        (9, 9, ConfigurationError, "use a batch size of at most 3"),
    ],
    ids=["nothing to train on", "nothing to be judged by", "fewer samples than workers", "fewer than a batch each"],
)
def test_data_that_is_not_enough(
    train_samples: int, test_samples: int, error: Any, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = [Split(torch.zeros(n, 64), torch.zeros(n, dtype=torch.int64)) for n in (train_samples, test_samples)]
    task = dataclasses.replace(loop.TASKS["digits-mlp"], load=lambda folder: Data(*splits))
    monkeypatch.setitem(loop.TASKS, "digits-mlp", task)
    with pytest.raises(error, match=why) as told:
        run(settings(tmp_path / "run", workers=3))
    assert told.value.exit_code == (3 if error is DataError else 2)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("task = \"__import__('os').abort\"", "unknown task"),
        ('recipe = "os.abort"', "unknown recipe"),
        ('recipe = "ab:wire=int8; rm -rf /"', "unknown wire"),
        ("steps = 1e9999", "of the wrong type"),
        ("workers = -1", "both must be at least 1"),
        ("timeout = nan", "out of range"),
        ("lr = inf", "no finite|not a finite"),
        ('on_nonfinite = "ignore"', "of the wrong type"),
        ("[deep.er]\nkey = 1", "unknown key 'deep'"),
        ("steps = 1\nsteps = 2", "cannot be read"),
        ("\x00", "cannot be read"),
    ],
    ids=["task", "recipe", "wire", "number", "negative", "nan", "infinite", "choice", "table", "twice", "binary"],
)
def test_a_configuration_that_is_hostile_or_mistyped(content: str, why: str, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(content)
    with pytest.raises(ConfigurationError, match=why) as told:
        problems = validate(from_toml(file))
        raise ConfigurationError(problems)
    assert told.value.exit_code == 2


def alone(folder: Path) -> TrainConfig:
    return settings(folder, workers=1, checkpoint_every=3)


@pytest.mark.parametrize("name", ["term", "int"])
def test_stopped_by_a_signal(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = train(alone(tmp_path / "whole"), SingleProcess())["weights_digest"]
    monkeypatch.setattr(faults, "_planned", faults.parse(f"{name} 0 7 step"))
    with pytest.raises(StoppedError, match=f"SIG{name.upper()}.*step 8 is saved") as told:
        train(alone(tmp_path / "run"), SingleProcess())
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert outcome == {"outcome": "stopped", "exit_code": 75, "step": 8, "message": str(told.value)}
    assert str(told.value).endswith(f"step 8 is saved: the same command with --out {tmp_path / 'run'} continues")
    assert train(alone(tmp_path / "run"), SingleProcess())["weights_digest"] == expected
    assert not (tmp_path / "run" / "outcome.json").exists()


def test_a_run_without_out_says_where_it_is_saved_when_it_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(faults, "_planned", faults.parse("int 0 7 step"))
    config = dataclasses.replace(alone(tmp_path), out=None)
    with pytest.raises(StoppedError, match=r"the same command with --out .* continues") as told:
        train(config, SingleProcess())
    (folder,) = (tmp_path / "runs").iterdir()
    assert f"--out {folder} continues" in str(told.value)
    assert train(dataclasses.replace(config, out=folder), SingleProcess())["steps"] == config.steps


def test_a_second_signal_does_not_wait_and_tears_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "SAME_REQUEST_SECONDS", 2.0)  # there are three pauses of a second before the second
    slow = "; ".join(f"slow 0 8 checkpoint.{point}" for point in ("prepare", "write", "fsync"))
    monkeypatch.setattr(faults, "_planned", faults.parse(f"term 0 7 step; {slow}; int 0 8 checkpoint.fsync"))
    with pytest.raises(StoppedError, match=r"at once on a second request \(SIGINT\)"):
        train(alone(tmp_path), SingleProcess())
    saved = checkpoint.latest(tmp_path / "checkpoints", SingleProcess())
    assert saved is not None and saved.step == 6
    assert json.loads((tmp_path / "outcome.json").read_text())["exit_code"] == 75


def test_a_plot_that_fails_costs_no_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(arguments, "system_problems", list)
    comparison = requested(["ab_outer", "ab:sigma_cutoff=0.3", "--steps", "50", "--out", str(tmp_path)])
    monkeypatch.setattr(plots, "_phases", broken)
    assert len(write_results(comparison, outcomes(), "abtrain compare")) == 5
    assert len(json.loads((tmp_path / "compare.json").read_text())["runs"]) == 10
    assert "bytes-by-phase.png failed (OSError: [Errno 28] No space left on device)" in caplog.text
    page = (tmp_path / "report.html").read_text()
    assert page.count("<figure>") == 4 and "Accuracy over wire bytes" in page
