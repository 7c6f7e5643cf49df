"""Files that runs leave behind, read without trust: whoever crashed or edited them may have left anything there.

`abtrain compare` and `abtrain paper` read results through this module alone, so that a damaged file ends in a message
that names it, and never in a table that shows nonsense.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abtrain.checkpoint.tensor_files import MAX_JSON_BYTES, open_regular
from abtrain.errors import CheckpointError, DataError

_REMEDY = "restore the file from a copy, or move the folder of this run away to have it run again"
_LARGEST = 1e30
"""No time, size or score of a run is larger. Sums and ratios of such numbers stay finite."""


@dataclass(frozen=True)
class JsonRecord:
    """A JSON object of a result file. Its values are checked as they are asked for; keys lead through nested objects.

    Attributes:
        path: of the file.
        content: as JSON has it.
        place: where in the file the object stands, for messages.
    """

    path: Path
    content: Mapping[str, Any]
    place: str = ""

    def number(self, *keys: str, least: float = 0.0) -> float:
        """A number of at least `least`.

        Raises:
            DataError: it is missing, or no such number.
        """
        return self._number(self._value(keys), keys, least, exclusive=False)

    def positive(self, *keys: str) -> float:
        """A number above 0; raises likewise."""
        return self._number(self._value(keys), keys, 0.0, exclusive=True)

    def optional_number(self, *keys: str, least: float = 0.0) -> float | None:
        """A number, or None where the file has null or nothing; raises likewise."""
        value = self._value(keys, default=None)
        return None if value is None else self._number(value, keys, least, exclusive=False)

    def numbers(self, *keys: str) -> dict[str, float]:
        """An object whose values are numbers of at least 0; raises likewise."""
        found = self.mapping(*keys)
        return {_text(self, name, keys): self._number(item, (*keys, name), 0.0, False) for name, item in found.items()}

    def counts(self, *keys: str) -> dict[str, int]:
        """An object whose values are whole numbers of at least 0; raises likewise."""
        found = self.numbers(*keys)
        broken = [name for name, number in found.items() if number != int(number)]
        if broken:
            raise self.error((*keys, broken[0]), found[broken[0]], "a whole number")
        return {name: int(number) for name, number in found.items()}

    def mapping(self, *keys: str) -> Mapping[str, Any]:
        """An object; raises likewise."""
        value = self._value(keys)
        if not isinstance(value, dict):
            raise self.error(keys, value, "an object")
        return value

    def text(self, *keys: str) -> str:
        """A string that can be printed; raises likewise."""
        return _text(self, self._value(keys), keys)

    def optional_text(self, *keys: str) -> str | None:
        """A string, or None where the file has null or nothing; raises likewise."""
        value = self._value(keys, default=None)
        return None if value is None else _text(self, value, keys)

    def records(self, *keys: str) -> list[JsonRecord]:
        """A list of objects; raises likewise."""
        value = self._value(keys)
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self.error(keys, value, "a list of objects")
        return [JsonRecord(self.path, item, f"{self._name(keys)}[{index}]") for index, item in enumerate(value)]

    def error(self, keys: Sequence[str], value: object, wanted: str) -> DataError:
        """Returns the error for a value that is not one of those wanted."""
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
    """Whether a file holds nothing: whoever was to write it crashed."""
    try:
        return path.is_file() and path.stat().st_size == 0
    except OSError:
        return False


def read_record(path: Path) -> JsonRecord:
    """The object that a JSON file holds.

    Raises:
        DataError: the file is missing, unreadable, a link, no regular file, too large, or holds no JSON object.
    """
    return JsonRecord(path, _parsed(path, read_text(path), ""))


def read_lines(path: Path) -> list[JsonRecord]:
    """The objects of a file with one JSON object a line; raises likewise."""
    lines = read_text(path).splitlines()
    return [JsonRecord(path, _parsed(path, line, f"line {n}"), f"line {n}") for n, line in enumerate(lines, 1)]


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        DataError: the file is missing, unreadable, a link, no regular file, too large, or no UTF-8.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            data = b"" if size > MAX_JSON_BYTES else file.read(MAX_JSON_BYTES + 1)
    except (CheckpointError, OSError) as error:
        said = str(error) if isinstance(error, CheckpointError) else f"{path} cannot be read: {error}"
        raise DataError(f"{said}. Remedy: {_REMEDY}") from error
    if max(size, len(data)) > MAX_JSON_BYTES:
        raise DataError(f"{path} has {size} bytes: more than {MAX_JSON_BYTES} are not read. Remedy: {_REMEDY}")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is damaged: it is no UTF-8 ({error}). Remedy: {_REMEDY}") from error


def _parsed(path: Path, text: str, place: str) -> Mapping[str, Any]:
    where = f"{place}: " if place else ""
    if not text.strip("\0 \r\n\t"):
        raise DataError(f"{path} is damaged: {where}it is empty. Remedy: {_REMEDY}")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {where}it is no JSON ({error}). Remedy: {_REMEDY}") from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise DataError(f"{path} is damaged: {where}it holds a {kind}, not an object. Remedy: {_REMEDY}")
    return content


def _text(record: JsonRecord, value: Any, keys: Sequence[str]) -> str:
    # Half a surrogate pair is a string to JSON, and cannot be written to any file.
    if not isinstance(value, str) or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise record.error(keys, value, "a text")
    return value
