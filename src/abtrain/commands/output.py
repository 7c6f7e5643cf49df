"""Prints the output of commands in the width of the terminal."""

from __future__ import annotations

from typing import Any, NoReturn

from rich import box
from rich.console import Console
from rich.table import Table

from abtrain.commands.process import discard_output


class Output(Console):
    """Standard output. Text wraps at the width of the terminal; in a pipe at COLUMNS, or at 80 columns without it."""

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
    """Returns a table with little padding and without a title, which rich would wrap at the width of the table."""
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)


def breakable(recipe: str) -> str:
    """Returns the string of a recipe with spaces between its options, where a narrow column can break it."""
    return recipe.replace(":", ": ", 1).replace(",", ", ")
