"""The page of every command that writes one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from abtrain.commands.figures import Figure
from abtrain.commands.page import Page, Table, remarked, write_page

pytest.importorskip("jinja2")

TABLE = Table(
    "Results",
    ("recipe", "top-1", "gain", "remark"),
    (("ddp", "90.1 ± 0.2", "-", "3 runs"), ("<ab>", "89 %", "-1.1", "<b>")),
    "A note.",
    muted=(0,),
)


@pytest.fixture
def page(tmp_path: Path) -> str:
    (tmp_path / "plot.png").write_bytes(b"\x89PNG")
    content = Page("A title", "A lead.", [TABLE, Figure("plot.png", "A plot", "A caption.")], {"command": "go & see"})
    write_page(content, tmp_path / "page.html")
    return (tmp_path / "page.html").read_text()


def test_it_needs_nothing_else(page: str) -> None:
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "url(" not in page and "<script" not in page
    assert 'src="data:image/png;base64,iVBORw=="' in page


def test_names_are_text(page: str) -> None:
    assert "&lt;ab&gt;" in page and "&lt;b&gt;" in page and "go &amp; see" in page and "<b>" not in page


def test_columns_of_numbers_end_at_the_right(page: str) -> None:
    heads = re.findall(r'<th class="(\w+)">(.*?)</th>', page)
    assert heads == [("text", "recipe"), ("number", "top-1"), ("number", "gain"), ("text", "remark")]


def test_references_are_grey(page: str) -> None:
    rows = re.findall(r"<tr( class=\"muted\")?><td[^>]*>(.*?)</td>", page)
    assert rows == [(' class="muted"', "ddp"), ("", "&lt;ab&gt;")]


def test_what_is_left_out_leaves_nothing_behind(page: str) -> None:
    assert 'class="findings"' not in page
    assert remarked([TABLE], "And more.")[0].note == "A note. And more."
    assert remarked([TABLE], "")[0] == TABLE
