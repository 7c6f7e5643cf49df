"""The studies: their runs can be trained, and their pages are written."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from abtrain.commands import cli
from abtrain.commands.paper.experiments import Scale
from abtrain.commands.paper.runs import plan_runs
from abtrain.commands.paper.studies import STUDIES, study_cells
from abtrain.commands.train.config import notices
from abtrain.commands.train.config_problems import validate

pytest.importorskip("matplotlib")


@pytest.mark.parametrize("name", STUDIES)
def test_every_run_of_a_study_can_be_trained_and_has_a_folder(name: str, tmp_path: Path) -> None:
    found = study_cells(name)
    for cell in found:
        config = dataclasses.replace(cell.config, device="cpu")
        assert validate(config) == [] and notices(config) == []
    runs = plan_runs(found, 1, tmp_path)
    assert len(runs) == len({str(cell.config) for cell in found})


@pytest.mark.parametrize(
    ("name", "picked", "figures"),
    [
        ("merges", "AB, mean;outer Nesterov;Traditional DDP", {"merges.png"}),
        ("divergence", "AB", {"divergence-ab-2.png"}),
        ("large-batch", "Traditional DDP", {"large-batch-fig2-mlp.png", "large-batch-fig3-mlp.png"}),
    ],
)
def test_a_page(name: str, picked: str, figures: set[str], tmp_path: Path, minute: Scale) -> None:
    arguments = ["paper", name, "--nodes", "2", "--seeds", "1", "--methods", picked, "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert not ended.value.code
    assert {path.name for path in tmp_path.glob("*.png")} == figures
    text = (tmp_path / f"{name}.md").read_text()
    assert text.startswith(f"# {STUDIES[name].question}\n\n    abtrain paper {name} --nodes 2")
    assert set(re.findall(r"\]\((.*?)\)", text)) == figures
    assert "data:image/png" in (tmp_path / f"{name}.html").read_text()
    if name == "divergence":
        assert "| AB | 2 | 0.weight.A |" in text


def test_nothing_left_to_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["paper", "ablation", "--methods", "ab_outer", "--out", str(tmp_path)])
    assert ended.value.code == 2 and "ablation has no runs" in capsys.readouterr().err
