"""Reads and validates the result files of runs. A crash or an edit may have damaged them.

`abtrain compare` and `abtrain paper` read results only through this module. A damaged file therefore leads to a message
that names the file, and never to a wrong table.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abtrain.checkpoint.files import MAX_JSON_BYTES, open_regular
from abtrain.errors import CheckpointError, DataError, a_or_an

_REMEDY = "restore the file from a copy, or move the folder of this run away and run the command again"
_LARGEST = 1e30
"""The largest accepted number. No real time, size or score is larger, and sums and ratios up to it are finite."""


@dataclass(frozen=True)
class JsonRecord:
    """A JSON object in a result file, whose values are checked when they are read.

    The methods receive the nested `keys` of a value: `number("seconds", "total")` reads content["seconds"]["total"].
    They raise DataError if the value is missing (except `optional_...`) or is not of the expected type.

    Attributes:
        path: the path of the file.
        content: the parsed object.
        place: the location of the object in the file, for messages.
    """

    path: Path
    content: Mapping[str, Any]
    place: str = ""

    def number(self, *keys: str, least: float = 0.0) -> float:
        """Returns the number at `keys`, which must be at least `least`."""
        return self._number(self._value(keys), keys, least, exclusive=False)

    def positive(self, *keys: str) -> float:
        """Returns the number at `keys`, which must be above 0."""
        return self._number(self._value(keys), keys, 0.0, exclusive=True)

    def optional_number(self, *keys: str, least: float = 0.0) -> float | None:
        """Returns the number at `keys`, which must be at least `least`; None if it is null or missing."""
        value = self._value(keys, default=None)
        return None if value is None else self._number(value, keys, least, exclusive=False)

    def numbers(self, *keys: str) -> dict[str, float]:
        """Returns the numbers in the object at `keys`, by name. Each must be at least 0."""
        found = self.mapping(*keys)
        return {_text(self, name, keys): self._number(item, (*keys, name), 0.0, False) for name, item in found.items()}

    def counts(self, *keys: str) -> dict[str, int]:
        """Returns the whole numbers in the object at `keys`, by name. Each must be at least 0."""
        found = self.numbers(*keys)
        broken = [name for name, number in found.items() if number != int(number)]
        if broken:
            raise self.error((*keys, broken[0]), found[broken[0]], "a whole number")
        return {name: int(number) for name, number in found.items()}

    def mapping(self, *keys: str) -> Mapping[str, Any]:
        """Returns the object at `keys` as a mapping of names to values, which are not checked."""
        value = self._value(keys)
        if not isinstance(value, dict):
            raise self.error(keys, value, "an object")
        return value

    def text(self, *keys: str) -> str:
        """Returns the string at `keys`. Strings that UTF-8 cannot encode are rejected: no file can contain them."""
        return _text(self, self._value(keys), keys)

    def optional_text(self, *keys: str) -> str | None:
        """Returns the string at `keys`, as `text` does; None if it is null or missing."""
        value = self._value(keys, default=None)
        return None if value is None else _text(self, value, keys)

    def records(self, *keys: str) -> list[JsonRecord]:
        """Returns the objects in the list at `keys`, each as a record."""
        value = self._value(keys)
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self.error(keys, value, "a list of objects")
        return [JsonRecord(self.path, item, f"{self._name(keys)}[{index}]") for index, item in enumerate(value)]

    def error(self, keys: Sequence[str], value: object, wanted: str) -> DataError:
        """Returns the error about an invalid `value` at `keys`. `wanted` describes the values that are valid there."""
        shown = reprlib.repr(value)
        return DataError(f"{self.path} is damaged: {self._name(keys)} is {shown}, not {wanted}. Remedy: {_REMEDY}")

    def _value(self, keys: Sequence[str], **otherwise: object) -> Any:
        found: Any = self.content
        for depth, key in enumerate(keys):
            if not isinstance(found, dict):
                raise self.error(keys[:depth], found, "an object")
            if key not in found:
                if "default" in otherwise:
                    return otherwise["default"]
                raise DataError(f"{self.path} is damaged: {self._name(keys)} is missing. Remedy: {_REMEDY}")
            found = found[key]
        return found

    def _number(self, value: Any, keys: Sequence[str], least: float, exclusive: bool) -> float:
        fits = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= _LARGEST
        if not fits or (exclusive and value == least):
            raise self.error(keys, value, f"a number {'above' if exclusive else 'of at least'} {least:g}")
        number: float = value
        return number

    def _name(self, keys: Sequence[str]) -> str:
        return ".".join(filter(None, (self.place, *keys))) or "the content"


def is_empty(path: Path) -> bool:
    """Whether a file is empty. A crash of the process that wrote it may leave it so."""
    try:
        return path.is_file() and path.stat().st_size == 0
    except OSError:
        return False


def read_record(path: Path) -> JsonRecord:
    """Reads a JSON file that contains one object.

    Raises:
        DataError: the file is missing, unreadable, a link, not a regular file, too large, or not a JSON object.
    """
    return JsonRecord(path, _parsed(path, read_text(path), ""))


def read_lines(path: Path) -> list[JsonRecord]:
    """Reads a file with one JSON object per line. Raises the errors of `read_record`."""
    lines = read_text(path).splitlines()
    return [JsonRecord(path, _parsed(path, line, f"line {n}"), f"line {n}") for n, line in enumerate(lines, 1)]


def read_text(path: Path) -> str:
    """Reads a text file.

    Raises:
        DataError: the file is missing, unreadable, a link, not a regular file, too large, or not UTF-8.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            data = b"" if size > MAX_JSON_BYTES else file.read(MAX_JSON_BYTES + 1)
    except (CheckpointError, OSError) as error:
        message = str(error) if isinstance(error, CheckpointError) else f"{path} cannot be read: {error}"
        raise DataError(f"{message}. Remedy: {_REMEDY}") from error
    if max(size, len(data)) > MAX_JSON_BYTES:
        raise DataError(f"{path} has {size} bytes, but the limit is {MAX_JSON_BYTES}. Remedy: {_REMEDY}")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is damaged: it is not UTF-8 ({error}). Remedy: {_REMEDY}") from error


def _parsed(path: Path, text: str, place: str) -> Mapping[str, Any]:
    where = f"{place}: " if place else ""
    if not text.strip("\0 \r\n\t"):
        raise DataError(f"{path} is damaged: {where}it is empty. Remedy: {_REMEDY}")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {where}it is not JSON ({error}). Remedy: {_REMEDY}") from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise DataError(f"{path} is damaged: {where}it contains {a_or_an(kind)}, not an object. Remedy: {_REMEDY}")
    return content


def _text(record: JsonRecord, value: Any, keys: Sequence[str]) -> str:
    # JSON strings may contain unpaired surrogates, which cannot be written to a file.
    if not isinstance(value, str) or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise record.error(keys, value, "a string")
    return value
