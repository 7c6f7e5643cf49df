"""Run folders: left by a crash at any moment, replaced, filled with checkpoints of other runs, and full of links."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore

from abtrain import failpoints as faults
from abtrain.comm.communicator import SingleProcess
from abtrain.commands.files import read_regular, whole_file, write_whole
from abtrain.commands.train import checkpoints as saving
from abtrain.commands.train.config import MAY_CHANGE_ON_RESUME, TrainConfig, identity, resolve
from abtrain.commands.train.config_problems import validate
from abtrain.commands.train.join import launch_of
from abtrain.commands.train.loop import train
from abtrain.commands.train.run_folder import RunFolder
from abtrain.commands.train.watchdog import Watchdog
from abtrain.errors import CheckpointError, ConfigurationError
from tests import forks
from tests.faults.processes import start

STEPS = 6


def settings(folder: Path, **changed: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "recipe": "ddp",
        "workers": 1,
        "steps": STEPS,
        "device": "cpu",
        "log_every": 1,
        "checkpoint_every": 2,
    }
    return resolve(TrainConfig(out=folder, **values | changed))


def run(config: TrainConfig, launch: str = "") -> dict[str, Any]:
    assert validate(config) == []
    return train(config, SingleProcess(), launch=launch)


def stopped_at(step: int, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that fails before it ends."""
    monkeypatch.setattr(faults, "_planned", faults.parse(f"fail 0 {step} step"))
    with pytest.raises(RuntimeError, match="injected fault"):
        run(config)


def steps_saved(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))


LEFT: dict[str, Callable[[Path], object]] = {
    "a lock": lambda folder: (folder / ".lock").touch(),
    "a partial file": lambda folder: (folder / ".config.toml.0123456789abcdef.partial").write_text("recipe ="),
    "a partial file of an earlier version": lambda folder: (folder / "config.toml.partial").write_text("recipe ="),
    "empty metrics": lambda folder: (folder / "metrics.jsonl").touch(),
    "empty settings": lambda folder: (folder / "config.toml").touch(),
    "the outcome of a stop before it began": lambda folder: (folder / "outcome.json").write_text("{}"),
    "stacks": lambda folder: (folder / "stacks-rank1.txt").write_text("Thread"),
    "no checkpoints": lambda folder: (folder / "checkpoints").mkdir(),
    "half a checkpoint": lambda folder: (folder / "checkpoints" / ".writing-step-000000000002").mkdir(parents=True),
    "replaced checkpoints": lambda folder: (folder / ".old-checkpoints" / "step-000000000002").mkdir(parents=True),
}


@pytest.mark.parametrize("left", LEFT)
def test_leftovers_of_a_crash_before_the_run_do_not_block_the_next(left: str, tmp_path: Path) -> None:
    LEFT[left](tmp_path)
    (tmp_path / ".lock").touch()
    assert run(settings(tmp_path))["steps"] == STEPS
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "name", ["notes.txt", ".hidden", "checkpoints/step-000000000002/manifest.json", "metrics.jsonl"]
)
def test_files_of_others_are_left_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    (tmp_path / ".lock").touch()
    assert any("is not empty" in problem for problem in validate(settings(tmp_path)))


FILE_EVENTS = ("open", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.listdir", "os.scandir")


def _begin(config: TrainConfig, launch: str, last: int) -> None:
    """Begins a run, in a process that dies when it touches the folder for the `last`th time."""
    left = last

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event in FILE_EVENTS and str(config.out) in str(arguments[0]):
            left -= 1
            if left < 0:
                os._exit(9)

    sys.addaudithook(count)
    RunFolder(config, launch).begin(0)
    os._exit(0)


def crashes(config: TrainConfig, launch: str, prepare: Callable[[], None], check: Callable[[], None]) -> int:
    """Begins a run again and again, and lets it die at a later moment each time; how many moments there were."""
    for moment in range(200):
        prepare()
        process = forks.context().Process(target=_begin, args=(config, launch, moment))
        process.start()
        process.join(60)
        check()
        if process.exitcode == 0:
            return moment
    raise AssertionError("it never came to its end")


def test_a_crash_at_any_moment_of_the_beginning_blocks_no_later_start(tmp_path: Path) -> None:
    config = settings(tmp_path / "run")

    def check() -> None:
        assert validate(config) == []
        with RunFolder(config) as folder:
            folder.begin(0)
        assert sorted(path.name for path in folder.path.iterdir()) == ["config.toml", "metrics.jsonl"]

    assert crashes(config, "", lambda: shutil.rmtree(tmp_path / "run", ignore_errors=True), check) > 5


@pytest.mark.parametrize("finished", [True, False], ids=["a finished run", "an unfinished run"])
def test_a_crash_at_any_moment_of_an_overwrite_brings_the_old_run_back_nowhere(finished: bool, tmp_path: Path) -> None:
    """The next attempt either overwrites or resumes what its own launch wrote; it never finds old checkpoints."""
    config, old = settings(tmp_path / "run", overwrite=True), tmp_path / "old"
    run(settings(old))
    if not finished:
        (old / "result.json").unlink()

    def prepare() -> None:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(old, tmp_path / "run")

    def check() -> None:
        assert validate(config) == []
        with RunFolder(config, "this launch") as folder:
            if folder.resumes:
                assert not (folder.path / "checkpoints").exists()
            folder.begin(0)
        assert sorted(path.name for path in folder.path.iterdir()) == ["config.toml", "metrics.jsonl"]

    assert crashes(config, "this launch", prepare, check) > 5


def test_an_overwrite_is_done_once_for_all_attempts_of_a_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tmp_path, overwrite=True)
    stopped_at(5, settings(tmp_path), monkeypatch)
    assert steps_saved(tmp_path) == [2, 4]
    for launch, goes_on in (("a", False), ("a", True), ("a", True), ("b", False), ("", False), ("", False)):
        with RunFolder(config, launch) as folder:
            assert folder.resumes is goes_on, launch
            folder.begin(1 if goes_on else 0)
    assert not (tmp_path / "checkpoints").exists()
    # A person who runs the command without --overwrite resumes whatever is there.
    with RunFolder(settings(tmp_path)) as folder:
        assert folder.resumes


def test_attempts_of_a_launch_know_each_other_by_the_launchers_store() -> None:
    store, other = HashStore(), HashStore()
    first = launch_of(store, 0, 2)
    assert first and launch_of(store, 0, 2) == first != launch_of(other, 0, 2)


def test_a_worker_killed_before_it_has_overwritten_brings_the_old_run_back_nowhere(tmp_path: Path) -> None:
    train = ("train", "ddp", "--workers", "2", "--steps", "30", "--log-every", "1", "--checkpoint-every", "10")
    old = start(tmp_path, *train, "--out", "run", plan="kill 1 25 step").wait()
    assert old.code == 6 and steps_saved(tmp_path / "run") == [10, 20]
    again = start(tmp_path, *train, "--out", "run", "--overwrite", "--max-restarts", "1")
    while not again.workers():
        assert again.process.is_alive()
    os.kill(again.workers()[0], 9)
    ended = again.wait()
    assert ended.code == 0, ended.err
    assert "restarting all workers" in ended.err and "resuming" not in ended.err
    assert [line.split()[1] for line in ended.out.splitlines() if line.startswith("step")] == [
        f"{step}/30" for step in range(1, 31)
    ]


def test_attempts_after_the_overwrite_go_on(tmp_path: Path) -> None:
    train = ("train", "ddp", "--workers", "2", "--steps", "30", "--checkpoint-every", "10", "--out", "run")
    assert start(tmp_path, *train, plan="kill 1 25 step").wait().code == 6
    plan = "kill 0 12 step|kill 1 17 step|kill 1 22 step"
    ended = start(tmp_path, *train, "--overwrite", "--max-restarts", "3", plan=plan).wait()
    assert ended.code == 0, ended.err
    assert [line.rpartition(" ")[2] for line in ended.err.splitlines() if "resuming from" in line] == ["10", "10", "20"]


FOREIGN = {
    "seed": 1,
    "lr": 0.01,
    "batch_size": 16,
    "precision": "bf16",
    "weight_decay": 0.3,
    "clip": 0.5,
    "init": "orthogonal",
    "on_nonfinite": "skip",
    "recipe": "ddp:wire=bf16",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_checkpoints_of_another_run_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    other = settings(theirs, **{name: FOREIGN[name]})
    stopped_at(5, settings(mine), monkeypatch)
    stopped_at(5, other, monkeypatch)
    shutil.rmtree(mine / "checkpoints")
    shutil.copytree(theirs / "checkpoints", mine / "checkpoints")
    values = identity(other)[name], identity(settings(mine))[name]
    with pytest.raises(CheckpointError, match="belongs to another run") as told:
        run(settings(mine))
    assert f"({name} was {values[0]!r} and is {values[1]!r} now)" in str(told.value)
    assert told.value.exit_code == 4 and str(mine / "checkpoints") in str(told.value)


def test_checkpoints_on_other_data_and_without_settings_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(saving, "identity", lambda config: {**identity(config), "steps": 7})
        stopped_at(3, settings(tmp_path / "a"), patch)
    with pytest.raises(CheckpointError, match="steps was 7 and is 6 now"):
        run(settings(tmp_path / "a"))
    stopped_at(3, settings(tmp_path / "b"), monkeypatch)
    monkeypatch.setattr("abtrain.commands.train.loop.len", lambda of: 9, raising=False)
    with pytest.raises(CheckpointError, match=r"samples was \d+ and is 9 now"):
        run(settings(tmp_path / "b"))


def test_everything_that_says_what_is_computed_identifies_a_run() -> None:
    config = settings(Path("run"))
    named = {field.name for field in dataclasses.fields(TrainConfig)}
    assert identity(config).keys() == named - MAY_CHANGE_ON_RESUME
    assert {"recipe", "task", "seed", "lr", "batch_size", "precision", "group_size", "steps"} <= identity(config).keys()


def link(place: Path, victim: Path) -> None:
    place.symlink_to(victim)


def dangling(place: Path, victim: Path) -> None:
    place.symlink_to(victim.with_name("new"))


def pipe(place: Path, victim: Path) -> None:
    os.mkfifo(place)


OURS = ["config.toml", "metrics.jsonl", "result.json", "outcome.json", "stacks-rank0.txt", ".lock", "checkpoints"]
TEMPORARY = ["config.toml.partial", "metrics.jsonl.partial", "result.json.partial", "outcome.json.partial"]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("put", [link, dangling, pipe])
@pytest.mark.parametrize("name", [*OURS, *TEMPORARY])
@pytest.mark.parametrize("overwrite", [True, False], ids=["overwrite", "go on"])
def test_what_stands_in_the_place_of_a_file_is_not_followed(
    overwrite: bool, name: str, put: Callable[[Path, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is replaced or refused: nothing outside of the folder changes, and nobody waits for a pipe."""
    folder, outside = tmp_path / "run", tmp_path / "outside"
    outside.mkdir()
    victim = outside / "victim"
    if name == "checkpoints":
        victim.mkdir()
        (victim / "step-000000000001").mkdir()
    else:
        victim.write_text("precious")
    stopped_at(5, settings(folder), monkeypatch)
    if (folder / name).is_dir():
        shutil.rmtree(folder / name)
    (folder / name).unlink(missing_ok=True)
    put(folder / name, victim)
    config = settings(folder, overwrite=overwrite)
    refused = validate(config)
    try:
        if not refused:
            run(config)
    except ConfigurationError as error:
        refused = list(error.problems)
    Watchdog(30, "rank 0", folder / "stacks-rank0.txt").dump()
    if refused:
        assert name in refused[0] or "not empty" in refused[0]
    else:
        assert not (folder / name).is_symlink() or name in TEMPORARY
        assert (folder / "result.json").is_file()
    assert [path.name for path in outside.iterdir()] == ["victim"]
    if name == "checkpoints":
        assert [path.name for path in victim.iterdir()] == ["step-000000000001"]
    else:
        assert victim.read_text() == "precious"


def test_a_run_folder_may_be_a_link_to_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to("disk")
    stopped_at(5, settings(tmp_path / "run"), monkeypatch)
    assert run(settings(tmp_path / "run"))["steps"] == STEPS
    assert (tmp_path / "disk" / "result.json").is_file() and (tmp_path / "run").is_symlink()


@pytest.mark.parametrize("suffix", [".partial", ".tmp", "~", ".0.partial"])
def test_a_file_is_written_under_a_name_that_nobody_can_prepare(suffix: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / f"a.txt{suffix}").symlink_to(victim)
    write_whole(tmp_path / "a.txt", "new")
    assert victim.read_text() == "precious" and (tmp_path / "a.txt").read_text() == "new"


def test_a_written_file_has_the_mode_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "a.txt", "")
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o640


def test_a_file_that_is_not_completed_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "a.txt") as file:
        file.write("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    raised: list[OSError] = []

    def read() -> None:
        with pytest.raises(OSError, match="not a regular file") as error:
            read_regular(tmp_path / "pipe")
        raised.append(error.value)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(10)
    assert raised and raised[0].filename == str(tmp_path / "pipe")
