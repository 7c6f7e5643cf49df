"""Writes the map of the source into architecture.md, from the first sentence of each module's docstring.

python docs/make_map.py            writes it
python docs/make_map.py --check    exits with 1 if it is not up to date
"""

from __future__ import annotations

import ast
import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE, SOURCE = ROOT / "docs" / "architecture.md", ROOT / "src" / "abtrain"
START, END = "<!-- map: written by docs/make_map.py -->\n", "<!-- end of the map -->\n"
# From the ground up, as imports allow.
ROOMS = ("recipes", "lowrank", "comm", "consistency", "merging", "checkpoint", "engine", "commands")
_WIDTH, _COLUMN, _LONG = 130, 34, 90


def first_sentence(path: Path) -> str:
    """The first sentence of a module's docstring, on one line."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0].split())
    sentence = text.split(". ")[0].rstrip(".")
    return sentence if len(sentence) <= _LONG else re.split(": ", sentence)[0]


def line(depth: int, name: str, text: str) -> str:
    """A module with its sentence, wrapped."""
    head = f"{'  ' * depth}{name}".ljust(_COLUMN)
    return textwrap.fill(
        f"{head} {text}".rstrip(), _WIDTH, initial_indent="    ", subsequent_indent=" " * (_COLUMN + 5)
    )


def folder_lines(folder: Path, depth: int) -> list[str]:
    """A package, its modules, and the packages in it."""
    lines = [line(depth, f"{folder.name}/", first_sentence(folder / "__init__.py"))]
    modules = [path for path in sorted(folder.glob("*.py")) if path.name not in ("__init__.py", "__main__.py")]
    lines += [line(depth + 1, path.name, first_sentence(path)) for path in modules]
    for inside in sorted(path.parent for path in folder.glob("*/__init__.py")):
        lines += folder_lines(inside, depth + 1)
    return lines


def the_map() -> str:
    """The map, as it stands in the page."""
    modules = [path for path in sorted(SOURCE.glob("*.py")) if path.name not in ("__init__.py", "__main__.py")]
    lines = [line(0, "src/abtrain/", ""), *(line(1, path.name, first_sentence(path)) for path in modules)]
    for room in ROOMS:
        lines += folder_lines(SOURCE / room, 1)
    return "\n".join(lines) + "\n"


def page_with_map(page: str) -> str:
    """The page with the map between its marks."""
    before, rest = page.split(START)
    return f"{before}{START}\n{the_map()}\n{END}{rest.split(END)[1]}"


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    if "--check" in sys.argv[1:]:
        sys.exit(page != page_with_map(page))
    PAGE.write_text(page_with_map(page), encoding="utf-8")


if __name__ == "__main__":
    main()
