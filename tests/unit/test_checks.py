"""Messages of the checks for values of any kind."""

from __future__ import annotations

import json
from functools import reduce
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from abtrain.checkpoint.trees import parse_json
from abtrain.checks import POSITIVE, by_name, each, mapping, maybe, number, one_of, row, said, tensor, text, whole

DEEP: Any = reduce(lambda inner, _: [inner], range(5000), 1)
ODD = [10**5000, -(10**5000), DEEP, "x" * 10**6, "\ud800", b"x", object(), torch.ones(2), {1: DEEP}, float("nan"), 1j]


@pytest.mark.parametrize("value", ODD, ids=range(len(ODD)))
@pytest.mark.parametrize(
    "check", [whole(0, 1), number(), one_of(True, None), tensor((3,)), text(), row(text()), each(text()), mapping({})]
)
def test_a_message_is_short_and_can_be_printed(check: Any, value: Any) -> None:
    for message in (
        said(value),
        *check("place", value),
        *check("place", [value]),
        *by_name(check)("place", {"x" * 999: value}),
    ):
        assert len(message) < 250 and message.encode()


def test_values_of_the_right_kind_pass() -> None:
    check = mapping(
        {"a": whole(0, 3), "b": row(number(), maybe(text())), "c": each(one_of(True, False))}, required="ab"
    )
    assert not list(check("x", {"a": 3, "b": (1e300, None)}))
    assert not list(check("x", {"a": 0, "b": [1, "x"], "c": [False]}))
    assert list(check("x", {"a": True, "b": [10**400]})) == [
        "x/a is True, not a whole number from 0 to 3",
        "x/b is a list of length 1, not a list of length 2",
    ]
    for check, says in {
        number(0): "x is -1, not a finite number of at least 0",
        number(POSITIVE): "x is -1, not a finite number above 0",
        number(0, 1): "x is -1, not a finite number of at least 0 and at most 1",
    }.items():
        assert list(check("x", -1)) == [says]
    assert not list(tensor((None, 2), torch.int8)("x", torch.ones(5, 2, dtype=torch.int8)))
    assert list(tensor((None, 2))("x", torch.ones(5)))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        st.lists,
    )
)
def test_json_comes_back(value: Any) -> None:

    assert parse_json(json.dumps(value).encode()) == value
