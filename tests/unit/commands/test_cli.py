import re
from pathlib import Path

import pytest

import abtrain
from abtrain import recipes
from abtrain.commands import cli
from abtrain.commands.tasks.task import TASKS
from abtrain.commands.train.config import TrainConfig
from abtrain.errors import ConfigurationError, DataError, StoppedError


def code_of(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return ended.value.code


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[TrainConfig]:
    """The configurations that would have been run."""
    configs: list[TrainConfig] = []
    monkeypatch.setattr("abtrain.commands.train.launch.run", configs.append)
    return configs


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("--version") == 0
    assert capsys.readouterr().out == f"abtrain {abtrain.__version__}\n"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("--help") == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)


def test_help_of_train_names_every_recipe_and_task(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert code_of("train", "--help") == 0
    text = capsys.readouterr().out
    assert all(name in text for name in (*recipes.RECIPES, *TASKS))


def test_help_of_train_is_short(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Options of recipes are listed by `abtrain recipes RECIPE`."""
    monkeypatch.setenv("COLUMNS", "80")
    assert code_of("train", "--help") == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 100 and max(map(len, text.splitlines())) <= 80
    assert len(set(re.findall("--[a-z][a-z-]+", text))) <= 40


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("ab_outer:evry=40", "has no option 'evry': did you mean 'every'?"),
        ("ab_outer:every=often", "every='often' is not a whole number"),
        ("ab_outer:outer_lr=-1", "outer_lr=-1.0 is not a finite number above 0"),
    ],
)
@pytest.mark.parametrize("command", ["train", "recipes", "plan", "compare"])
def test_wrong_options_of_a_recipe(command: str, recipe: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """All commands read recipes the same way, before anything starts."""
    assert code_of(command, recipe, *(("--step-time", "1s") if command == "plan" else ())) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [(), ("tran",), ("train", "--every", "40"), ("train", "--stepps", "3"), ("train", "--steps", "many")]
)
def test_arguments_that_make_no_sense(arguments: tuple[str, ...]) -> None:
    assert code_of(*arguments) == 2


def test_the_command_line_wins_over_the_file(tmp_path: Path, started: list[TrainConfig]) -> None:
    file = tmp_path / "run.toml"
    file.write_text('recipe = "ddp"\ntask = "fashion-cnn"\nsteps = 5\ntrack = ["a", "b"]\n')
    assert code_of("train", "--config", str(file), "--steps", "7") == 0
    assert code_of("train", "ab", f"--config={file}") == 0
    first, second = started
    assert (first.recipe, first.task, first.steps, first.track) == ("ddp", "fashion-cnn", 7, ("a", "b"))
    assert (second.recipe, second.steps) == ("ab", 5)


def test_a_file_with_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.toml"
    file.write_text("stepps = 5\nlr = true\n")
    assert code_of("train", "--config", str(file)) == 2
    assert [line.startswith("abtrain: error: ") for line in capsys.readouterr().err.splitlines()] == [True, True]


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (ConfigurationError(["one", "two"]), 2, ["abtrain: error: one", "abtrain: error: two"]),
        (DataError("no data\ngo get it"), 3, ["abtrain: error: no data", "go get it"]),
        (StoppedError("stopped"), 75, ["abtrain: error: stopped"]),
        (KeyboardInterrupt(), 75, ["abtrain: error: stopped on request (SIGINT)"]),
    ],
)
def test_errors_become_messages_and_exit_codes(
    error: BaseException,
    code: int,
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(config: TrainConfig) -> None:
        raise error

    monkeypatch.setattr("abtrain.commands.train.launch.run", fail)
    assert code_of("train") == code
    assert capsys.readouterr().err.splitlines() == lines


def test_one_worker_reports_an_error_that_all_share(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert cli._fail(ConfigurationError("wrong everywhere")) == 2
    assert capsys.readouterr().err == ""
    assert cli._fail(DataError("missing here")) == 3
    assert capsys.readouterr().err == "abtrain: error: missing here\n"
