"""README, the pages of docs/ and their fenced blocks, for tests of what they say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
PAGES += [page for folder in ("docs", "benchmarks") for page in sorted((ROOT / folder).rglob("*.md"))]


class Block(NamedTuple):
    """A fenced block. `not_run` is the reason that the page gives in a comment before the block, or empty."""

    text: str
    not_run: str


def names_of(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


def fenced(page: Path, language: str) -> list[Block]:
    """The fenced blocks of one language."""
    found = re.findall(
        rf"^(?:<!-- not run: (.*?) -->\n)?```{language}\b[^\n]*\n(.*?)^```",
        page.read_text(encoding="utf-8"),
        re.DOTALL | re.MULTILINE,
    )
    return [Block(text, reason) for reason, text in found]


def blocks(page: Path, language: str) -> list[str]:
    """The text of the fenced blocks of one language."""
    return [block.text for block in fenced(page, language)]


def inline_code(page: Path) -> list[str]:
    """The code spans of a page, without those of its fenced blocks."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", text)
