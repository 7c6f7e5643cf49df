"""Files of results that are damaged: each ends in a message that names it, and stays where it is."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from abtrain import __version__
from abtrain.commands.compare.comparison import held_folder
from abtrain.commands.compare.runs import ComparisonRun, outcome
from abtrain.commands.paper.experiments import SCALES, cells
from abtrain.commands.paper.pages import write_study
from abtrain.commands.paper.published import AB
from abtrain.commands.paper.runs import PaperRun, prepare_folder, run_all
from abtrain.commands.paper.runs import outcome as paper_outcome
from abtrain.commands.paper.studies import study_cells
from abtrain.commands.paper.tables import rows as paper_rows
from abtrain.commands.runs.folder_run import check_folders
from abtrain.errors import DataError
from tests.faults.kept_runs import RESULT, compared, contents, finish, full_run, put_result
from tests.unit.commands.made_up import requested

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
    name: str, kind: str, finished: Path, labs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = finished / "runs/ab_outer-seed0-100mbit" / name
    DAMAGED[kind](file)
    capsys.readouterr()
    if name == "train/metrics.jsonl" and kind == "empty":
        assert compared(finished) == 0  # a run that is shorter than --log-every has no curve
        return
    assert compared(finished) == 3 and labs == []
    said = capsys.readouterr().err
    assert str(file) in said and "Remedy: restore the file" in said and "Traceback" not in said
    assert os.path.lexists(file)


VALUES: dict[str, tuple[dict[str, object], str]] = {
    "NaN": ({"top1": float("nan")}, "top1 is nan"),
    "infinity": ({"loss": float("inf")}, "loss is inf"),
    "too large": ({"loss": 1e300}, "loss is 1e\\+300"),
    "a string": ({"top1": "<script>alert(1)</script>"}, "top1 is '<script>"),
    "a boolean": ({"compression": True}, "compression is True"),
    "no top-1": ({"top1": None}, "top1 is None"),
    "no time": ({"seconds": {"total": 0, "sync": 0}}, "seconds.total is 0, not a number above 0"),
    "a list": ({"seconds": [1, 2]}, r"seconds is \[1, 2\], not an object"),
    "half": ({"seconds": {"total": 1}}, "seconds.sync is missing"),
    "negative": ({"payload_bytes": {**RESULT["payload_bytes"], "total": -1}}, "payload_bytes.total is -1"),
    "phases": ({"payload_bytes": {**RESULT["payload_bytes"], "by_phase": {"full": "all"}}}, "by_phase.full is 'all'"),
    "half a letter": ({"versions": {"abtrain": "\ud800"}}, "versions.abtrain is"),
}


@pytest.mark.parametrize("kind", VALUES)
def test_a_result_with_values_that_cannot_be(kind: str, task: ComparisonRun) -> None:
    values, said = VALUES[kind]
    finish(task, **values)
    with pytest.raises(DataError, match=said):
        outcome(task)
    with pytest.raises(DataError, match=said):
        check_folders([task], overwrite=True)


def test_a_loss_that_is_not_finite_is_no_damage(task: ComparisonRun) -> None:
    """JSON has no NaN: a run that diverged has null."""
    finish(task, loss=None)
    assert outcome(task).loss is None


@pytest.mark.parametrize(
    "hosts", ["[]", "{}", "3", "[1]", "[{}]", '[{"tx_bytes": 0}]', '[{"tx_bytes": "1"}]', '[{"tx_bytes": NaN}]']
)
def test_hosts_that_cannot_be(hosts: str, task: ComparisonRun) -> None:
    (task.folder / "lab/lab.json").write_text(f'{{"hosts": {hosts}}}')
    with pytest.raises(DataError, match=r"lab.json is damaged: hosts"):
        outcome(task)


@pytest.mark.parametrize("line", ["{}", "[]", "", "{", '{"seconds": "1", "loss": 1}', '{"seconds": 1, "loss": NaN}'])
def test_a_line_of_the_metrics_that_cannot_be(line: str, task: ComparisonRun) -> None:
    (task.folder / "train/metrics.jsonl").write_text(f'{{"seconds": 1, "loss": 2}}\n{line}\n')
    with pytest.raises(DataError, match=r"metrics.jsonl is damaged: line 2"):
        outcome(task)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"steps": {"a": 1}}'])
def test_the_settings_of_a_comparison_that_are_damaged(
    content: bytes, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (finished / "settings.json").write_bytes(content)
    before = contents(finished)
    assert compared(finished) == 2
    assert str(finished) in capsys.readouterr().err and contents(finished) == before


@pytest.mark.parametrize("name", ["compare.json", "report.html"])
def test_a_page_that_cannot_be_written_costs_no_run(
    name: str, tmp_path: Path, labs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["ab_outer", "--nodes", "2", "--steps", "200", "--out", str(tmp_path / "out")]
    with held_folder(requested(arguments)):
        pass
    (tmp_path / "out" / name).mkdir()
    assert compared(tmp_path / "out") == 2
    assert "Finished runs are kept" in capsys.readouterr().err
    (tmp_path / "out" / name).rmdir()
    # A link is replaced, and what it leads to is left alone.
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "out" / name).symlink_to(tmp_path / "mine")
    labs.clear()
    assert compared(tmp_path / "out") == 0 and labs == []
    assert (tmp_path / "mine").read_text() == "mine"


def test_names_in_a_result_are_text(finished: Path) -> None:
    file = finished / "runs/ab_outer-seed0-100mbit/train/result.json"
    content = json.loads(file.read_text())
    content["versions"]["abtrain"] = "<script>alert(1)</script>"
    content["payload_bytes"]["by_phase"] = {"<img src=x>": 1000}
    file.write_text(json.dumps(content))
    assert compared(finished) == 0
    page = (finished / "report.html").read_text()
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
    note = f"The results come from several versions of abtrain: 0.0.9, {__version__}."
    assert note in capsys.readouterr().out and note in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "compare.json").read_text())["note"] == note


def simulated(out: Path) -> PaperRun:
    """A simulated run that has come to its end."""
    cell = cells("table2-global", SCALES["tiny"], (4,), (AB,))[0]
    run = PaperRun(cell, 0, out / "run")
    prepare_folder(run)
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
        prepare_folder(run)
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
    prepare_folder(real)
    put_result(real)
    real.result_file.write_text("")
    with pytest.raises(DataError, match="it is empty"):
        run_all([real], "full", "false", None, print)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"ranks": {}}, "ranks is"),
        ({"ranks": [{"ranks": {"conv.weight": "8"}}]}, "ranks.0..ranks.conv.weight is '8'"),
        ({"ranks": [{"ranks": {"<b>": 8}}]}, "not a possible rank for a weight of this model"),
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


def divergent(out: Path, divergence: object) -> PaperRun:
    cell = study_cells("divergence", (4,), (AB,))[0]
    run = PaperRun(cell, 0, out / "runs" / "run")
    prepare_folder(run)
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
