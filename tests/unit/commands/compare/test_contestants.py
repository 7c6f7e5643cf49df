import pytest

from abtrain import recipes
from abtrain.commands.compare.contestants import REFERENCES, contestants
from abtrain.errors import ConfigurationError

COMMON = {"task": "digits-mlp", "steps": 100, "workers": 4}


def test_the_references_take_part_and_nobody_twice() -> None:
    found = contestants(["ab", "ddp", "solo", "ab"], {}, COMMON)
    assert [entry.label for entry in found] == [*REFERENCES, "ab"]
    assert all((entry.config.steps, entry.config.workers) == (100, 4) for entry in found)


def test_options_are_read_as_the_settings_want_them() -> None:
    (*_, entry) = contestants(["ab_outer:every=10,wire=int8,outer-lr=0.5,keep_dense_if_larger=true"], {}, COMMON)
    options = {"every": 10, "wire": "int8", "outer_lr": 0.5, "keep_dense_if_larger": True}
    assert recipes.parse(entry.config.recipe) == ("ab_outer", options)


def test_learning_rates_by_recipe_or_by_label() -> None:
    rates = {"ddp": 1e-3, "ddp:wire=bf16": 2e-3, "ab": 3e-3}
    found = {entry.label: entry.config.lr for entry in contestants(["ab", "ab:merge=weighted"], rates, COMMON)}
    assert found == {"solo": None, "ddp": 1e-3, "ddp:wire=bf16": 2e-3, "ab": 3e-3, "ab:merge=weighted": 3e-3}


def test_all_that_is_wrong_is_said_at_once() -> None:
    texts = ["abb", "ab:evry=3", "diloco:every=often", "ddp:every=5", "ab:sigma_cutoff", "diloco:every=0"]
    with pytest.raises(ConfigurationError) as caught:
        contestants(texts, {"powersgd": 1e-3}, COMMON)
    problems = "\n".join(caught.value.problems)
    for text in (
        "abb",
        "'evry'",
        "'often'",
        "'ddp' has no option 'every'",
        "'sigma_cutoff' has no value",
        "--lr powersgd",
    ):
        assert text in problems, text
    assert "diloco:every=0: " in problems


def test_what_is_wrong_for_all_is_said_once() -> None:
    with pytest.raises(ConfigurationError) as caught:
        contestants(["ab"], {}, {**COMMON, "task": "nothing"})
    assert all("nothing" in problem for problem in caught.value.problems)
