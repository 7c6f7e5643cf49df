"""`abtrain recipes` and `abtrain plan` as they are typed."""

from __future__ import annotations

import re
from typing import get_args

import pytest

from abtrain import recipes
from abtrain.commands import cli
from abtrain.commands.plan.recipe_words import GRADIENT_WIRES, TRAINS, options_in_words, phases_in_words, purpose_of
from abtrain.commands.plan.settings import PLAN_EXAMPLE
from abtrain.recipes.sync import GradientWire, Trains

GIVEN = ("--parameters", "1e6", "--step-time", "50ms")


def typed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str], list[str]]:
    """Exit code, lines of output, lines of errors."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out.splitlines(), err.splitlines()


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")


def test_recipes_lists_all_in_a_hundred_columns(capsys: pytest.CaptureFixture[str]) -> None:
    code, lines, _ = typed(capsys, "recipes")
    assert code == 0
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    assert all(name in text for name in recipes.RECIPES)
    assert "100.0%" in text


def test_one_recipe_with_the_payload_of_each_phase(capsys: pytest.CaptureFixture[str]) -> None:
    code, lines, _ = typed(
        capsys, "recipes", "ab_outer", "--task", "fashion-cnn", "--steps", "2000", "--compression", "5.5"
    )
    assert code == 0
    text = "\n".join(lines)
    # The measured payload of a run with these settings.
    assert "0.18% (1/56" in text
    assert "sigma_cutoff" in text
    assert sum("merged every 20 steps" in line for line in lines) == 2


def test_one_recipe_with_options(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, lines, _ = typed(
        capsys, "recipes", "ab_outer:every=10,wire=ternary:int8,outer-momentum=0.5", "--steps", "2000"
    )
    assert code == 0
    assert sum("merged every 10 steps (outer Nesterov, ternary, averages in int8)" in line for line in lines) == 2
    bad = {
        "ab_outer:every=0": "every=0",
        "ab:evry=3": "did you mean",
        "ab:every": "OPTION=VALUE",
        "ab:total_steps=3": "no option 'total_steps'",
        "ab:name=3": "no option 'name'",
        "all:every=3": "sets options for all recipes: name one",
    }
    for text, message in bad.items():
        code, _, errors = typed(capsys, "recipes", text)
        assert (code, len(errors)) == (2, 1)
        assert message in errors[0]


def test_recipes_of_workers_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert typed(capsys, "recipes", "diloco", "--group-size", "2", "--steps", "100")[0] == 0


def test_all_that_is_wrong_with_a_listing(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, errors = typed(
        capsys, "recipes", "abb", "--parameters", "0", "--compression", "0.5", "--workers", "3", "--group-size", "2"
    )
    assert code == 2
    assert len(errors) == 4
    assert "did you mean 'ab'" in errors[0]


@pytest.mark.parametrize(
    ("text", "count"),
    [("350M", "350,000,000"), ("1.3b", "1,300,000,000"), ("25e6", "25,000,000"), ("9_000k", "9,000,000")],
)
def test_a_number_of_parameters_as_people_write_it(text: str, count: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines, errors = typed(capsys, "recipes", "--parameters", text)
    assert (code, errors) == (0, [])
    assert any(f"{count} parameters" in line for line in lines)


@pytest.mark.parametrize("text", ["0", "many", "350MB", "1e14", "nan", "-5"])
def test_what_is_no_number_of_parameters(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, errors = typed(capsys, "plan", f"--parameters={text}", "--step-time", "50ms")
    assert code == 2
    problem = f"--parameters {text} is not a number from 1 to 1e+13: use one such as 350M, 1.3B or 25e6"
    assert errors == [f"abtrain: error: {problem}"]


def test_recipes_that_do_not_fit_the_steps(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, errors = typed(capsys, "recipes", "diloco", "--steps", "5")
    assert (code, len(errors)) == (2, 1)
    assert "longer than the phase" in errors[0]
    code, lines, _ = typed(capsys, "recipes", "--steps", "5")
    text = "\n".join(lines)
    assert code == 0
    # Those that fit are worth seeing all the same.
    assert "100.0%" in text
    assert "phase 'factors': every=20" in text


@pytest.mark.parametrize("columns", [80, 100])
def test_plan_compares_all(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    code, lines, _ = typed(capsys, "plan", *GIVEN, "--rate", "100mbit", "--steps", "1000")
    assert code == 0
    assert max(map(len, lines)) <= columns
    assert any("x ddp bf16" in line for line in lines)
    text = "\n".join(lines)
    assert all(name in text for name in recipes.RECIPES)
    assert lines[0].startswith("Recommended: ab_outer. It takes ")
    assert set(re.findall(r"\b(?:days|hours|minutes|seconds)\b", text)) == {"seconds"}


def test_plan_shows_what_it_recommends_beside_the_others(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    _, lines, _ = typed(capsys, "plan", "--parameters", "25M", "--step-time", "100ms", "--rate", "100mbit")
    assert any("25,000,000 parameters" in line for line in lines)
    advice = re.match(r"Recommended: (\S+)\. It takes (\S+) minutes;.* The fastest is (\S+): (\S+) minutes", lines[0])
    assert advice is not None
    choice, minutes, fastest, least = advice.groups()
    rows = [re.split(r" {2,}", line.strip()) for line in lines]
    shown = [(row[0].replace(": ", ":").replace(", ", ","), row[4]) for row in rows if len(row) == 7]
    assert shown[2:4] == [(choice, minutes), (fastest, least)]
    assert [name.partition(":")[0] for name, _ in shown[4:]] == list(recipes.RECIPES)


def test_a_plan_without_a_step_time_is_shown_a_whole_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, errors = typed(capsys, "plan")
    assert code == 2 and errors[0].endswith(f"as in `{PLAN_EXAMPLE}`")
    assert typed(capsys, *PLAN_EXAMPLE.split()[1:])[0] == 0
    assert f"  {PLAN_EXAMPLE}" in typed(capsys, "plan", "--help")[1]


def test_plan_says_when_data_parallel_training_is_better(capsys: pytest.CaptureFixture[str]) -> None:
    _, lines, _ = typed(capsys, "plan", *GIVEN, "--rate", "40gbit")
    advice = "Recommended: ddp:wire=bf16. It takes"
    assert lines[0].startswith(advice) and "no recipe is much faster" in lines[0]


def test_plan_of_a_recipe_recommends_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    _, lines, _ = typed(capsys, "plan", "diloco", *GIVEN, "--rate", "5mbit")
    assert lines[0].startswith("Recommended: diloco:every=") and "wire=auto" in lines[0]
    assert not any("a CNN, or another model" in line for line in lines)


@pytest.mark.parametrize("columns", [80, 100])
def test_plan_of_one_recipe_by_phase_on_unlike_links(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    unlike = ("--nodes", "2", "--rates", "1gbit,20mbit", "--jitter", "0.2", "--workers-per-node", "2")
    code, lines, _ = typed(capsys, "plan", "ab_outer:every=50,wire=int8,delay=20", *GIVEN, *unlike)
    assert code == 0
    text = "\n".join(lines)
    assert "20 Mbit/s" in text
    assert all(phase in text for phase in ("setup", "warmup", "factors", "all"))


def test_plan_of_a_model_that_stays_dense_in_part(capsys: pytest.CaptureFixture[str]) -> None:
    """GPT-2's embedding is a third of it, so no ranks compress the whole model by 4."""
    options = ("--task", "random-gpt2", "--steps", "40", "--step-time", "4s", "--nodes", "2", "--rate", "100mbit")
    code, lines, _ = typed(capsys, "plan", "ab_local", *options)
    assert code == 0 and "factored weights keep a quarter" in "\n".join(lines)


def test_plan_measures_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    code, lines, _ = typed(capsys, "plan", "diloco", "--task", "digits-mlp", "--steps", "100")
    assert code == 0
    assert "measured" in "\n".join(lines)


def test_all_that_is_wrong_with_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    bad = ("--rates", "1gbot,fast", "--latency", "soon", "--algorithm", "rings", "--jitter", "-1")
    code, _, errors = typed(capsys, "plan", "diloco:wire=int9", *bad)
    assert code == 2
    text = "\n".join(errors)
    expected = ("1gbot", "fast", "soon", "did you mean 'ring'", "jitter", "int9", "--step-time", "2 rates for 4 nodes")
    assert [part for part in expected if part not in text] == []


@pytest.mark.parametrize("option", ["--parameters", "--width"])
def test_a_model_is_that_of_a_task_or_assumed(capsys: pytest.CaptureFixture[str], option: str) -> None:
    for command in ("plan", "recipes"):
        code, _, errors = typed(capsys, command, "--task", "digits-mlp", option, "512")
        assert code == 2 and f"{option} describes an assumed model" in errors[0]


@pytest.mark.parametrize(
    "bad",
    [
        ("--step-time", "0s"),
        ("--nodes", "0"),
        ("--nodes", "100000000"),
        ("--workers-per-node", "3", "--group-size", "5"),
        ("--seed", "-1"),
        ("--batch-size", "0"),
        ("--compression", "1e9"),
        ("--width", "0"),
        ("--task", "digits"),
    ],
)
def test_numbers_that_cannot_be(capsys: pytest.CaptureFixture[str], bad: tuple[str, ...]) -> None:
    code, _, errors = typed(capsys, "plan", "--step-time", "1s", *bad)
    assert code == 2
    assert errors[0].startswith("abtrain: error: ")


def test_an_option_that_the_recipe_has_not(capsys: pytest.CaptureFixture[str]) -> None:
    for text, message in {
        "ab:delay=5": "has no option 'delay'",
        "all:every=5": "sets options for all recipes: name one",
    }.items():
        code, _, errors = typed(capsys, "plan", text, *GIVEN)
        assert (code, len(errors)) == (2, 1)
        assert message in errors[0]


def test_everything_that_a_recipe_may_hold_has_words() -> None:
    assert set(TRAINS) == set(get_args(Trains))
    assert set(GRADIENT_WIRES) == set(get_args(GradientWire))
    for name in recipes.RECIPES:
        assert purpose_of(name).endswith(".")
        assert len(phases_in_words(recipes.build(name, 100))) >= 1


def test_phases_in_words() -> None:
    assert phases_in_words(recipes.ab(100, warmup_steps=10, ab_steps=20, rebound_steps=5)) == [
        "warmup, 10 steps: full, gradients averaged at every step",
        "group, 4 x 20 steps: half train A, half B, merged every 20 steps (mean, fp32)",
        "rebound, 3 x 5 steps: full, gradients averaged at every step",
    ]


def test_phases_of_ones_own_in_words() -> None:
    options = {"warmup_steps": 100, "warmup_every": 50, "delay": 5, "fragments": 2, "wire": "ternary:int8"}
    assert phases_in_words(recipes.ab_outer(500, **options)) == [
        "warmup, 100 steps: full, merged every 50 steps (outer Nesterov, ternary, averages in int8)",
        "factors, 400 steps: all train A and B, steps preconditioned (damping 0.1, times 2), merged every 20 steps "
        "(outer Nesterov, ternary, averages in int8, 2 fragments in turns, hidden behind 5 steps)",
    ]


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_option_has_a_default_and_a_meaning(name: str) -> None:
    listed = options_in_words(name)
    assert [option.name for option in listed] == list(recipes.options_of(name))
    assert all(option.meaning.endswith((".", ")")) for option in listed)
    given_ = {option.name: option.default for option in listed if option.default}
    text = recipes.write(name, given_)
    assert recipes.from_text(text, 600) == recipes.build(name, 600)


@pytest.mark.parametrize(
    ("rate", "begins"), [("100gbit", "auto:every=1,wire=fp32"), ("5mbit", "auto:every=[1-9][0-9]")]
)
def test_auto_is_forecast_as_it_would_choose(rate: str, begins: str, capsys: pytest.CaptureFixture[str]) -> None:
    step = ("--parameters", "870k", "--step-time", "48ms", "--rate", rate)
    code, lines, _ = typed(capsys, "plan", "auto", *step)
    assert code == 0 and any(re.match(begins, line) for line in lines)
    assert any("a step takes 48 ms" in line for line in lines)
    _, all_lines, _ = typed(capsys, "plan", *step)
    assert any(line.startswith("auto: every=") for line in all_lines)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_share_of_muon_in_a_step_is_told(optimizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines, _ = typed(capsys, "plan", "local_sgd", "--task", "digits-mlp", "--optimizer", optimizer)
    assert code == 0 and any("measured here" in line for line in lines)
    assert any(re.search("[1-9][0-9]?% of it by Muon", line) for line in lines) == (optimizer == "muon")


def test_auto_counts_the_steps_that_are_left_after_it_has_measured(capsys: pytest.CaptureFixture[str]) -> None:
    step = ("--parameters", "870k", "--step-time", "48ms", "--rate", "5mbit")
    for steps, every in (("200", 10), ("220", 20)):
        _, lines, _ = typed(capsys, "plan", "auto", *step, "--steps", steps)
        assert any(line.startswith(f"auto:every={every},") for line in lines)
