import dataclasses
from pathlib import Path

import pytest

from abtrain import recipes
from abtrain.commands.tasks.task import TASKS
from abtrain.commands.train.config import TrainConfig, identity, notices, recipe_of, resolve
from abtrain.commands.train.config_file import from_toml, to_toml
from abtrain.commands.train.config_problems import validate
from abtrain.errors import ConfigurationError


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_WORLD_SIZE", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)


def test_the_defaults_are_valid_with_every_recipe_and_task() -> None:
    for recipe in recipes.RECIPES:
        for task in TASKS:
            assert validate(TrainConfig(recipe=recipe, task=task)) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recipe": "abb"}, "unknown recipe 'abb': did you mean 'ab'"),
        ({"task": "digit-mlp"}, "unknown task 'digit-mlp': did you mean 'digits-mlp'"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"device": "cuda"}, "0 usable GPUs"),
        ({"init": "zero"}, "unknown init 'zero'"),
        ({"workers": 4, "group_size": 8}, "world size 4 is not a multiple of group size 8: choose"),
        ({"workers": 4, "group_size": 3}, "not a multiple of group size 3"),
        ({"workers": 0}, "must be at least 1"),
        ({"steps": 0}, "--steps 0 is too small"),
        ({"batch_size": 0}, "--batch-size 0 is too small"),
        ({"log_every": 0}, "--log-every 0 is too small"),
        ({"seed": -1}, "--seed -1 is out of range"),
        ({"seed": 2**32}, "is out of range"),
        ({"lr": 0.0}, "--lr 0.0 is not a finite number above 0"),
        ({"lr": float("nan")}, "--lr nan is not"),
        ({"lr": float("inf")}, "--lr inf is not"),
        ({"weight_decay": -0.1}, "--weight-decay -0.1 is not"),
        ({"timeout": float("inf")}, "--timeout inf is out of range"),
        ({"timeout": float("nan")}, "--timeout nan is out of range"),
        ({"timeout": 1e300}, "--timeout 1e+300 is out of range"),
        ({"recipe": "ab_outer:sigma_cutoff=1.5"}, "sigma_cutoff=1.5 is out of range: use a number from 0 to 1"),
        ({"recipe": "ab_outer:warmup_steps=-1"}, "ab_outer:warmup_steps=-1: phase 'warmup': steps=-1 is too small"),
        ({"recipe": "ab_outer:every=ten"}, "every='ten' is not a whole number"),
        ({"recipe": "ab_outer:evry=40"}, "recipe 'ab_outer' has no option 'evry': did you mean 'every'?"),
        ({"recipe": "ddp:sigma_cutoff=0.2"}, "recipe 'ddp' has no option 'sigma_cutoff'"),
        ({"recipe": "ab:evry=40", "steps": None}, "did you mean 'every'?"),
        ({"recipe": "local_sgd:every=0"}, "every"),
    ],
)
def test_each_problem_has_its_message(settings: dict[str, object], message: str) -> None:
    problems = validate(TrainConfig(**settings))  # type: ignore[arg-type]
    assert len(problems) == 1 and message in problems[0]


def test_all_problems_are_told_at_once() -> None:
    wrong = TrainConfig(recipe="abb", task="mlp", steps=0, lr=-1.0, workers=3, group_size=2, device="tpu")
    assert len(validate(wrong)) == 6


def test_numbers_that_are_no_floating_point_numbers_are_told_of() -> None:
    huge = TrainConfig(lr=10**400, clip=10**400, weight_decay=10**400)
    assert len(validate(huge)) == 3
    assert "null byte" in validate(TrainConfig(out=Path("a\0b")))[0]


def test_a_run_folder_is_never_mixed_with_what_is_there(tmp_path: Path) -> None:
    assert validate(TrainConfig(out=tmp_path)) == []
    assert validate(TrainConfig(out=tmp_path / "new")) == []
    file = tmp_path / "file"
    file.write_text("")
    assert "--overwrite" in validate(TrainConfig(out=tmp_path))[0]
    assert validate(TrainConfig(out=tmp_path, overwrite=True)) == []
    assert "cannot be read" in validate(TrainConfig(out=Path("x" * 300)))[0]
    assert "is a file" in validate(TrainConfig(out=file, overwrite=True))[0]


def test_data_that_the_task_does_not_read_is_noticed() -> None:
    config = TrainConfig(recipe="ddp", data=Path("somewhere"))
    assert validate(config) == []
    assert notices(config) == ["--data is ignored by task digits-mlp"]
    assert notices(TrainConfig()) == []


def test_restarts_without_a_launcher_of_our_own_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(max_restarts=2)
    assert notices(config) == []
    assert notices(dataclasses.replace(config, workers=1)) == [
        "--max-restarts is ignored with one worker, which trains in this process"
    ]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert notices(config) == ["--max-restarts is ignored under torchrun: use torchrun's own option of this name"]


def test_resolve_fills_in_the_tasks_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = resolve(TrainConfig(task="pysrc-gpt", lr=0.5))
    task = TASKS["pysrc-gpt"]
    assert (resolved.steps, resolved.batch_size, resolved.lr) == (task.steps, task.batch_size, 0.5)
    assert resolved.device == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert resolve(TrainConfig(workers=2)).device == "cuda"
    assert resolve(TrainConfig(workers=4)).device == "cpu"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert resolve(TrainConfig(workers=4)).device == "cuda"


def test_toml_round_trip(tmp_path: Path) -> None:
    config = TrainConfig(
        recipe="ab_no_groups:svd=shared,exclude=a.*",
        lr=1e-05,
        steps=7,
        track=("a.*", 'quote " \\ \x7f \n é 🙂'),
        out=tmp_path / "a b",
        overwrite=True,
        init="orthogonal",
        timeout=5,
    )
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config), encoding="utf-8")
    assert from_toml(file) == config
    file.write_text(to_toml(TrainConfig()), encoding="utf-8")
    assert from_toml(file) == TrainConfig()


def test_toml_covers_every_field(tmp_path: Path) -> None:
    written = to_toml(TrainConfig(**{f.name: f.default for f in dataclasses.fields(TrainConfig)}))
    for field in dataclasses.fields(TrainConfig):
        assert any(line.startswith(f"{field.name} = ") for line in written.splitlines()) == (
            field.default is not None and field.name != "config"
        )


def test_toml_problems_are_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(
        'stepps = 3\nlr = "high"\nsteps = 1.5\nworkers = true\ntrack = "a"\ninit = "both"\n'
        'overwrite = 1\ndata = 3\nconfig = "other"\nseed = 4\n'
    )
    with pytest.raises(ConfigurationError) as caught:
        from_toml(file)
    assert len(caught.value.problems) == 9
    for message in (
        "unknown key 'stepps': did you mean 'steps'?",
        "lr = 'high' is of the wrong type: use a number",
        "steps = 1.5 is of the wrong type: use a whole number",
        "workers = True is of the wrong type: use a whole number",
        "track = 'a' is of the wrong type: use a list of strings",
        "init = 'both' is of the wrong type: use 'default' or 'orthogonal'",
        "overwrite = 1 is of the wrong type: use true or false",
        "data = 3 is of the wrong type: use a string",
        "unknown key 'config'",
    ):
        assert message in str(caught.value)


DEEP = b"track = " + b"[" * 3000 + b"]" * 3000


@pytest.mark.parametrize("content", [b"steps = ", b"\xff\xfe", b"steps = " + b"9" * 5000, DEEP], ids=len)
def test_a_toml_file_that_cannot_be_read(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "config.toml"
    file.write_bytes(content)
    for path in (file, tmp_path / "nowhere.toml"):
        with pytest.raises(ConfigurationError, match="cannot be read"):
            from_toml(path)


def test_an_option_that_takes_back_what_its_recipe_does() -> None:
    assert recipe_of(TrainConfig(recipe="ab_outer:keep_dense_if_larger=false", steps=200)) == recipes.ab_outer(
        200, keep_dense_if_larger=False
    )
    assert recipe_of(TrainConfig(recipe="ab_outer", steps=200)) == recipes.ab_outer(200)


def test_two_texts_of_one_recipe_are_one_run() -> None:
    one, other = (
        resolve(TrainConfig(recipe=f"ab_outer:{options}", device="cpu"))
        for options in ("every=40,outer-lr=1", "outer_lr=1.0, every=40")
    )
    assert one == other and one.recipe == "ab_outer:every=40,outer_lr=1.0"
    assert identity(one) == identity(other)


def test_an_option_of_a_recipe_as_a_setting_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("every = 40\n")
    with pytest.raises(ConfigurationError, match='every is an option of recipes: give it as recipe = "RECIPE:every='):
        from_toml(file)
