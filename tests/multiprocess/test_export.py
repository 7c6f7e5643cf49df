"""The result of a run is used: exported, and inspected."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from abtrain.comm.communicator import SingleProcess
from abtrain.commands.cli import main
from abtrain.commands.export import export as export_module
from abtrain.commands.export.export import export
from abtrain.commands.export.finished import FinishedRun, find_run, inputs
from abtrain.commands.export.inspection import gains, inspect_file
from abtrain.commands.export.settings import Form
from abtrain.commands.train.config import TrainConfig, resolve
from abtrain.commands.train.folder_content import BEST_MODEL, model_files
from abtrain.commands.train.loop import train
from abtrain.errors import CheckpointError, ConfigurationError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose three matrices are factored with rank 4, with validations."""
    out = tmp_path_factory.mktemp("runs") / "run"
    recipe = "ab_outer:every=5,warmup_steps=10,rank_rule=fixed:4"
    settings = {"workers": 1, "device": "cpu", "steps": 30, "validate_every": 10, "log_every": 5}
    train(resolve(TrainConfig(recipe=recipe, out=out, **settings)), SingleProcess())  # type: ignore[arg-type]
    return out


@pytest.fixture
def run(folder: Path) -> FinishedRun:
    return find_run(folder, best=False)


def outputs(run: FinishedRun) -> tuple[Tensor, Tensor]:
    x = inputs(run, run.data(None), 20)
    return x, run.trained()(x).detach()


def test_the_model_of_the_run_is_found(run: FinishedRun) -> None:
    x, expected = outputs(run)
    for model in (run.dense(), run.plain(), find_run(run.folder, best=True).plain()):
        assert model(x).shape == (20, 10) and not model.training
    torch.testing.assert_close(run.plain()(x), expected, rtol=0, atol=1e-5)


def test_a_plain_file_is_loaded_without_abtrain(run: FinishedRun, tmp_path: Path) -> None:
    x, expected = outputs(run)
    torch.save((x, expected), tmp_path / "expected.pt")
    file, difference = export(run, "plain", tmp_path / "plain.pt", None)
    assert difference < 1e-5
    code = (
        "import sys; sys.modules['abtrain'] = None; import torch\n"
        "x, expected = torch.load(sys.argv[2])\n"
        "model = torch.load(sys.argv[1], weights_only=False)\n"
        "torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(file), str(tmp_path / "expected.pt")], check=True)


def test_an_exported_program_takes_any_batch(run: FinishedRun, tmp_path: Path) -> None:
    x, expected = outputs(run)
    export(run, "torch-export", tmp_path / "m.pt2", None)
    program = torch.export.load(tmp_path / "m.pt2").module()
    for size in (2, 7, 20):
        torch.testing.assert_close(program(x[:size]), expected[:size], rtol=0, atol=1e-5)


def test_dense_weights_have_the_names_of_the_model(run: FinishedRun, tmp_path: Path) -> None:
    file, _ = export(run, "dense", tmp_path / "m.safetensors", None)
    assert load_file(file)["0.weight"].shape == (256, 64)


def test_onnx(run: FinishedRun, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    file, difference = export(run, "onnx", tmp_path / "m.onnx", None)
    assert file.stat().st_size > 0 and difference < 1e-4


def test_nothing_is_overwritten(run: FinishedRun, tmp_path: Path) -> None:
    (tmp_path / "m").write_text("kept")
    with pytest.raises(ConfigurationError, match="exists: name another file"):
        export(run, "plain", tmp_path / "m", None)
    with pytest.raises(ConfigurationError, match="does not exist"):
        export(run, "plain", tmp_path / "nowhere" / "m", None)
    with pytest.raises(ConfigurationError, match="--as 'tflite' is unknown: use one of plain, dense"):
        export(run, "tflite", tmp_path / "other", None)  # type: ignore[arg-type]
    assert (tmp_path / "m").read_text() == "kept"


@pytest.mark.parametrize("form", ["plain", "dense", "torch-export"])
def test_a_full_disk_leaves_no_file(run: FinishedRun, tmp_path: Path, form: Form) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # larger files cannot be written
    try:
        with pytest.raises(CheckpointError, match=r"cannot be written: .*File too large"):
            export(run, form, tmp_path / "m", None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []
    assert export(run, form, tmp_path / "m", None)[0].stat().st_size > 4096


def test_a_file_with_other_outputs_is_not_kept(
    run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "largest_difference", lambda *models: 1e9)
    with pytest.raises(CheckpointError, match="no file was kept"):
        export(run, "plain", tmp_path / "m", None)
    assert list(tmp_path.iterdir()) == []


def test_folders_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="is not a run folder"):
        find_run(tmp_path, best=False)
    (tmp_path / "config.toml").write_text('recipe = "ddp"')
    with pytest.raises(
        ConfigurationError,
        match=r"the run has not finished. The same `abtrain train` command with --out .* continues it$",
    ):
        find_run(tmp_path, best=False)
    for file in model_files(BEST_MODEL).values():
        (tmp_path / file).touch()
    with pytest.raises(ConfigurationError, match=r"or take the best model so far with --best$"):
        find_run(tmp_path, best=False)
    for file in model_files(BEST_MODEL).values():
        (tmp_path / file).unlink()
    with pytest.raises(ConfigurationError, match="--validate-every"):
        find_run(tmp_path, best=True)


def test_weights_of_a_file(run: FinishedRun, tmp_path: Path) -> None:
    first, second, head = inspect_file(run.folder / "model.safetensors")
    assert (first.name, first.m, first.n, first.rank, first.parameters) == ("0.weight", 256, 64, 4, 4 * 320)
    assert 1 <= first.needed <= 4
    W = run.dense().get_parameter("2.weight").detach().double()
    torch.testing.assert_close(
        torch.tensor(second.singular_values, dtype=torch.float64), torch.linalg.svdvals(W)[:4], rtol=1e-4, atol=1e-5
    )
    assert head.rank == 4
    save_file(nn.Linear(3, 5).state_dict(), tmp_path / "dense")
    assert [(w.name, w.m, w.n, w.rank) for w in inspect_file(tmp_path / "dense")] == [("weight", 5, 3, 0)]
    (tmp_path / "dense").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="cannot be read"):
        inspect_file(tmp_path / "dense")


def test_gains_of_a_run(run: FinishedRun) -> None:
    found = gains(run, None)
    assert found.parameters[0] == 85_002 and found.parameters[1] < 85_002 / 5
    assert found.flops[0] == 2 * (64 * 256 + 256 * 256 + 256 * 10) and found.flops[1] < found.flops[0] / 5
    assert found.top1[0] == pytest.approx(found.top1[1], abs=0.3)
    assert found.latency.keys() == {1, 256} and found.difference < 1e-5


def test_commands_fit_eighty_columns(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("COLUMNS", "80")
    for arguments, expected in (
        (
            ["inspect", str(folder), "--plot", str(tmp_path / "p.png")],
            ["0.weight", "256 x 64", "all matrices", "top-1"],
        ),
        (["inspect", str(folder / "model.safetensors")], ["0.weight"]),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert not ended.value.code
        shown = capsys.readouterr().out
        assert all(text in shown for text in expected)
        assert all(len(line) <= 80 for line in shown.splitlines() if "written to" not in line)
    assert (tmp_path / "p.png").stat().st_size > 1000


@pytest.mark.parametrize(("place", "problem"), [("p.png", "exists"), ("no/p.png", "does not exist"), (".", "exists")])
def test_a_plot_that_cannot_be_written_is_reported_first(
    place: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.png").touch()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as ended:
        main(["inspect", "nowhere", "--plot", str(tmp_path / place)])
    first, second = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and problem in first and "--plot needs matplotlib: pip install" in second
