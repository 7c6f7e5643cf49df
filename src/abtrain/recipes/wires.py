"""Parses the names of wire formats, in which the tensors of a merge are encoded and sent. Imports no torch.

A class in `abtrain.merging.wires` implements each wire format. The format's name is defined only here: a new format
needs a class, and a line in `FORMS`.
"""

from __future__ import annotations

import math
import re
from typing import Literal, NamedTuple, get_args

from abtrain.errors import ConfigurationError, nearest

CodeName = Literal["fp32", "bf16", "int8", "int4", "int3", "ternary"]
"""The formats in which numbers are sent (see `abtrain.merging.wires.codes`)."""
AUTO = "auto"
AUTO_WIRES = ((2, "int4"), (5, "int3"), (math.inf, "ternary:int3"))
"""The wire formats that `auto` stands for, each with the largest number of workers for which it is used."""


class Form(NamedTuple):
    """Describes all wire formats whose names have one form, such as `CODE:REPLY`. Words in capitals stand for values.

    Attributes:
        wire: the class of the format as a string `module:name`, since importing the class would import torch. Its
            keyword arguments are the values, such as `code`.
        words: a description for users, with the values in braces.
    """

    wire: str
    words: str


_DIRECT = "abtrain.merging.wires.direct:DirectWire"
FORMS: dict[str, Form] = {
    "CODE": Form(_DIRECT, "{code}"),
    "CODE:REPLY": Form(_DIRECT, "{code}, averages in {reply}"),
}

_CODES = "|".join(get_args(CodeName))
_VALUES = {
    "CODE": f"(?P<code>{_CODES})",
    # fp32 sends averages without rounding, so it takes no reply code.
    "REPLY": f"(?<!fp32:)(?P<reply>{_CODES})",
}
"""For each word in capitals, the regular expression that matches its values."""


def parse_wire(name: str) -> tuple[Form, dict[str, str]]:
    """Returns the form of a wire format's name, and the values in the name: for `int4`, {"code": "int4"}.

    Raises:
        ConfigurationError: no wire format has this name, or it is `auto` (see `wire_between`).
    """
    for words, form in FORMS.items():
        match = re.fullmatch(":".join(_VALUES.get(word, word) for word in words.split(":")), str(name))
        if match is not None:
            return form, match.groupdict()
    known = (AUTO, *get_args(CodeName), *(words for words in FORMS if words != "CODE"))
    raise ConfigurationError(
        f"unknown wire format {name!r}: {nearest(str(name), known)}. CODE and REPLY are formats such as int4, "
        "and fp32 takes no REPLY"
    )


def wire_between(workers: int, name: str) -> str:
    """Returns `name`, or for `auto` the wire format for this number of workers: int4, int3, or ternary:int3.

    Each of n workers sends (n - 1) / n of the numbers and of the averages. With one fixed code, each of 8 workers would
    send 75 % more than each of 2. Rounding errors average out, so more workers allow coarser codes. With these
    formats, a worker sends 4.2 to 5.2 bits for a number and its average, with any number of workers.
    """
    if name != AUTO:
        return name
    return next(wire for most, wire in AUTO_WIRES if workers <= most)
