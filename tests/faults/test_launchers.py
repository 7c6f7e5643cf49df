"""Garbled environment variables and command lines, from launchers or users."""

from __future__ import annotations

import importlib
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from abtrain import errors
from abtrain import failpoints as faults
from abtrain.comm.communicator import SingleProcess
from abtrain.commands import cli
from abtrain.commands.paper import launcher as paper_launcher
from abtrain.commands.paper.experiments import Cell
from abtrain.commands.paper.launcher import exit_code_of
from abtrain.commands.paper.runs import PaperRun, run_all
from abtrain.commands.process import stopped_by_signals
from abtrain.commands.train.config import TrainConfig, resolve
from abtrain.commands.train.config_problems import validate
from abtrain.commands.train.launch import FAILURE, note_failure
from abtrain.commands.train.world import WorldError, check_world, joined_world
from abtrain.errors import ConfigurationError
from tests.faults.processes import start

GOOD = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "ABTRAIN_ATTEMPT": "1",
}
NUMBERS = [name for name in GOOD if name != "MASTER_ADDR"]


@pytest.mark.parametrize(
    "text", ["", "one", "-1", "1.0", " 1", "+1", "0x1", "1e9", "\uff11", "99999999999999999999", "9" * 5000]
)
@pytest.mark.parametrize("name", NUMBERS)
def test_a_variable_that_is_no_number_that_it_can_be(name: str, text: str) -> None:
    with pytest.raises(WorldError) as told:
        check_world(GOOD | {name: text})
    mine = [problem for problem in told.value.problems if problem.startswith(f"{name} is {text!r}, ")]
    assert len(mine) == 1
    assert re.search(
        r"must be a whole number from \d+ to \d+( \(below \w+\))?: (start workers with torchrun|unset it)", mine[0]
    )
    assert told.value.exit_code == 2


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"RANK": "2"}, "RANK is '2', but must be a whole number from 0 to 1 (below WORLD_SIZE)"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', but must be a whole number from 1"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK is '2', but must be a whole number from 0 to 1 (below LOCAL_WORLD_SIZE)"),
        ({"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE is '3', but must be a whole number from 1 to 2"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT is '65536', but must be a whole number from 1 to 65535"),
        ({"MASTER_PORT": None}, "MASTER_PORT is not set, but must be"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set, but must name the host"),
        ({"MASTER_ADDR": " "}, "MASTER_ADDR is ' ', but must name the host"),
        ({"RANK": None}, "WORLD_SIZE is '2', but RANK is not set: set both, or neither"),
        ({"WORLD_SIZE": None}, "RANK is '1', but WORLD_SIZE is not set: set both, or neither"),
    ],
)
def test_variables_that_do_not_go_together(changed: dict[str, str | None], told: str) -> None:
    held = {name: text for name, text in (GOOD | changed).items() if text is not None}
    with pytest.raises(WorldError) as error:
        check_world(held)
    assert told in str(error.value)


def test_variables_that_make_sense(monkeypatch: pytest.MonkeyPatch) -> None:
    check_world({})
    check_world({"LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RESTART_COUNT": "3"})
    for name, text in GOOD.items():
        monkeypatch.setenv(name, text)
    assert joined_world() == (1, 2, 1)
    monkeypatch.delenv("MASTER_ADDR")
    assert joined_world(at_master=False) == (1, 2, 1)


@pytest.mark.parametrize("name", NUMBERS)
def test_the_command_reports_the_bad_variable_on_every_worker(name: str, tmp_path: Path) -> None:
    ended = start(tmp_path, "train", "ddp", "--out", "run", environment=GOOD | {name: "many"}).wait(60)
    assert ended.code == 2 and ended.out == ""
    assert ended.err.startswith(f"abtrain: error: {name} is 'many', but must be a whole number")
    assert len(ended.err.splitlines()) == 1 and not (tmp_path / "run").exists()


PLANS = {
    "boom": "'boom' cannot be read: it has 1 words, but a fault has 4: ACTION RANK STEP POINT",
    "kill 1 12": "'kill 1 12' cannot be read: it has 3 words",
    "kill 1 12 step now": "it has 5 words",
    "kil 1 12 step": "unknown action 'kil': did you mean 'kill'?",
    "ENOSPACE 1 12 step": "unknown action 'ENOSPACE': ",
    "kill one 12 step": "rank 'one' is not a whole number",
    "kill -1 12 step": "rank '-1' is not a whole number",
    "kill 1 1.5 step": "step '1.5' is not a whole number of at least 0, or *",
    "kill 1 12 merge.begins": "unknown point 'merge.begins': did you mean 'merge.begin'?",
    "kill 1 12 step | kill 1 12 stp": "unknown point 'stp': did you mean 'step'?",
}


@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_of_faults_that_cannot_be_read(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing the library never fails because of it; the error is raised where a fault would happen."""
    monkeypatch.setenv(faults.VARIABLE, plan)
    try:
        importlib.reload(faults)
        with pytest.raises(ConfigurationError) as error:
            faults.fail_at(0, 0, "step")
        assert str(error.value).startswith("ABTRAIN_FAULTS: '") and PLANS[plan] in str(error.value)
        with pytest.raises(ConfigurationError):
            faults.check()
    finally:
        monkeypatch.undo()
        faults.load()


def test_all_errors_in_a_plan_are_reported_at_once() -> None:
    with pytest.raises(ConfigurationError) as error:
        faults.parse("kill one * nowhere; EIO 0 3 checkpoint.write; x 0 0 step")
    assert len(error.value.problems) == 3


def test_the_command_refuses_a_plan_that_cannot_be_read(tmp_path: Path) -> None:
    ended = start(tmp_path, "train", "ddp", "--out", "run", plan="kill 1 7").wait(60)
    assert ended.code == 2
    assert ended.err.startswith("abtrain: error: ABTRAIN_FAULTS: 'kill 1 7' cannot be read: it has 3 words")
    assert not (tmp_path / "run").exists()


def test_restarts_that_are_no_number_matter_only_to_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "twice")
    monkeypatch.delenv(faults.VARIABLE, raising=False)
    try:
        faults.load()
        faults.fail_at(0, 0, "step")
        monkeypatch.setenv(faults.VARIABLE, "kill 9 9 step")
        faults.load()
        with pytest.raises(ConfigurationError, match="TORCHELASTIC_RESTART_COUNT is 'twice'"):
            faults.fail_at(0, 0, "step")
    finally:
        monkeypatch.undo()
        faults.load()


def test_every_place_where_faults_happen_is_known() -> None:
    source = Path(faults.__file__).parent
    named = {
        point
        for path in source.rglob("*.py")
        for call in re.findall(r"fail_at\([^\n]*\)", path.read_text())
        for point in re.findall(r'"([a-z.]+)"', call)
    }
    assert named == set(faults.POINTS)


BYTES = os.fsdecode(b"bad\xff")


@pytest.mark.parametrize("option", ["out", "data", "task", "recipe", "track"])
def test_names_that_are_not_utf_8(option: str) -> None:
    value = (BYTES,) if option == "track" else Path(BYTES) if option in ("out", "data") else BYTES
    (problem,) = validate(TrainConfig(**{option: value}))  # type: ignore[arg-type]
    assert problem == f"--{option} 'bad\\udcff' is not UTF-8, but config.toml must be: use a name in UTF-8"


def test_a_file_of_settings_whose_name_is_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / BYTES).write_text("steps = 2\nworkers = 2\n")
    assert start(tmp_path, "train", "ddp", "--config", BYTES, "--out", "run").wait(60).code == 0
    missing = start(tmp_path, "train", "ddp", "--config", f"no{BYTES}", "--out", "other").wait(60)
    assert missing.code == 2 and "--config nobad" in missing.err and "cannot be read" in missing.err


@pytest.mark.skipif(sys.platform == "darwin", reason="file names are UTF-8 there")
def test_a_working_folder_whose_name_is_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / BYTES).mkdir()
    assert start(tmp_path / BYTES, "train", "ddp", "--steps", "2", "--workers", "2", "--out", "run").wait(60).code == 0


def test_settings_in_a_run_folder_that_are_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes(b'recipe = "a\xff"\n')
    from abtrain.commands.train.loop import train

    config = resolve(TrainConfig("ddp", workers=1, steps=2, device="cpu", out=tmp_path))
    with pytest.raises(ConfigurationError, match=r"config\.toml is damaged \(it is not UTF-8"):
        train(config, SingleProcess())


def test_each_worker_speaks_of_its_own_variables(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert cli._fail(WorldError("LOCAL_RANK is 'x'")) == errors.ConfigurationError.exit_code
    assert capsys.readouterr().err == "abtrain: error: LOCAL_RANK is 'x'\n"


# Launchers of the paper's real runs

SAVES = """
import os, pathlib, signal, sys, time
def save(*_):
    pathlib.Path("saved").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, signal.SIG_IGN if sys.argv[1:] else save)
pathlib.Path("begun").write_text(str(os.getpid()))
pathlib.Path("begun").rename("running")
time.sleep(60)
"""


@pytest.mark.parametrize("deaf", [(), ("deaf",)], ids=["saves", "deaf"])
def test_a_launcher_may_save_before_it_ends(
    deaf: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if deaf:
        monkeypatch.setattr(paper_launcher, "_GRACE_SECONDS", 0.1)

    def ask_to_stop() -> None:
        while not Path("running").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=ask_to_stop)
    thread.start()
    with pytest.raises(errors.StoppedError), stopped_by_signals():
        exit_code_of((sys.executable, "-c", SAVES, *deaf), tmp_path / "failure")
    thread.join()
    assert Path("saved").exists() != bool(deaf)
    with pytest.raises(ProcessLookupError):
        os.kill(int(Path("running").read_text()), 0)


def test_the_worker_that_fails_first_is_the_one_that_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAILURE, str(tmp_path / "failure"))
    note_failure(errors.NonFiniteError("the loss is nan"))
    note_failure(errors.PeerLostError("rank 1 is gone"))
    assert (tmp_path / "failure").read_text() == "7"


def test_a_real_run_that_diverges_is_told_apart(tmp_path: Path) -> None:
    """torchrun itself exits with 1."""
    config = TrainConfig("ddp", workers=1, group_size=1, steps=5, batch_size=16, lr=1e30, device="cpu")
    run = PaperRun(Cell("global", "MLP", "ddp", 1, config), 0, tmp_path / "run")
    launcher = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node {{workers_per_node}}"
    with pytest.raises(errors.AbtrainError, match="ended with exit code 7") as told:
        run_all([run], "full", launcher, None, lambda line: None)
    assert told.value.exit_code == 7
    assert not (run.folder / ".failed").exists()
