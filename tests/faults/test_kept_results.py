"""What `abtrain compare` and `abtrain paper` keep: no run is removed that its user has not given up, and no file that
is damaged ends in anything but a message that names it.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from abtrain import cli, recipes
from abtrain.errors import ConfigurationError, DataError
from abtrain.lab import LabConfig
from abtrain.paper.experiments import SCALES, Cell, cells
from abtrain.paper.published import AB
from abtrain.paper.runs import Run, plan_runs, run_all, write_request
from abtrain.paper.runs import outcome as paper_outcome
from abtrain.paper.studies import study_cells
from abtrain.paper.study_page import write_study
from abtrain.paper.tables import rows as paper_rows
from abtrain.study import arguments, compare, kept, runs
from abtrain.study.arguments import parse_arguments
from abtrain.study.contestant import Contestant
from abtrain.study.runs import Task, check, outcome
from abtrain.train.config import TrainConfig, resolve
from abtrain.train.config_file import from_toml, to_toml
from abtrain.train.tasks import TASKS

CONFIG = TrainConfig(recipe="ab_outer", task="digits-mlp", workers=2, steps=200, batch_size=16)
RESULT: dict[str, Any] = {
    "top1": 91.5,
    "loss": 0.3,
    "seconds": {"total": 10.0, "sync": 2.0},
    "payload_bytes": {"total": 1000, "between_groups": 1000, "by_phase": {"full": 1000}},
    "compression": 1.5,
    "parameters": 10**6,
    "steps": 200,
    "versions": {"abtrain": "0.0.9"},
}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def finish(task: Task, **values: object) -> Task:
    """Puts into its folder what a run leaves that came to its end."""
    task.folder.mkdir(parents=True, exist_ok=True)
    if not (task.folder / "request.toml").exists():
        kept.write_request(task.folder, task.config)
    (task.folder / "train/checkpoints").mkdir(parents=True, exist_ok=True)
    (task.folder / "train/checkpoints/model.safetensors").write_text("weights of two days")
    (task.folder / "train/result.json").write_text(json.dumps(RESULT | values))
    (task.folder / "train/metrics.jsonl").write_text('{"seconds": 1.0, "loss": 2.0}\n{"seconds": 2.0, "loss": null}\n')
    (task.folder / "lab").mkdir(exist_ok=True)
    (task.folder / "lab/lab.json").write_text('{"hosts": [{"tx_bytes": 3000}, {"tx_bytes": 1000}]}')
    return task


@pytest.fixture
def task(tmp_path: Path) -> Task:
    """A run of a comparison that has come to its end."""
    return finish(Task(Contestant("ab_outer", CONFIG), 0, 10**8, tmp_path / "runs" / "ab_outer"))


class NoLab:
    """In place of a lab, where none is to be built."""

    def __init__(self, *arguments: object) -> None:
        raise AssertionError("a lab was built")


class StandInLab:
    """In place of a lab: what its jobs would leave is written at once."""

    ran: list[str] = []  # noqa: RUF012  # emptied by the fixture

    def __init__(self, config: Any) -> None:
        self.config = config
        self.rates = [config.rate(0)] * config.nodes

    def __enter__(self) -> StandInLab:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing is left of it."""

    def change(self, host: int, rate: int) -> None:
        self.rates[host] = rate

    def measure(self) -> None:
        """Its links are what they are said to be."""

    def run(self, job: Any) -> None:
        folder = job.out.parent
        config = from_toml(Path(job.command[job.command.index("--config") + 1]))
        for name in ("train", "lab"):
            (folder / name).mkdir()
        result = RESULT | {"config": dataclasses.asdict(resolve(config)), "versions": {"abtrain": "0.1.0"}}
        (folder / "train/result.json").write_text(json.dumps(result, default=str))
        (folder / "train/metrics.jsonl").write_text("")
        (folder / "lab/lab.json").write_text('{"hosts": [{"tx_bytes": 3000}]}')
        StandInLab.ran.append(folder.name)


@pytest.fixture
def labs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Comparisons on any system; the names of the folders that were run."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(arguments, "system_problems", list)
    monkeypatch.setattr(compare, "Lab", StandInLab)
    StandInLab.ran.clear()
    yield StandInLab.ran
    StandInLab.ran.clear()


def compared(out: Path, *more: str, recipes: tuple[str, ...] = ("ab_outer",)) -> int:
    """Runs `abtrain compare`; its exit code."""
    line = ("compare", *recipes, "--nodes", "2", "--rate", "100mbit", "--steps", "200", "--out", str(out), *more)
    with pytest.raises(SystemExit) as ended:
        cli.main(line)
    return int(ended.value.code or 0)


def defaults_left_out(text: str) -> str:
    left_out = {"steps", "weight_decay", "clip", "precision", "init", "lr", "seed", "device", "loaders"}
    lines = [line for line in text.splitlines() if line.split(" ")[0] not in left_out - {"steps"}]
    return "\n".join(lines)


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
def test_requests_that_ask_for_the_same(edit: str, record: str, task: Task) -> None:
    request = task.folder / "request.toml"
    request.write_text(EDITS[edit](request.read_text()))
    if record == "without one":
        (task.folder / "request.json").unlink()
    before = contents(task.folder)
    assert task.done
    check([task], overwrite=False)
    assert contents(task.folder) == before and outcome(task).wire_bytes == 2000


DIFFERENCES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a rate": (lambda file: file.write_text(file.read_text().replace("lr = 0.003", "lr = 0.001")), "lr is 0.001 there"),
    "workers": (lambda file: file.write_text(file.read_text().replace("workers = 2", "workers = 4")), "workers is 4"),
    "another task": (
        lambda file: file.write_text(file.read_text().replace("digits-mlp", "no-such-task")),
        "task is 'no-such-task' there and 'digits-mlp' here",
    ),
    "an unknown key": (lambda file: file.write_text(file.read_text() + "extra_field = 1\n"), "extra_field is 1 there"),
    "a wrong type": (lambda file: file.write_text(file.read_text() + 'keep = "two"\n'), "keep = 'two' is of the wrong"),
    "no TOML": (lambda file: file.write_text(file.read_text() + "[[["), "request.toml cannot be parsed"),
    "no UTF-8": (lambda file: file.write_bytes(b"\xff\xfe"), "it is no UTF-8"),
    "empty": (lambda file: file.write_text(""), "steps is"),
    "a FIFO": (lambda file: (file.unlink(), os.mkfifo(file)), "is no regular file"),
    "a folder": (lambda file: (file.unlink(), file.mkdir()), "is no regular file"),
    "a link": (lambda file: (file.rename(file.with_name("r")), file.symlink_to("r")), "cannot be opened"),
}


@pytest.mark.parametrize("record", ["with a record", "without one"])
@pytest.mark.parametrize("kind", DIFFERENCES)
def test_runs_with_other_settings_are_refused_by_name(kind: str, record: str, task: Task) -> None:
    spoil, named = DIFFERENCES[kind]
    spoil(task.folder / "request.toml")
    if record == "without one":
        (task.folder / "request.json").unlink()
    before = contents(task.folder / "train")
    assert not task.done
    with pytest.raises(ConfigurationError) as told:
        check([task], overwrite=False)
    assert len(told.value.problems) == 1
    assert named in str(told.value) and str(task.folder) in str(told.value) and "--overwrite" in str(told.value)
    with pytest.raises(ConfigurationError, match="--overwrite"):
        runs.run(task, StandInLab(LabConfig(nodes=2)))  # type: ignore[arg-type]
    assert contents(task.folder / "train") == before


def test_a_folder_without_a_request_is_not_ours(task: Task) -> None:
    for name in ("request.toml", "request.json"):
        (task.folder / name).unlink()
    with pytest.raises(ConfigurationError, match=r"request.toml is missing"):
        check([task], overwrite=False)


@pytest.mark.parametrize("record", [b"", b"[]", b"\xff", b'{"abtrain": 1, "settings": {}}', b'{"settings": []}'])
def test_a_record_that_is_damaged(record: bytes, task: Task) -> None:
    (task.folder / "request.json").write_bytes(record)
    assert not task.done
    with pytest.raises(ConfigurationError, match=r"request.json is damaged"):
        check([task], overwrite=False)


def test_a_request_of_another_version(task: Task) -> None:
    """It may have settings that this one does not know; one that its user has added is named all the same."""
    record, request = task.folder / "request.json", task.folder / "request.toml"
    content = json.loads(record.read_text())
    content["abtrain"], content["settings"]["grafting"] = "9.9", "none"
    del content["settings"]["on_bad_image"]  # which came later
    record.write_text(json.dumps(content))
    request.write_text(request.read_text() + 'grafting = "none"\n')
    assert task.done
    request.write_text(request.read_text() + "extra_field = 1\n")
    assert not task.done and kept.differences(task.folder, task.config) == [
        "extra_field is 1 there and not known to abtrain 0.1.0"
    ]


@pytest.mark.parametrize("record", ["with a record", "the result alone says it"])
@pytest.mark.parametrize("name", ["lr", "batch_size", "weight_decay", "steps"])
def test_a_default_of_the_task_that_has_changed(
    name: str, record: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(recipe="ddp", workers=2)
    task = Task(Contestant("ddp", config), 0, 10**8, tmp_path / "ddp")
    trained = dataclasses.asdict(resolve(dataclasses.replace(config, device="cpu")))
    if record != "with a record":
        task.folder.mkdir()
        (task.folder / "request.toml").write_text(to_toml(config))
    finish(task, config=trained)
    assert task.done
    before = getattr(TASKS["digits-mlp"], name)
    monkeypatch.setitem(TASKS, "digits-mlp", dataclasses.replace(TASKS["digits-mlp"], **{name: before * 2}))
    assert not task.done
    assert kept.differences(task.folder, task.config) == [f"{name} is {before!r} there and {before * 2!r} here"]


def test_a_default_of_the_recipe_that_has_changed(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    build = recipes.build

    def changed(name: str, steps: int, **options: Any) -> Any:
        return build(name, steps, **{"outer_momentum": 0.5} | options)

    monkeypatch.setattr(recipes, "build", changed)
    assert not task.done
    said = kept.differences(task.folder, task.config)
    assert said == [
        f"recipe.{part}[0].sync.merge.momentum is 0.8 there and 0.5 here, by default" for part in ("prologue", "cycle")
    ]


def test_a_field_that_recipes_have_in_another_version(task: Task) -> None:
    record = task.folder / "request.json"
    content = json.loads(record.read_text())
    content["recipe"]["cycle"][0]["grafting"] = None
    del content["recipe"]["cycle"][0]["until"]
    record.write_text(json.dumps(content))
    assert task.done
    content["recipe"]["cycle"][0]["steps"] += 1
    record.write_text(json.dumps(content))
    (said,) = kept.differences(task.folder, task.config)
    assert said.startswith("recipe.cycle[0].steps is ")


@pytest.mark.parametrize("recipe", [None, 3, [], {}, {"kind": "Recipe", "cycle": {}}, {"kind": ["Recipe"]}])
def test_a_recorded_recipe_that_cannot_be(recipe: object, task: Task) -> None:
    record = task.folder / "request.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"recipe": recipe}))
    assert not task.done and kept.differences(task.folder, task.config)[0].startswith("recipe")


def test_a_link_to_the_runs_of_another_disk(task: Task, tmp_path: Path) -> None:
    shutil.move(task.folder, tmp_path / "elsewhere")
    task.folder.symlink_to(tmp_path / "elsewhere")
    assert task.done
    request = task.folder / "request.toml"
    request.write_text(request.read_text().replace("0.003", "0.001"))
    kept.make_room(task, overwrite=True)
    assert not task.folder.exists() and (tmp_path / "elsewhere/train/result.json").exists()


def test_everything_in_the_way_is_said_before_a_lab_is_built(
    tmp_path: Path, labs: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compared(tmp_path) == 0 and len(labs) == 4
    monkeypatch.setattr(compare, "Lab", NoLab)
    assert compared(tmp_path) == 0
    assert "4 runs, 4 of them done before" in capsys.readouterr().out
    for request in tmp_path.rglob("request.toml"):
        request.write_text(request.read_text() + "extra_field = 1\n")
    before = contents(tmp_path / "runs")
    assert compared(tmp_path, "--seeds", "2") == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4 and all("extra_field is 1 there" in line and "--overwrite" in line for line in said)
    assert contents(tmp_path / "runs") == before


def test_overwrite_replaces_what_differs_and_nothing_else(tmp_path: Path, labs: list[str]) -> None:
    assert compared(tmp_path) == 0
    labs.clear()
    (tmp_path / "runs/mine").mkdir()
    (tmp_path / "runs/mine/notes.txt").write_text("what I saw")
    assert compared(tmp_path, "--lr", "ab_outer=1e-3") == 2 and labs == []
    before = contents(tmp_path / "runs")
    assert compared(tmp_path, "--lr", "ab_outer=1e-3", "--overwrite") == 0
    assert labs == ["ab_outer-seed0-100mbit"]
    after = contents(tmp_path / "runs")
    assert {name for name in before if before[name] != after.get(name)} == {
        f"ab_outer-seed0-100mbit/{name}" for name in ("request.toml", "request.json", "train/result.json")
    }


def test_a_stopped_run_of_the_same_settings_is_run_again(tmp_path: Path, labs: list[str]) -> None:
    assert compared(tmp_path) == 0
    labs.clear()
    folder = tmp_path / "runs/ab_outer-seed0-100mbit"
    (folder / "train/result.json").unlink()
    (folder / "lab/lab.json").unlink()
    (folder / "notes.txt").write_text("what I saw")
    assert compared(tmp_path) == 0 and labs == [folder.name]
    assert (folder / "notes.txt").exists()


@pytest.mark.parametrize("missing", ["lab/lab.json", "train/metrics.jsonl"])
def test_a_result_is_never_removed_for_what_it_lacks(
    missing: str, tmp_path: Path, labs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert compared(tmp_path) == 0
    labs.clear()
    folder = tmp_path / "runs/ab_outer-seed0-100mbit"
    (folder / missing).unlink()
    for more in ((), ("--overwrite",)):
        assert compared(tmp_path, *more) == 3 and labs == []
        assert f"{folder / missing} is missing" in capsys.readouterr().err
    assert (folder / "train/result.json").exists()


def test_a_comparison_in_use(tmp_path: Path, labs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Another process would take its unfinished runs for abandoned ones."""
    assert compared(tmp_path) == 0
    with (tmp_path / kept.LOCK_FILE).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert compared(tmp_path) == 2
    assert "in use by another process" in capsys.readouterr().err


def test_runs_that_would_share_a_folder(tmp_path: Path, labs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert compared(tmp_path, recipes=('ab:exclude=["0.*"]', 'ab:exclude=["0.?"]')) == 2
    assert "would share the folder" in capsys.readouterr().err and labs == []


def test_a_rate_that_is_asked_for_twice(tmp_path: Path, labs: list[str]) -> None:
    assert compared(tmp_path, "--more-rates", "10mbit,10mbit") == 0
    assert len(labs) == len(set(labs)) == 8


# Real runs of the paper


def full_run(out: Path) -> Run:
    return plan_runs(cells("table1", SCALES["full"], methods=(AB,)), 1, out)[0]


def written(out: Path, *more: str) -> int:
    line = ("paper", "table1", "--scale", "full", "--seeds", "1", "--methods", AB, "--out", str(out), "--write", *more)
    with pytest.raises(SystemExit) as ended:
        cli.main(line)
    return int(ended.value.code or 0)


def put_result(run: Run) -> Path:
    (run.folder / "train/checkpoints").mkdir(parents=True)
    (run.folder / "train/checkpoints/model.safetensors").write_text("weights of two days")
    (run.folder / "train/result.json").write_text(json.dumps(RESULT))
    return run.folder / "train"


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


@pytest.mark.parametrize("finished", [True, False])
def test_a_real_run_with_other_settings_is_refused(
    finished: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = full_run(tmp_path)
    write_request(run)
    request = run.folder / "request.toml"
    request.write_text(request.read_text().replace("sigma_cutoff = 0.15", "sigma_cutoff = 0.2"))
    train = put_result(run)
    if not finished:
        (train / "result.json").unlink()
    before = contents(run.folder)
    assert written(tmp_path) == 2
    assert "sigma_cutoff is 0.2 there and 0.15 here" in capsys.readouterr().err and contents(run.folder) == before
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
    write_request(run)
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
    short = dataclasses.replace(run.cell, config=dataclasses.replace(run.cell.config, steps=1000, warmup_steps=100))
    write_request(Run(short, 0, tmp_path / "short"), checkpoints=True)
    assert from_toml(tmp_path / "short/request.toml").checkpoint_every == 100


def test_a_request_that_was_never_run_is_written_again(tmp_path: Path) -> None:
    run = full_run(tmp_path)
    other = dataclasses.replace(
        run, cell=dataclasses.replace(run.cell, config=dataclasses.replace(run.cell.config, lr=1.0))
    )
    write_request(other)
    assert not run.done and written(tmp_path) == 0
    assert from_toml(run.folder / "request.toml").lr == TASKS[run.config.task].lr


def test_requests_say_what_defaults_were(tmp_path: Path) -> None:
    """Whichever version starts the run."""
    run = full_run(tmp_path)
    write_request(run)
    config, task = from_toml(run.folder / "request.toml"), TASKS[run.config.task]
    assert (config.lr, config.weight_decay, config.clip) == (task.lr, task.weight_decay, task.clip)
    assert config.device == "auto"
    record = json.loads((run.folder / "request.json").read_text())
    assert record["abtrain"] == "0.1.0" and record["recipe"]["name"] == "ab"
    assert record["settings"]["precision"] == "bf16" and "device" not in record["settings"]


# Damaged files


DAMAGED: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.write_text(""),
    "zeros": lambda file: file.write_bytes(bytes(100)),
    "no JSON": lambda file: file.write_text('{"top1": 9'),
    "no UTF-8": lambda file: file.write_bytes(b'{"top1": "\xff"}'),
    "a list": lambda file: file.write_text("[]"),
    "a number": lambda file: file.write_text("3"),
    "nested": lambda file: file.write_text("[" * 100_000),
    "missing keys": lambda file: file.write_text("{}"),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "a FIFO": lambda file: (file.unlink(), os.mkfifo(file)),
    "a link": lambda file: (file.unlink(), file.symlink_to("/etc/hostname")),
    "a link to nothing": lambda file: (file.unlink(), file.symlink_to("nowhere")),
    "very large": lambda file: (file.write_text(""), os.truncate(file, 2**40)),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", DAMAGED)
@pytest.mark.parametrize("name", ["train/result.json", "lab/lab.json", "train/metrics.jsonl"])
def test_a_damaged_file_of_a_comparison(
    name: str, kind: str, tmp_path: Path, labs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert compared(tmp_path) == 0
    labs.clear()
    file = tmp_path / "runs/ab_outer-seed0-100mbit" / name
    DAMAGED[kind](file)
    capsys.readouterr()
    if name == "train/metrics.jsonl" and kind == "empty":
        assert compared(tmp_path) == 0  # a run that is shorter than --log-every has no curve
        return
    assert compared(tmp_path) == 3 and labs == []
    said = capsys.readouterr().err
    assert str(file) in said and "Remedy: restore the file" in said and "Traceback" not in said
    assert os.path.lexists(file)


VALUES: dict[str, tuple[dict[str, object], str]] = {
    "NaN": ({"top1": float("nan")}, "top1 is nan"),
    "infinity": ({"loss": float("inf")}, "loss is inf"),
    "too large": ({"loss": 1e300}, "loss is 1e\\+300"),
    "a string": ({"top1": "<script>alert(1)</script>"}, "top1 is '<script>"),
    "a boolean": ({"compression": True}, "compression is True"),
    "null": ({"loss": None}, "loss is None"),
    "no top-1": ({"top1": None}, "top1 is None"),
    "no time": ({"seconds": {"total": 0, "sync": 0}}, "seconds.total is 0, not a number above 0"),
    "a list": ({"seconds": [1, 2]}, r"seconds is \[1, 2\], not an object"),
    "half": ({"seconds": {"total": 1}}, "seconds.sync is missing"),
    "negative": ({"payload_bytes": {**RESULT["payload_bytes"], "total": -1}}, "payload_bytes.total is -1"),
    "phases": ({"payload_bytes": {**RESULT["payload_bytes"], "by_phase": {"full": "all"}}}, "by_phase.full is 'all'"),
    "half a letter": ({"versions": {"abtrain": "\ud800"}}, "versions.abtrain is"),
}


@pytest.mark.parametrize("kind", VALUES)
def test_a_result_with_values_that_cannot_be(kind: str, task: Task) -> None:
    values, said = VALUES[kind]
    finish(task, **values)
    with pytest.raises(DataError, match=said):
        outcome(task)
    with pytest.raises(DataError, match=said):
        check([task], overwrite=True)


@pytest.mark.parametrize(
    "hosts", ["[]", "{}", "3", "[1]", "[{}]", '[{"tx_bytes": 0}]', '[{"tx_bytes": "1"}]', '[{"tx_bytes": NaN}]']
)
def test_hosts_that_cannot_be(hosts: str, task: Task) -> None:
    (task.folder / "lab/lab.json").write_text(f'{{"hosts": {hosts}}}')
    with pytest.raises(DataError, match=r"lab.json is damaged: hosts"):
        outcome(task)


@pytest.mark.parametrize("line", ["{}", "[]", "", "{", '{"seconds": "1", "loss": 1}', '{"seconds": 1, "loss": NaN}'])
def test_a_line_of_the_metrics_that_cannot_be(line: str, task: Task) -> None:
    (task.folder / "train/metrics.jsonl").write_text(f'{{"seconds": 1, "loss": 2}}\n{line}\n')
    with pytest.raises(DataError, match=r"metrics.jsonl is damaged: line 2"):
        outcome(task)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"steps": {"a": 1}}'])
def test_the_settings_of_a_comparison_that_are_damaged(
    content: bytes, tmp_path: Path, labs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert compared(tmp_path) == 0
    (tmp_path / "settings.json").write_bytes(content)
    before = contents(tmp_path)
    assert compared(tmp_path) == 2
    assert str(tmp_path) in capsys.readouterr().err and contents(tmp_path) == before


@pytest.mark.parametrize("name", ["compare.json", "report.html"])
def test_a_page_that_cannot_be_written_costs_no_run(
    name: str, tmp_path: Path, labs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    parse_arguments(["ab_outer", "--nodes", "2", "--steps", "200", "--out", str(tmp_path / "out")])
    (tmp_path / "out" / name).mkdir()
    assert compared(tmp_path / "out") == 2
    assert "The runs that are done are kept" in capsys.readouterr().err
    (tmp_path / "out" / name).rmdir()
    # A link is replaced, and what it leads to is left alone.
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "out" / name).symlink_to(tmp_path / "mine")
    labs.clear()
    assert compared(tmp_path / "out") == 0 and labs == []
    assert (tmp_path / "mine").read_text() == "mine"


def test_names_in_a_result_are_text(tmp_path: Path, labs: list[str]) -> None:
    assert compared(tmp_path) == 0
    file = tmp_path / "runs/ab_outer-seed0-100mbit/train/result.json"
    content = json.loads(file.read_text())
    content["versions"]["abtrain"] = "<script>alert(1)</script>"
    content["payload_bytes"]["by_phase"] = {"<img src=x>": 1000}
    file.write_text(json.dumps(content))
    assert compared(tmp_path) == 0
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and "<img src=x>" not in page and "&lt;script&gt;" in page


def test_results_of_several_versions_in_one_table(
    tmp_path: Path, labs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert compared(tmp_path) == 0
    assert "several versions" not in capsys.readouterr().out
    file = tmp_path / "runs/ab_outer-seed0-100mbit/train/result.json"
    content = json.loads(file.read_text())
    content["versions"]["abtrain"] = "0.0.9"
    file.write_text(json.dumps(content))
    assert compared(tmp_path) == 0
    note = "Results of several versions of abtrain: 0.0.9, 0.1.0."
    assert note in capsys.readouterr().out and note in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "compare.json").read_text())["note"] == note


def simulated(out: Path) -> Run:
    """A simulated run that has come to its end."""
    cell = cells("table2-global", SCALES["tiny"], (4,), (AB,))[0]
    run = Run(cell, 0, out / "run")
    write_request(run)
    ranks = [{"step": 1, "ranks": {}}]
    (run.folder / "result.json").write_text(json.dumps(RESULT | {"cpu_seconds_per_step": 0.1, "ranks": ranks}))
    return run


def test_a_result_of_the_paper_is_read(tmp_path: Path) -> None:
    assert paper_outcome(simulated(tmp_path)).top1 == 91.5


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", [kind for kind in DAMAGED if kind != "empty"])
@pytest.mark.parametrize("scale", ["tiny", "full"])
def test_a_damaged_result_of_the_paper(kind: str, scale: Any, tmp_path: Path) -> None:
    run = simulated(tmp_path) if scale == "tiny" else full_run(tmp_path)
    if scale == "full":
        write_request(run)
        put_result(run)
    file = run.result_file
    DAMAGED[kind](file)
    with pytest.raises(DataError, match="Remedy") as told:
        run_all([run], scale, "false", None, print)
    assert str(file) in str(told.value) and os.path.lexists(file)


def test_an_empty_result_of_the_paper(tmp_path: Path) -> None:
    """A simulated run writes it again; `abtrain train` would refuse its folder, and the file is named first."""
    run = simulated(tmp_path)
    run.result_file.write_text("")
    run.check_results()
    assert not run.done
    real = full_run(tmp_path)
    write_request(real)
    put_result(real)
    real.result_file.write_text("")
    with pytest.raises(DataError, match="it is empty"):
        run_all([real], "full", "false", None, print)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"ranks": {}}, "ranks is"),
        ({"ranks": [{"ranks": {"conv.weight": "8"}}]}, "ranks.0..ranks.conv.weight is '8'"),
        ({"ranks": [{"ranks": {"<b>": 8}}]}, "not the rank of a weight of this model"),
        ({"ranks": [{"ranks": {"5.weight": 1.5}}]}, "not a whole number"),
        ({"cpu_seconds_per_step": -1}, "cpu_seconds_per_step is -1"),
        ({"parameters": 0}, "parameters is 0"),
        ({"steps": "many"}, "steps is 'many'"),
        ({"payload_bytes": None}, "payload_bytes is None"),
    ],
)
def test_a_result_of_the_paper_with_values_that_cannot_be(values: dict[str, object], said: str, tmp_path: Path) -> None:
    run = simulated(tmp_path)
    run.result_file.write_text(json.dumps(json.loads(run.result_file.read_text()) | values))
    with pytest.raises(DataError, match=said):
        run.check_results()


def divergent(out: Path, divergence: object) -> Run:
    cell = study_cells("divergence", (4,), (AB,))[0]
    run = Run(cell, 0, out / "runs" / "run")
    write_request(run)
    content = RESULT | {"cpu_seconds_per_step": 0.1, "ranks": [], "divergence": divergence}
    run.result_file.write_text(json.dumps(content))
    return run


@pytest.mark.parametrize(
    "divergence",
    [
        3,
        [3],
        [{}],
        [{"layers": []}],
        [{"step": 1, "layers": {"w": {"distance": "far"}}}],
        [{"step": 1, "layers": {"w": {}}}],
    ],
)
def test_a_history_that_cannot_be(divergence: object, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = divergent(tmp_path, divergence)
    with pytest.raises(DataError, match=r"result.json is damaged: divergence"):
        write_study("divergence", paper_rows([paper_outcome(run)]), [run], tmp_path, "abtrain paper divergence")


def test_names_of_layers_are_text(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = divergent(tmp_path, [{"step": 1, "layers": {"<script>|": {"distance": 0.1}}}])
    write_study("divergence", paper_rows([paper_outcome(run)]), [run], tmp_path, "abtrain paper divergence")
    assert "<script" not in (tmp_path / "divergence.html").read_text()
    markdown = (tmp_path / "divergence.md").read_text()
    assert "<script" not in markdown and r"| &lt;script&gt;\| |" in markdown


def test_a_search_does_not_remove_trials_of_another(tmp_path: Path) -> None:
    """Trials are numbered by a file that may be gone while their folders are there."""
    config = dataclasses.replace(CONFIG, workers=4)
    run = Run(Cell("global", config.task, "ab_outer", 1, config), 0, tmp_path / "trials/ab_outer-0-200")
    write_request(run)
    put_result(run)
    other = dataclasses.replace(run, cell=dataclasses.replace(run.cell, config=dataclasses.replace(config, every=7)))
    with pytest.raises(ConfigurationError, match="every is None there and 7 here"):
        run_all([other], "full", f"{sys.executable} -c pass", None, print)
    assert run.done
