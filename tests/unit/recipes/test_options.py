"""Recipes and their options as text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abtrain import recipes
from abtrain.errors import ConfigurationError


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("ab", "ab", {}),
        ("ab:", "ab", {}),
        ("ab_outer:every=40,wire=int4", "ab_outer", {"every": 40, "wire": "int4"}),
        ("ab_outer: outer-lr = 1 , every=4", "ab_outer", {"outer_lr": 1.0, "every": 4}),
        ("ab:sigma_cutoff=.15,warmup_steps=0", "ab", {"sigma_cutoff": 0.15, "warmup_steps": 0}),
        ("ab:rank_rule=energy:0.9", "ab", {"rank_rule": "energy:0.9"}),
        ("ab:wire='ternary:int8'", "ab", {"wire": "ternary:int8"}),
        ("ab:exclude=a.*,b?,svd=shared", "ab", {"exclude": ("a.*", "b?"), "svd": "shared"}),
        ('ab:exclude=["a.*","b"]', "ab", {"exclude": ("a.*", "b")}),
        ("ab:exclude=[ab]*", "ab", {"exclude": ("[ab]*",)}),
        ("ab:exclude=", "ab", {"exclude": ()}),
        ("ab:keep_dense_if_larger=True", "ab", {"keep_dense_if_larger": True}),
    ],
)
def test_texts_are_read_as_the_signature_declares(text: str, name: str, options: dict[str, Any]) -> None:
    assert recipes.parse(text) == (name, options)
    assert list(recipes.parse(text)[1]) == list(options)
    assert all(type(value) is type(options[option]) for option, value in recipes.parse(text)[1].items())
    assert recipes.parse(recipes.write(name, options)) == (name, options)
    assert recipes.from_text(text, 600) == recipes.build(name, 600, **options)


def test_all_that_is_wrong_with_a_text_is_reported_at_once() -> None:
    with pytest.raises(ConfigurationError) as caught:
        recipes.parse("ab_outer:evry=40,delay,every=3,every=4,fragments=few,outer_lr=,keep_dense_if_larger=1")
    assert [problem.partition(" Known")[0] for problem in caught.value.problems] == [
        "recipe 'ab_outer': 'delay' has no value: use OPTION=VALUE, such as ddp:wire=bf16",
        "recipe 'ab_outer': option 'every' is given twice: leave one out",
        "recipe 'ab_outer' has no option 'evry': did you mean 'every'?",
        "recipe 'ab_outer': fragments='few' is not a whole number: use one",
        "recipe 'ab_outer': outer_lr='' is not a number: use one",
        "recipe 'ab_outer': keep_dense_if_larger='1' is neither true nor false: use one",
    ]
    with pytest.raises(ConfigurationError, match="unknown recipe 'abb': did you mean 'ab'"):
        recipes.parse("abb:every=3")


@pytest.mark.parametrize(
    ("recipe", "option", "ours"),
    [
        (recipes.diloco, "sync_every", "every"),
        (recipes.ab_outer, "sync_steps", "every"),
        (recipes.local_sgd, "local_sgd_steps", "every"),
        (recipes.ab_local, "num_fragments", "fragments"),
        (recipes.diloco, "fragment_sync_delay", "delay"),
        (recipes.diloco, "outer_optimizer", "outer_lr"),
        (recipes.ab, "should_quantize", "wire"),
        (recipes.ab_no_groups, "warmup", "warmup_steps"),
        (recipes.ab_outer, "factoring", "factor_lr"),
        (recipes.powersgd, "ranks", "rank"),
    ],
)
def test_names_of_other_libraries_are_answered_with_those_of_abtrain(recipe: Any, option: str, ours: str) -> None:
    """In Python and in a string."""
    for build in (lambda: recipe(1000, **{option: 20}), lambda: recipes.parse(f"{recipe.__name__}:{option}=20")):
        with pytest.raises(
            ConfigurationError, match=f"recipe '{recipe.__name__}' has no option '{option}': did you mean '{ours}'"
        ):
            build()


def test_options_that_a_recipe_cannot_have() -> None:
    with pytest.raises(ConfigurationError, match=r"no option 'sync_every': Known: wire"):
        recipes.ddp(1000, sync_every=20)  # type: ignore[call-arg]
    with pytest.raises(ConfigurationError, match="the name 20 is not a string: give options by their names"):
        recipes.ab_outer(1000, 20)  # type: ignore[arg-type]
    assert recipes.ab_outer(total_steps=1000, every=20) == recipes.ab_outer(1000)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_wrong_value_is_reported_with_its_option(name: str) -> None:
    for option in recipes.options_of(name).keys() - {"exclude"}:
        for value in ("x", "-1", "nan", "1e999", "9" * 5000):
            with pytest.raises(ConfigurationError, match=option):
                recipes.from_text(f"{name}:{option}={value}", 600)


GLOBS = st.lists(st.from_regex(r"[a-z*?.0-9_]+", fullmatch=True), max_size=4).map(tuple)
VALUES = {bool: st.booleans(), int: st.integers(), float: st.floats(allow_nan=False)}


@given(st.data())
def test_what_is_written_is_read_back(data: st.DataObject) -> None:
    """Numbers to the last bit."""
    name = data.draw(st.sampled_from(sorted(recipes.RECIPES)))
    kinds = {option: declared.kind for option, declared in recipes.options_of(name).items()}
    options = {}
    for option in data.draw(st.permutations(sorted(kinds))):
        known = [VALUES[kind] for kind in VALUES if kind in (kinds[option], *getattr(kinds[option], "__args__", ()))]
        options[option] = data.draw(GLOBS if option == "exclude" else known[0] if known else st.just("energy:0.9"))
    assert recipes.parse(recipes.write(name, options)) == (name, options)
