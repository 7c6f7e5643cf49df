import dataclasses
import json
import tomllib
from pathlib import Path

import pytest

from abtrain.commands.train.config import TrainConfig, resolve
from abtrain.commands.train.config_file import from_toml
from abtrain.commands.train.run_folder import RunFolder, default_folder
from abtrain.errors import CheckpointError, ConfigurationError


def test_a_run_from_start_to_end(tmp_path: Path) -> None:
    config = resolve(TrainConfig(out=tmp_path / "deep" / "run", device="cpu", lr=0.5))
    with RunFolder(config) as folder:
        folder.begin(0)
        folder.log({"step": 1, "loss": float("nan")})
        folder.log({"step": 2, "loss": 0.25})
        lines = (folder.path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [{"step": 1, "loss": None}, {"step": 2, "loss": 0.25}]
        assert not (folder.path / "result.json").exists()
        result = {"loss": float("inf"), "ranks": [{"k": 3}], "config": {"out": config.out}}
        folder.finish(result, {"model": {"step": 2}})
    result = json.loads((folder.path / "result.json").read_text())
    assert result == {"loss": None, "ranks": [{"k": 3}], "config": {"out": str(config.out)}}
    assert json.loads((folder.path / "model.json").read_text()) == {"model": {"step": 2}}
    names = sorted(path.name for path in folder.path.iterdir())
    assert names == ["config.toml", "metrics.jsonl", "model.json", "result.json"]


def test_config_toml_repeats_the_run_elsewhere(tmp_path: Path) -> None:
    config = resolve(TrainConfig(out=tmp_path / "run", overwrite=True, device="cpu", lr=0.5))
    with RunFolder(config) as folder:
        folder.begin(0)
        again = from_toml(folder.path / "config.toml")
    assert (again.out, again.overwrite) == (None, False)
    assert (again.lr, again.steps, again.device) == (0.5, config.steps, "cpu")
    assert "steps" in tomllib.loads((folder.path / "config.toml").read_text())


def test_a_new_run_does_not_keep_the_old_result(tmp_path: Path) -> None:
    config = resolve(TrainConfig(out=tmp_path, device="cpu"))
    (tmp_path / "notes.txt").write_text("mine")
    with RunFolder(config) as folder:
        folder.begin(0)
        folder.log({"step": 1})
        folder.finish({"top1": 1}, {})
    with RunFolder(config) as folder:
        assert not folder.resumes
        folder.begin(0)
        assert not (tmp_path / "result.json").exists() and not (tmp_path / "model.json").exists()
        assert (tmp_path / "metrics.jsonl").read_text() == ""
        assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be written"):
        RunFolder(TrainConfig(out=tmp_path / "file" / "run"))


def test_the_default_folder_says_what_it_holds() -> None:
    folder = default_folder(TrainConfig(task="fashion-cnn", recipe="ddp", seed=3))
    assert folder.parent == Path("runs") and folder.name.startswith("fashion-cnn-ddp-seed3-20")


def test_an_unfinished_run_keeps_the_records_before(tmp_path: Path) -> None:
    config = resolve(TrainConfig(out=tmp_path, device="cpu"))
    with RunFolder(config) as folder:
        folder.begin(0)
        for step in (1, 2, 3):
            folder.log({"step": step})
        folder.stop({"outcome": "stopped"})
    with (tmp_path / "metrics.jsonl").open("a") as torn:
        torn.write('{"step": 2, "lo')
    assert (tmp_path / "outcome.json").exists()
    with RunFolder(dataclasses.replace(config, workers=7, log_every=3)) as folder:
        assert folder.resumes
        folder.begin(2)
        folder.log({"step": 4})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.toml", "metrics.jsonl"]


def test_an_unfinished_run_of_other_settings_is_kept(tmp_path: Path) -> None:
    config = resolve(TrainConfig(out=tmp_path, device="cpu"))
    with RunFolder(config) as folder:
        folder.begin(0)
    with pytest.raises(ConfigurationError, match=r"other settings \(lr was 0.003 and is 0.1 now; seed was 0 and"):
        RunFolder(dataclasses.replace(config, lr=0.1, seed=3))
    for replaced in ({"overwrite": True}, {"resume": False}):
        with RunFolder(dataclasses.replace(config, lr=0.1, **replaced)) as folder:  # type: ignore[arg-type]
            assert not folder.resumes


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    config = resolve(TrainConfig(out=tmp_path, device="cpu"))
    with RunFolder(config), pytest.raises(ConfigurationError, match="in use by another process"):
        RunFolder(dataclasses.replace(config, overwrite=True))
    (tmp_path / ".lock").write_text("")  # as a run leaves it that was killed
    with RunFolder(config):
        pass
    assert not (tmp_path / ".lock").exists()


def test_a_result_that_cannot_be_written_tells_what_the_next_start_does(tmp_path: Path) -> None:
    with RunFolder(resolve(TrainConfig(out=tmp_path, device="cpu"))) as folder:
        folder.begin(0)
        (tmp_path / "result.json").mkdir()
        with pytest.raises(
            CheckpointError, match=r"run again: the run starts from step 0, since it has no checkpoint$"
        ):
            folder.finish({"top1": 1}, {})
        (tmp_path / "checkpoints" / "step-000000000002").mkdir(parents=True)
        with pytest.raises(CheckpointError, match=r"run again: the run resumes from its last checkpoint$"):
            folder.finish({"top1": 1}, {})
