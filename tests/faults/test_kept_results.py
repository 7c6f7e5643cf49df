"""`abtrain compare` and `abtrain paper` keep every run that its user has not given up."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from abtrain import __version__, recipes
from abtrain.commands import cli
from abtrain.commands.compare import command as compare
from abtrain.commands.compare import runs
from abtrain.commands.compare.contestants import Contestant
from abtrain.commands.compare.runs import ComparisonRun, outcome
from abtrain.commands.lab import LabConfig
from abtrain.commands.paper.experiments import Cell
from abtrain.commands.paper.published import AB
from abtrain.commands.paper.runs import PaperRun, prepare_folder, run_all
from abtrain.commands.runs.folder_run import check_folders
from abtrain.commands.runs.request import request_differences
from abtrain.commands.tasks.task import TASKS
from abtrain.commands.train.config import TrainConfig, resolve
from abtrain.commands.train.config_file import from_toml, to_toml
from abtrain.commands.train.run_folder import RunFolder
from abtrain.errors import ConfigurationError
from tests.faults.kept_runs import CONFIG, StandInLab, compared, contents, finish, full_run, put_result


class NoLab:
    """In place of a lab, where none is to be built."""

    def __init__(self, *arguments: object) -> None:
        raise AssertionError("a lab was built")


def defaults_left_out(text: str) -> str:
    left_out = {"weight_decay", "clip", "precision", "init", "lr", "seed"}
    return "\n".join(line for line in text.splitlines() if line.split(" ")[0] not in left_out)


EDITS: dict[str, Callable[[str], str]] = {
    "a comment": lambda text: f"# mine\n{text}",
    "another order": lambda text: "\n".join(reversed(text.splitlines())),
    "checkpoints": lambda text: text + "checkpoint_every = 500\nkeep = 9\n",
    "another machine": lambda text: text + 'device = "cpu"\ntimeout = 30\nloaders = 0\n',
    "defaults left out": defaults_left_out,
    "all written out": lambda text: to_toml(resolve(dataclasses.replace(CONFIG, device="cpu"))),
    "as before defaults were resolved": lambda text: to_toml(CONFIG),
    "numbers written otherwise": lambda text: text.replace("lr = 0.003", "lr = 3e-3").replace("200", "2_00"),
}


@pytest.mark.parametrize("record", ["with a record", "without one"])
@pytest.mark.parametrize("edit", EDITS)
def test_requests_that_ask_for_the_same(edit: str, record: str, task: ComparisonRun) -> None:
    request = task.folder / "request.toml"
    request.write_text(EDITS[edit](request.read_text()))
    if record == "without one":
        (task.folder / "request.json").unlink()
    before = contents(task.folder)
    assert task.done
    check_folders([task], overwrite=False)
    assert contents(task.folder) == before and outcome(task).wire_bytes == 2000


DIFFERENCES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a rate": (lambda file: file.write_text(file.read_text().replace("lr = 0.003", "lr = 0.001")), "lr was 0.001"),
    "workers": (lambda file: file.write_text(file.read_text().replace("workers = 2", "workers = 4")), "workers was 4"),
    "another task": (
        lambda file: file.write_text(file.read_text().replace("digits-mlp", "no-such-task")),
        "task was 'no-such-task' and is 'digits-mlp' now",
    ),
    "an unknown key": (lambda file: file.write_text(file.read_text() + "extra_field = 1\n"), "extra_field was 1"),
    "a wrong type": (lambda file: file.write_text(file.read_text() + 'keep = "two"\n'), "keep = 'two' is of the wrong"),
    "no TOML": (lambda file: file.write_text(file.read_text() + "[[["), "request.toml cannot be parsed"),
    "no UTF-8": (lambda file: file.write_bytes(b"\xff\xfe"), "it is not UTF-8"),
    "empty": (lambda file: file.write_text(""), "steps was"),
    "a FIFO": (lambda file: (file.unlink(), os.mkfifo(file)), "is not a regular file"),
    "a folder": (lambda file: (file.unlink(), file.mkdir()), "is not a regular file"),
    "a link": (lambda file: (file.rename(file.with_name("r")), file.symlink_to("r")), "cannot be opened"),
}


@pytest.mark.parametrize("record", ["with a record", "without one"])
@pytest.mark.parametrize("kind", DIFFERENCES)
def test_runs_with_other_settings_are_refused_by_name(kind: str, record: str, task: ComparisonRun) -> None:
    spoil, named = DIFFERENCES[kind]
    spoil(task.folder / "request.toml")
    if record == "without one":
        (task.folder / "request.json").unlink()
    before = contents(task.folder / "train")
    assert not task.done
    with pytest.raises(ConfigurationError) as told:
        check_folders([task], overwrite=False)
    assert len(told.value.problems) == 1
    assert named in str(told.value) and str(task.folder) in str(told.value) and "--overwrite" in str(told.value)
    with pytest.raises(ConfigurationError, match="--overwrite"):
        runs.run_in_lab(task, StandInLab(LabConfig(nodes=2)))  # type: ignore[arg-type]
    assert contents(task.folder / "train") == before


def test_a_folder_without_a_request_is_not_ours(task: ComparisonRun) -> None:
    for name in ("request.toml", "request.json"):
        (task.folder / name).unlink()
    with pytest.raises(ConfigurationError, match=r"request.toml is missing"):
        check_folders([task], overwrite=False)


def test_a_crash_while_the_first_request_is_written_does_not_block_the_run(task: ComparisonRun) -> None:
    shutil.rmtree(task.folder)
    task.folder.mkdir()
    (task.folder / ".request.toml.0123456789abcdef.partial").write_text("recipe =")
    assert task.refusal() is None
    check_folders([task], overwrite=False)


@pytest.mark.parametrize("record", [b"", b"[]", b"\xff", b'{"abtrain": 1, "settings": {}}', b'{"settings": []}'])
def test_a_record_that_is_damaged(record: bytes, task: ComparisonRun) -> None:
    (task.folder / "request.json").write_bytes(record)
    assert not task.done
    with pytest.raises(ConfigurationError, match=r"request.json is damaged"):
        check_folders([task], overwrite=False)


def test_a_request_of_another_version(task: ComparisonRun) -> None:
    """It may have settings that this one does not know; one that its user has added is named all the same."""
    record, request = task.folder / "request.json", task.folder / "request.toml"
    content = json.loads(record.read_text())
    content["abtrain"], content["settings"]["grafting"] = "9.9", "none"
    del content["settings"]["on_bad_image"]  # which came later
    record.write_text(json.dumps(content))
    request.write_text(request.read_text() + 'grafting = "none"\n')
    assert task.done
    request.write_text(request.read_text() + "extra_field = 1\n")
    assert not task.done and request_differences(task.folder, task.config) == [
        f"extra_field was 1 and is unknown to abtrain {__version__}"
    ]


@pytest.mark.parametrize("record", ["with a record", "the result alone says it"])
@pytest.mark.parametrize("name", ["lr", "batch_size", "weight_decay", "steps"])
def test_a_default_of_the_task_that_has_changed(
    name: str, record: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(recipe="ddp", workers=2)
    task = ComparisonRun(Contestant("ddp", config), 0, 10**8, tmp_path / "ddp")
    trained = dataclasses.asdict(resolve(dataclasses.replace(config, device="cpu")))
    if record != "with a record":
        task.folder.mkdir()
        (task.folder / "request.toml").write_text(to_toml(config))
    finish(task, config=trained)
    assert task.done
    before = getattr(TASKS["digits-mlp"], name)
    monkeypatch.setitem(TASKS, "digits-mlp", dataclasses.replace(TASKS["digits-mlp"], **{name: before * 2}))
    assert not task.done
    assert request_differences(task.folder, task.config) == [f"{name} was {before!r} and is {before * 2!r} now"]


def test_a_default_of_the_recipe_that_has_changed(task: ComparisonRun, monkeypatch: pytest.MonkeyPatch) -> None:
    build = recipes.build

    def changed(name: str, steps: int, **options: Any) -> Any:
        return build(name, steps, **{"outer_momentum": 0.5} | options)

    monkeypatch.setattr(recipes, "build", changed)
    assert not task.done
    said = request_differences(task.folder, task.config)
    assert said == [
        f"recipe.{part}[0].sync.merge.momentum was 0.8 and is 0.5 now, since its default has changed"
        for part in ("prologue", "cycle")
    ]


def test_a_field_that_recipes_have_in_another_version(task: ComparisonRun) -> None:
    record = task.folder / "request.json"
    content = json.loads(record.read_text())
    content["recipe"]["cycle"][0]["grafting"] = None
    del content["recipe"]["cycle"][0]["factor_lr"]
    record.write_text(json.dumps(content))
    assert task.done
    content["recipe"]["cycle"][0]["steps"] += 1
    record.write_text(json.dumps(content))
    (said,) = request_differences(task.folder, task.config)
    assert said.startswith("recipe.cycle[0].steps was ")


@pytest.mark.parametrize("recipe", [None, 3, [], {}, {"kind": "Recipe", "cycle": {}}, {"kind": ["Recipe"]}])
def test_a_recorded_recipe_that_cannot_be(recipe: object, task: ComparisonRun) -> None:
    record = task.folder / "request.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"recipe": recipe}))
    assert not task.done and request_differences(task.folder, task.config)[0].startswith("recipe")


def test_a_link_to_the_runs_of_another_disk(task: ComparisonRun, tmp_path: Path) -> None:
    shutil.move(task.folder, tmp_path / "elsewhere")
    task.folder.symlink_to(tmp_path / "elsewhere")
    assert task.done
    request = task.folder / "request.toml"
    request.write_text(request.read_text().replace("0.003", "0.001"))
    task.make_room(overwrite=True)
    assert not task.folder.exists() and (tmp_path / "elsewhere/train/result.json").exists()


def test_all_obstacles_are_reported_before_a_lab_is_built(
    tmp_path: Path, labs: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compared(tmp_path) == 0 and len(labs) == 4
    monkeypatch.setattr(compare, "Lab", NoLab)
    assert compared(tmp_path) == 0
    assert "4 runs, 4 of them already finished" in capsys.readouterr().out
    for request in tmp_path.rglob("request.toml"):
        request.write_text(request.read_text() + "extra_field = 1\n")
    before = contents(tmp_path / "runs")
    assert compared(tmp_path, "--seeds", "2") == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4 and all("extra_field was 1" in line and "--overwrite" in line for line in said)
    assert contents(tmp_path / "runs") == before


def test_overwrite_replaces_what_differs_and_nothing_else(finished: Path, labs: list[str]) -> None:
    (finished / "runs/mine").mkdir()
    (finished / "runs/mine/notes.txt").write_text("what I saw")
    assert compared(finished, "--lr", "ab_outer=1e-3") == 2 and labs == []
    before = contents(finished / "runs")
    assert compared(finished, "--lr", "ab_outer=1e-3", "--overwrite") == 0
    assert labs == ["ab_outer-seed0-100mbit"]
    after = contents(finished / "runs")
    assert {name for name in before if before[name] != after.get(name)} == {
        f"ab_outer-seed0-100mbit/{name}" for name in ("request.toml", "request.json", "train/result.json")
    }


def test_a_stopped_run_of_the_same_settings_is_run_again(finished: Path, labs: list[str]) -> None:
    folder = finished / "runs/ab_outer-seed0-100mbit"
    (folder / "train/result.json").unlink()
    (folder / "lab/lab.json").unlink()
    (folder / "notes.txt").write_text("what I saw")
    assert compared(finished) == 0 and labs == [folder.name]
    assert (folder / "notes.txt").exists()


@pytest.mark.parametrize("missing", ["lab/lab.json", "train/metrics.jsonl"])
def test_a_result_is_never_removed_for_what_it_lacks(
    missing: str, finished: Path, labs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished / "runs/ab_outer-seed0-100mbit"
    (folder / missing).unlink()
    for more in ((), ("--overwrite",)):
        assert compared(finished, *more) == 3 and labs == []
        assert f"{folder / missing} is missing" in capsys.readouterr().err
    assert (folder / "train/result.json").exists()


def test_a_comparison_in_use(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another process would take its unfinished runs for abandoned ones."""
    with (finished / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert compared(finished) == 2
    assert "in use by another process" in capsys.readouterr().err


@pytest.mark.parametrize("more", [(), ("--lr", "ab_outer=1e-3", "--overwrite")], ids=["unfinished", "given up"])
def test_a_run_that_is_under_way(
    more: tuple[str, ...], finished: Path, labs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    train = finished / "runs/ab_outer-seed0-100mbit/train"
    (train / "result.json").unlink()
    with RunFolder(dataclasses.replace(CONFIG, out=train)) as folder:
        folder.begin(0)
        assert compared(finished, *more) == 2 and labs == []
        assert (train / "config.toml").exists()
    assert f"{train} is in use by another process" in capsys.readouterr().err


def test_runs_that_would_share_a_folder(tmp_path: Path, labs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert compared(tmp_path, recipes=('ab:exclude=["0.*"]', 'ab:exclude=["0.?"]')) == 2
    assert "have the same folder" in capsys.readouterr().err and labs == []


def test_a_rate_that_is_asked_for_twice(tmp_path: Path, labs: list[str]) -> None:
    assert compared(tmp_path, "--more-rates", "10mbit,10mbit") == 0
    assert len(labs) == len(set(labs)) == 8


# Real runs of the paper


def written(out: Path, *more: str) -> int:
    line = ("paper", "table1", "--scale", "full", "--seeds", "1", "--methods", AB, "--out", str(out), "--write", *more)
    with pytest.raises(SystemExit) as ended:
        cli.main(line)
    return int(ended.value.code or 0)


@pytest.mark.parametrize("edit", ["checkpoint_every = 777\n", "# mine\n", "keep = 9\n"])
def test_a_real_run_whose_request_was_touched_is_done(edit: str, tmp_path: Path) -> None:
    run = full_run(tmp_path)
    assert written(tmp_path) == 0
    request = run.folder / "request.toml"
    text = "".join(line for line in request.read_text().splitlines(True) if not line.startswith("checkpoint_every"))
    request.write_text(text + edit)
    put_result(run)
    before = contents(run.folder)
    assert run.done and written(tmp_path) == 0
    assert contents(run.folder) == before


def test_a_real_run_of_a_version_that_left_defaults_out(tmp_path: Path) -> None:
    run = full_run(tmp_path)
    run.folder.mkdir(parents=True)
    defaults = set(to_toml(TrainConfig()).splitlines())
    lines = [line for line in to_toml(run.config).splitlines() if line not in defaults]
    (run.folder / "request.toml").write_text("\n".join(lines))
    put_result(run)
    before = contents(run.folder)
    assert run.done and written(tmp_path) == 0
    assert contents(run.folder) == before


@pytest.mark.parametrize("finished", [True, False])
def test_a_real_run_with_other_settings_is_refused(
    finished: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = full_run(tmp_path)
    prepare_folder(run)
    request = run.folder / "request.toml"
    request.write_text(request.read_text().replace("sigma_cutoff=0.15", "sigma_cutoff=0.2"))
    train = put_result(run)
    if not finished:
        (train / "result.json").unlink()
    before = contents(run.folder)
    assert written(tmp_path) == 2
    said = capsys.readouterr().err
    assert "recipe was 'ab:sigma_cutoff=0.2," in said and "' and is 'ab:sigma_cutoff=0.15," in said
    assert contents(run.folder) == before
    with pytest.raises(ConfigurationError, match="sigma_cutoff"):
        run_all([run], "full", "false", None, print)
    assert contents(run.folder) == before
    others = {path for path in (tmp_path / "runs").iterdir() if path != run.folder}
    assert written(tmp_path, "--overwrite") == 0
    assert {path.name for path in run.folder.iterdir()} == {"request.toml", "request.json"}
    assert others <= set((tmp_path / "runs").iterdir())


def test_real_runs_can_go_on(tmp_path: Path) -> None:
    """They write checkpoints, which do not make other runs of them."""
    run = full_run(tmp_path)
    prepare_folder(run)
    without = run.folder / "request.toml"
    assert from_toml(without).checkpoint_every == 0
    (run.folder / "train").mkdir()
    (run.folder / "train/config.toml").write_text("an unfinished run")
    assert written(tmp_path) == 0
    assert run.config.steps is not None
    assert from_toml(without).checkpoint_every == run.config.steps // 50 >= 100
    assert (run.folder / "train/config.toml").read_text() == "an unfinished run"
    without.write_text(without.read_text() + "# mine\n")
    assert written(tmp_path) == 0 and without.read_text().endswith("# mine\n")
    short = dataclasses.replace(run.cell, config=dataclasses.replace(run.cell.config, steps=1000))
    prepare_folder(PaperRun(short, 0, tmp_path / "short"), checkpoints=True)
    assert from_toml(tmp_path / "short/request.toml").checkpoint_every == 100


def test_a_request_that_was_never_run_is_written_again(tmp_path: Path) -> None:
    run = full_run(tmp_path)
    other = dataclasses.replace(
        run, cell=dataclasses.replace(run.cell, config=dataclasses.replace(run.cell.config, lr=1.0))
    )
    prepare_folder(other)
    assert not run.done and written(tmp_path) == 0
    assert from_toml(run.folder / "request.toml").lr == TASKS[run.config.task].lr


def test_requests_say_what_defaults_were(tmp_path: Path) -> None:
    """Whichever version starts the run."""
    run = full_run(tmp_path)
    prepare_folder(run)
    config, task = from_toml(run.folder / "request.toml"), TASKS[run.config.task]
    assert (config.lr, config.weight_decay, config.clip) == (task.lr, task.weight_decay, task.clip)
    assert config.device == "auto"
    record = json.loads((run.folder / "request.json").read_text())
    assert record["abtrain"] == __version__ and record["recipe"]["name"] == "ab"
    assert record["settings"]["precision"] == "bf16" and "device" not in record["settings"]


def test_a_search_does_not_remove_trials_of_another(tmp_path: Path) -> None:
    """Trials are numbered by a file that may be gone while their folders are there."""
    config = dataclasses.replace(CONFIG, workers=4)
    run = PaperRun(Cell("global", config.task, "ab_outer", 1, config), 0, tmp_path / "trials/ab_outer-0-200")
    prepare_folder(run)
    put_result(run)
    other = dataclasses.replace(
        run, cell=dataclasses.replace(run.cell, config=dataclasses.replace(config, recipe="ab_outer:every=7"))
    )
    with pytest.raises(ConfigurationError, match="recipe was 'ab_outer' and is 'ab_outer:every=7' now"):
        run_all([other], "full", f"{sys.executable} -c pass", None, print)
    assert run.done
