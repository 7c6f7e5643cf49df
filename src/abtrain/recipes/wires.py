"""The names of wires: how a merge is sent, in words. Pure: no torch.

A wire is a class below `abtrain.merging.wires`. This is the one place that knows what it is called: a new wire is its
class, and a line in `FORMS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, get_args

from abtrain.errors import ConfigurationError, nearest
from abtrain.recipes.numbers import MOST

CodeName = Literal["fp32", "bf16", "int8", "int4", "int3", "ternary"]
"""The formats that numbers are sent in (see `abtrain.merging.wires.codes`)."""
AUTO = "auto"
AUTO_WIRES = ((2, "int4"), (5, "int3"), (math.inf, "ternary:int3"))
"""The wires that `auto` stands for, each with the largest number of workers that it is for."""


class Form(NamedTuple):
    """A form that names of wires have, such as `lowrank:RANK`. A word in capitals stands for a value.

    Attributes:
        wire: the class of the wire, as `module:name`; it takes the values as keyword arguments (`rank`). A string,
            since recipes import no torch, and the class does.
        words: the wire's name for people, with the values in braces.
    """

    wire: str
    words: str


_DIRECT, _LOW_RANK = "abtrain.merging.wires.direct:DirectWire", "abtrain.merging.wires.low_rank:LowRankWire"
FORMS: dict[str, Form] = {
    "CODE": Form(_DIRECT, "{code}"),
    "CODE:REPLY": Form(_DIRECT, "{code}, back in {reply}"),
    "lowrank:RANK": Form(_LOW_RANK, "factors of rank {rank} in fp32"),
    "lowrank:RANK:CODE": Form(_LOW_RANK, "factors of rank {rank} in {code}"),
}


def _code(text: str) -> str | None:
    return text if text in get_args(CodeName) else None


def _rank(text: str) -> int | None:
    is_rank = text.isdecimal() and len(text) <= len(str(MOST)) and int(text) >= 1
    return int(text) if is_rank else None


_READERS: Mapping[str, Callable[[str], str | int | None]] = {"CODE": _code, "REPLY": _code, "RANK": _rank}
"""For each word in capitals, what reads a value of it; None: the text is no such value."""


class WireName(NamedTuple):
    """The name of a wire, parsed.

    Attributes:
        form: which of `FORMS` it has.
        values: of the words in capitals, by these words in small letters.
    """

    form: str
    values: dict[str, str | int]

    @classmethod
    def parse(cls, name: str) -> WireName:
        """The form and the values of a name that is not `auto`.

        Raises:
            ConfigurationError: no wire is called so.
        """
        for form in FORMS:
            values = _values(form, str(name))
            if values is not None:
                return cls(form, values)
        known = (AUTO, *get_args(CodeName), *(form for form in FORMS if form != "CODE"))
        raise ConfigurationError(f"unknown wire {name!r}: {nearest(str(name), known)}")

    @property
    def wire(self) -> str:
        """The class of the wire, as `module:name`."""
        return FORMS[self.form].wire

    @property
    def words(self) -> str:
        """The wire's name for people."""
        return FORMS[self.form].words.format(**self.values)


def _values(form: str, name: str) -> dict[str, str | int] | None:
    """The values that a name of this form has; None if it has another form."""
    words, texts = form.split(":"), name.split(":")
    if len(words) != len(texts):
        return None
    values: dict[str, str | int] = {}
    for word, text in zip(words, texts, strict=True):
        if word not in _READERS:
            if word != text:
                return None
            continue
        value = _READERS[word](text)
        if value is None:
            return None
        values[word.lower()] = value
    # A sum of exact numbers is exact: it has no way back of its own.
    return None if values.get("code") == "fp32" and "reply" in values else values


def wire_between(workers: int, name: str) -> str:
    """`name`, or the wire that `auto` stands for among so many workers: int4, int3, or ternary:int3.

    Each of n workers sends (n - 1) / n of the numbers and as many averages. With one fixed code, each of 8 workers
    would send 75 % more than each of 2. Rounding errors average out, so more workers allow coarser codes. In these
    codes a worker sends 4.2 to 5.2 bits for a number and its average, whatever the number of workers.
    """
    if name != AUTO:
        return name
    return next(wire for most, wire in AUTO_WIRES if workers <= most)
