import json
from pathlib import Path

import pytest

from abtrain.commands import page
from abtrain.commands.compare import comparison as arguments
from abtrain.commands.compare.comparison import held_folder
from abtrain.commands.compare.runs import plan_runs
from abtrain.commands.lab import LabConfig
from abtrain.commands.runs.request import request_text
from abtrain.errors import ConfigurationError
from tests.unit.commands.made_up import requested


@pytest.fixture(autouse=True)
def _on_a_system_with_labs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "system_problems", list)
    monkeypatch.chdir(tmp_path)


def test_everything_that_can_be_said() -> None:
    line = (
        "ab diloco:every=5 --nodes 2 --rate 20mbit --more-rates 1gbit,5mbit --seeds 2 --steps 50 --lr ab=1e-3 --out o"
    )
    comparison = requested(line.split())
    assert comparison.lab == LabConfig(2, (20 * 10**6,))
    assert (comparison.more_rates, comparison.seeds, comparison.steps) == ((10**9, 5 * 10**6), (0, 1), 50)
    # Five contestants, two seeds at the one rate and one at each of two more.
    planned = plan_runs(comparison)
    assert len(planned) == 5 * (2 + 2) == len({task.folder for task in planned})
    assert [task.seed for task in planned[:5]] == [0] * 5
    assert not any(task.done for task in planned)


def test_a_run_is_done_if_it_ended_with_the_same_settings() -> None:
    comparison = requested(["ab", "--steps", "50", "--out", "o"])
    with held_folder(comparison):
        task = plan_runs(comparison)[-1]
    for file in ("train/result.json", "lab/lab.json"):
        (task.folder / file).parent.mkdir(parents=True)
        (task.folder / file).write_text("{}")
    (task.folder / "request.toml").write_text(request_text(task.config))
    assert task.done
    changed = plan_runs(requested(["ab", "--steps", "50", "--lr", "ab=7e-3", "--out", "o"]))[-1]
    assert changed.folder == task.folder and not changed.done


def test_a_folder_holds_one_comparison() -> None:
    same, other = (requested(["ab", "--steps", steps, "--out", "o"]) for steps in ("50", "60"))
    assert not Path("o").exists()
    with held_folder(same):
        pass
    with held_folder(requested(["ab", "diloco", "--steps", "50", "--seeds", "5", "--out", "o"])):
        pass
    with pytest.raises(ConfigurationError, match="contains a comparison with other settings"), held_folder(other):
        pass
    with pytest.raises(ConfigurationError, match=r"with other settings .steps was 50 and is 60 now"):
        requested(["ab", "--steps", "60", "--out", "o"])
    assert json.loads(Path("o/settings.json").read_text())["steps"] == 50
    Path("used").mkdir()
    Path("used/something").touch()
    with pytest.raises(ConfigurationError, match="is neither empty nor the folder of a comparison"):
        requested(["ab", "--out", "used"])


def test_a_folder_in_use_is_unchanged() -> None:
    one, other = (requested(["ab", "--steps", steps, "--out", "o"]) for steps in ("50", "60"))
    with held_folder(one):
        Path("o/settings.json").unlink()
        with pytest.raises(ConfigurationError, match="in use by another process"), held_folder(other):
            pass
        assert not Path("o/settings.json").exists()


def test_a_comparison_that_was_stopped_at_its_start() -> None:
    """It left a lock, and a file that was not complete."""
    Path("o").mkdir()
    for name in (".lock", ".settings.json.0123456789abcdef.partial"):
        Path("o", name).touch()
    with held_folder(requested(["ab", "--out", "o"])):
        assert Path("o/settings.json").exists()


def test_all_that_is_wrong_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "system_problems", lambda: ["no root"])
    monkeypatch.setattr(page, "_NEEDED", ("no_such_package",))
    line = "abb --rate fast --more-rates slow --nodes 0 --seeds 0 --steps 0 --lr ab --out o"
    with pytest.raises(ConfigurationError) as caught:
        requested(line.split())
    problems = "\n".join(caught.value.problems)
    parts = (
        "no root",
        "abtrain[report]",
        "'fast'",
        "'slow'",
        "0 hosts",
        "--seeds 0",
        "--steps 0",
        "--lr 'ab'",
        "'abb'",
    )
    assert [part for part in parts if part not in problems] == [] and problems.count("too small") == 2
    assert not Path("o").exists()


def test_a_task_that_there_is_not() -> None:
    with pytest.raises(ConfigurationError, match="unknown task 'digits'") as caught:
        requested(["ab", "--task", "digits"])
    assert len(caught.value.problems) == 1
