"""Prints the output of commands, wrapped at the width of the terminal."""

from __future__ import annotations

from typing import Any, NoReturn

from rich import box
from rich.console import Console
from rich.table import Table

from abtrain.commands.process import discard_output


class Output(Console):
    """Prints to standard output. Wraps text at the width of the terminal; in a pipe, at $COLUMNS or 80 columns."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, **options)

    def plain(self, text: str) -> None:
        """Prints a line without wrapping it, so that paths and commands stay whole."""
        self.print(text, soft_wrap=True)

    def on_broken_pipe(self) -> NoReturn:
        """Discards further output and raises BrokenPipeError. rich would exit with code 1."""
        self.quiet = True
        discard_output()
        raise  # rich calls this method while it handles the BrokenPipeError


def narrow_table() -> Table:
    """Returns an empty table with little padding. It has no title: rich would wrap one at the width of the table."""
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)


def breakable(recipe: str) -> str:
    """Returns the string of a recipe with a space before each option, so that a narrow column can break it there."""
    return recipe.replace(":", ": ", 1).replace(",", ", ")
