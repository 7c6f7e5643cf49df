"""The search: what it suggests can be trained, it prunes, it resumes, and it reports what matters."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from abtrain import recipes
from abtrain.commands import cli
from abtrain.commands.paper import search
from abtrain.commands.paper.arguments import parse_arguments
from abtrain.commands.tasks.task import TASKS
from abtrain.commands.train.config import TrainConfig
from abtrain.commands.train.config_problems import validate
from abtrain.errors import AbtrainError, DataError, NonFiniteError

optuna = pytest.importorskip("optuna")
pytest.importorskip("matplotlib")


class Extreme:
    """A trial that suggests the ends of every range."""

    def __init__(self, high: bool) -> None:
        self._high = high

    def suggest_float(self, name: str, low: float, high: float, log: bool = False) -> float:
        return high if self._high else low

    def suggest_int(self, name: str, low: int, high: int, log: bool = False) -> int:
        return high if self._high else low


@pytest.mark.parametrize("high", [False, True])
@pytest.mark.parametrize("steps", [24, 60, 240, 7200])
@pytest.mark.parametrize("recipe", ["ab", "ab_outer"])
def test_what_is_suggested_can_be_trained(recipe: str, steps: int, high: bool) -> None:
    options = search.suggested(recipe, Extreme(high), steps)
    text = recipes.write(recipe, options)
    assert recipes.parse(text) == (recipe, options)
    assert validate(TrainConfig(recipe=text, steps=steps, device="cpu")) == []


def run(out: Path, trials: int) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["paper", "hpo", "--trials", str(trials), "--out", str(out)])
    assert not ended.value.code


def test_a_search_resumes_and_reports_what_matters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[TrainConfig] = []

    def made_up(config: TrainConfig, data: Any) -> dict[str, float]:
        """The smaller the cutoff the better; a large one diverges."""
        asked.append(config)
        cutoff = recipes.parse(config.recipe)[1]["sigma_cutoff"]
        if cutoff > 0.48:
            raise NonFiniteError("the loss is nan")
        return {"top1": 100 * (1 - cutoff)}

    monkeypatch.setattr(search, "simulate", made_up)
    monkeypatch.setattr(search, "_base", lambda request: TrainConfig(task="digits-mlp", batch_size=8, steps=200))
    run(tmp_path, 12)
    assert {config.steps for config in asked} == {50, 200}
    full = sum(config.steps == 200 for config in asked)
    assert 0 < full < 24  # some were pruned
    record = json.loads((tmp_path / "hpo-ab.json").read_text())
    assert record["trials"] == 12 and next(iter(record["importance"])) == "sigma_cutoff"
    tops = [trial["top1"] for trial in record["best"]]
    assert tops == sorted(tops, reverse=True)
    page = (tmp_path / "hpo.html").read_text()
    assert f"abtrain paper hpo --trials 12 --out {tmp_path}" in page
    assert page.count("data:image/png;base64,") == 2 and "outer_momentum" in page
    done = len(asked)
    run(tmp_path, 12)
    assert len(asked) == done and "12 of 12 trials done before" in capsys.readouterr().out


def test_real_trials_are_started_by_the_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = tmp_path / "launch.py"
    stand_in.write_text(
        "import json, sys, pathlib\n"
        "assert sys.argv[1:3] == ['1', '4']\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1]); out.mkdir()\n"
        "result = {'payload_bytes': {'between_groups': 0}, 'seconds': {'total': 1.0}, 'top1': 75.0,\n"
        "          'compression': 2.0, 'parameters': 10, 'steps': 10}\n"
        "(out / 'result.json').write_text(json.dumps(result))\n"
    )
    launcher = f"{sys.executable} {stand_in} {{nodes}} {{workers_per_node}}"
    request = parse_arguments(["hpo", "--scale", "full", "--out", str(tmp_path), "--launcher", launcher])
    base = search._base(request)
    with pytest.raises(DataError, match="CIFAR100 has no default folder"):
        search._trainer(request, base)
    monkeypatch.setitem(TASKS, base.task, dataclasses.replace(TASKS[base.task], find=lambda folder: None))
    assert search._trainer(request, base)(base, 0) == 75.0


def test_a_real_trial_that_diverges_is_pruned() -> None:
    """Other failures end the search: they are not due to the settings of the trial."""

    def failed(config: TrainConfig, trial: int) -> float:
        error = AbtrainError("the launcher ended")
        error.exit_code = codes[0]
        raise error

    codes, study = [7], optuna.create_study()
    base = TrainConfig(task="digits-mlp", batch_size=8, steps=200)
    arguments = {"recipe": "ab", "base": base, "train": failed, "say": print}
    with pytest.raises(optuna.TrialPruned, match="the launcher ended"):
        search._objective(study.ask(), **arguments)
    codes[0] = 6
    with pytest.raises(AbtrainError, match="the launcher ended"):
        search._objective(study.ask(), **arguments)


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for experiment in ("hpo", "ecr"):
        with pytest.raises(SystemExit) as ended:
            cli.main(["paper", experiment, "--out", str(tmp_path / "file" / "out")])
        assert ended.value.code == 2 and "cannot be written" in capsys.readouterr().err


def test_without_optuna(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(SystemExit) as ended:
        cli.main(["paper", "hpo", "--out", str(tmp_path)])
    assert ended.value.code == 2 and "pip install 'abtrain[hpo]'" in capsys.readouterr().err
