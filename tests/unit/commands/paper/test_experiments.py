"""The experiments as data: cells, runs, and what the command says of them."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from abtrain.commands import cli
from abtrain.commands.paper.arguments import LAUNCHER, parse_arguments
from abtrain.commands.paper.experiments import FIGURES, METHODS, SCALES, TABLES, Cell, Scale, cells
from abtrain.commands.paper.published import AB, DDP, RESNET, VGG
from abtrain.commands.paper.runs import launch_command, outcome, plan_runs, run_all
from abtrain.commands.train.config_file import from_toml
from abtrain.commands.train.config_problems import validate
from abtrain.errors import AbtrainError, ConfigurationError


def typed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, list[str]]:
    with pytest.raises(SystemExit) as ended:
        cli.main(("paper", *arguments))
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err.splitlines()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("experiment", [*TABLES, *FIGURES])
def test_every_cell_can_be_trained(scale: str, experiment: str) -> None:
    found = cells(experiment, SCALES[scale])
    assert {cell.method for cell in found} == set(METHODS)
    for cell in found:
        assert validate(dataclasses.replace(cell.config, device="cpu")) == []


def test_the_papers_scalings() -> None:
    local = cells("table2-local", SCALES["full"], methods=(DDP,))
    assert [cell.global_batch for cell in local if cell.model == RESNET] == [2048, 4096, 8192, 16384, 32768]
    assert {cell.config.batch_size for cell in local} == {256}
    global_ = cells("table2-global", SCALES["full"], methods=(DDP,))
    assert {cell.global_batch for cell in global_} == {4096}
    assert {cell.config.workers for cell in global_} == {16, 32, 64, 128}
    assert {cell.global_batch for cell in cells("table1", SCALES["full"]) if cell.model == VGG} == {1024}


def test_experiments_share_their_runs(tmp_path: Path) -> None:
    local, global_ = (
        {run.folder for run in plan_runs(cells(name, SCALES["tiny"]), 3, tmp_path)}
        for name in ("table2-local", "table2-global")
    )
    assert len(local) == len(global_) == 45 and len(local & global_) == 15
    figure = plan_runs(cells("fig4", SCALES["tiny"]), 3, tmp_path)
    assert {run.folder for run in figure} == local | global_


def test_a_table_its_runs_and_its_figure(tmp_path: Path, minute: Scale, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out = ("--out", str(tmp_path), "--seeds", "2", "--nodes", "2")
    code, _, errors = typed(capsys, "fig2", *out)
    assert code == 2
    assert "10 are missing" in errors[0] and "abtrain paper table2-local --scale tiny --seeds 2" in errors[0]
    code, said, _ = typed(capsys, "table2-local", *out)
    assert code == 0 and "10 runs, 0 of them already finished" in said and "ab_outer" in said
    assert {path.name for path in tmp_path.glob("*.png")} == {"fig2-mlp.png"}
    rows = json.loads((tmp_path / "table2-local.json").read_text())["rows"]
    assert len(rows) == 5 and all(row["seeds"] == 2 for row in rows)
    by_method = {row["cell"]["method"]: row for row in rows}
    assert by_method[DDP]["internode_ratio"] == pytest.approx(1, abs=0.02) and by_method[DDP]["gain"] == 0
    assert by_method["ab_outer"]["internode_ratio"] < 0.6 and by_method[AB]["compression"][0] != 1
    code, said, _ = typed(capsys, "fig2", *out)
    assert code == 0 and "10 runs, 10 of them already finished" in said
    page = (tmp_path / "fig2.html").read_text()
    assert "data:image/png;base64," in page and 'src="http' not in page
    assert "means over 2 seeds" in page


def test_commands_for_missing_runs_have_the_options_given(
    tmp_path: Path, minute: Scale, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    out, methods = str(tmp_path / "my runs"), "Traditional DDP;AB"
    given = ("--nodes", "4,2", "--methods", methods, "--data", "pictures", "--out", out)
    code, _, errors = typed(capsys, "fig3", *given)
    assert code == 2
    command = re.search("`(.*?)`", errors[0])
    assert command is not None
    asked, suggested = (parse_arguments(line) for line in (("fig3", *given), shlex.split(command[1])[2:]))
    assert suggested == dataclasses.replace(asked, experiment="table2-global")


def test_numbers_of_nodes_are_in_order_and_only_once() -> None:
    assert parse_arguments(["ablation", "--nodes", "8,2,8,16", "--dry-run"]).nodes == (2, 8, 16)
    for experiment, option in (("table1", "--nodes"), ("hpo", "--nodes"), ("ecr", "--methods")):
        with pytest.raises(ConfigurationError, match=f"{option} has no effect on {experiment}"):
            parse_arguments([experiment, option, "2" if option == "--nodes" else AB])


def test_a_run_with_other_settings_is_run_again(tmp_path: Path, minute: Scale) -> None:
    chosen = cells("table2-local", minute, nodes=(2,), methods=(DDP,))
    said: list[str] = []
    run_all(plan_runs(chosen, 1, tmp_path), "tiny", LAUNCHER, None, said.append)
    assert all(run.done for run in plan_runs(chosen, 1, tmp_path))
    other = [Cell(c.scaling, c.model, c.method, c.nodes, dataclasses.replace(c.config, lr=1e-3)) for c in chosen]
    assert not any(run.done for run in plan_runs(other, 1, tmp_path))


def test_real_runs_are_started_by_the_launcher(tmp_path: Path) -> None:
    """A launcher that stands in for torchrun writes what training would."""
    run = plan_runs(cells("table2-local", SCALES["full"], nodes=(4,), methods=(AB,)), 1, tmp_path)[0]
    assert launch_command(run, LAUNCHER, Path("/data"))[:5] == ["torchrun", "--nnodes", "4", "--nproc-per-node", "4"]
    stand_in = tmp_path / "launch.py"
    stand_in.write_text(
        "import json, sys, pathlib\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1]); out.mkdir()\n"
        "result = {'payload_bytes': {'between_groups': 4e9}, 'seconds': {'total': 10.0}, 'top1': 75.0,\n"
        "          'compression': 2.0, 'parameters': 10**6, 'steps': 2000}\n"
        "(out / 'result.json').write_text(json.dumps(result))\n"
    )
    run_all([run], "full", f"{sys.executable} {stand_in} {{nodes}}", Path("/data"), lambda line: None)
    assert run.done
    found = outcome(run)
    assert found.internode_ratio == 0.5 and found.traffic == pytest.approx(4e9 * 4 / (0.5384 * 10) / 1e9)
    config = from_toml(run.folder / "request.toml")
    assert (config.workers, config.group_size, config.batch_size) == (16, 4, 256)


def test_real_runs_that_fail(tmp_path: Path) -> None:
    run = plan_runs(cells("table1", SCALES["full"], methods=(DDP,)), 1, tmp_path)[0]
    with pytest.raises(AbtrainError, match="ended with exit code 3: look at its output") as failed:
        run_all([run], "full", f"{sys.executable} -c 'raise SystemExit(3)'", None, lambda line: None)
    assert failed.value.exit_code == 3
    with pytest.raises(AbtrainError, match="nowhere cannot be started"):
        run_all([run], "full", "nowhere", None, lambda line: None)
    assert not run.done


def test_all_that_is_wrong_at_once() -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_arguments(
            ["fig9", "--seeds", "0", "--nodes", "2,x", "--methods", "abb", "--launcher", "go {gpus}", "--arithmetic"]
        )
    assert len(caught.value.problems) == 6
    assert "did you mean 'fig" in str(caught.value)


def test_missing_data_is_said_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, errors = typed(
        capsys, "table1", "--scale", "full", "--data", str(tmp_path), "--out", str(tmp_path / "out")
    )
    assert code == 3 and "train cannot be read" in errors[0]
    assert not (tmp_path / "out").exists()


def test_the_figure_of_the_ecr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    code, said, _ = typed(capsys, "ecr", "--out", str(tmp_path / "arithmetic"))
    assert code == 0 and "ecr.png" in said
    assert (tmp_path / "arithmetic" / "ecr.png").read_bytes().startswith(b"\x89PNG")


def test_ecr_and_arithmetic(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    monkeypatch.setenv("COLUMNS", "200")  # each row of a table is on one line
    code, said, _ = typed(capsys, "ecr")
    assert code == 0 and "43.62" in said and "trains only the matrix Sigma" in said
    code, said, _ = typed(capsys, "table2-local", "--arithmetic")
    lines = [line.split() for line in said.splitlines()]
    assert code == 0
    vit = next(line for line in lines if line[:5] == ["ViT", "B/16", "Traditional", "DDP", "2"])
    assert vit[-6:] == ["8.87", "±", "0.00", "8.84", "-0.3", "%"]
    resnet = next(line for line in lines if line[:4] == ["ResNet-50", "Traditional", "DDP", "4"])
    assert resnet[-2:] == ["-24.2", "%"]


def test_the_full_runs_without_running_them(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchvision")
    code, said, _ = typed(capsys, "table1", "--scale", "full", "--dry-run")
    assert code == 0
    assert "46,800" in said and "warmup, 9,360 steps" in said
    lines = [line.split() for line in said.splitlines()]
    assert next(line for line in lines if line[:4] == ["VGG16", "Traditional", "DDP", "4"])[4:7] == [
        "16",
        "1,024",
        "7,200",
    ]


def test_real_runs_can_be_written_and_started_by_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said, _ = typed(capsys, "table1", "--scale", "full", "--write", "--seeds", "1", "--out", str(tmp_path))
    lines = said.splitlines()
    assert code == 0 and len(lines) == 10
    for line in lines:
        assert line.startswith("torchrun --nnodes 4 --nproc-per-node 4 -m abtrain train --config ")
        assert validate(from_toml(Path(line.split()[9]))) == []


def test_every_run_has_a_name_of_its_own(tmp_path: Path) -> None:
    for scale in SCALES.values():
        found = [cell for name in ("table1", "fig4") for cell in cells(name, scale)]
        folders = {run.folder for run in plan_runs(found, 1, tmp_path)}
        assert len(folders) == len({str(cell.config) for cell in found})
