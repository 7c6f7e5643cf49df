"""The files of a comparison's results, and the page as a browser shows it."""

import dataclasses
import html
import json
import re
from pathlib import Path

import pytest

from abtrain.commands.compare import comparison as arguments
from abtrain.commands.compare.command import show, write_results
from abtrain.commands.compare.report import findings
from abtrain.commands.compare.summary import rows
from abtrain.commands.output import Output
from abtrain.commands.units import human_bytes
from tests.chromium import BROWSER, Page
from tests.unit.commands.made_up import outcomes, requested

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

FIGURES = {
    "accuracy-over-bytes.png",
    "accuracy-over-seconds.png",
    "loss-over-seconds.png",
    "bytes-by-phase.png",
    "utilisation-over-rate.png",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison that has been written."""
    folder = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arguments, "system_problems", list)
        comparison = requested(["ab_outer", "ab:sigma_cutoff=0.3", "--steps", "50", "--out", str(folder)])
    write_results(comparison, outcomes(), "abtrain compare <ab_outer> & more")
    return folder


def test_everything_is_written(folder: Path) -> None:
    assert {path.name for path in folder.glob("*.png")} == FIGURES
    record = json.loads((folder / "compare.json").read_text())
    assert [row["label"] for row in record["rows"]][:3] == ["solo", "ddp", "ddp:wire=bf16"]
    assert len(record["runs"]) == 10 and record["settings"]["steps"] == 50
    assert record["learning_rates"]["ab_outer"] == 3e-3
    assert record["utilisation"]["ab_outer"] == [{"rate": 10**8, "utilisation": pytest.approx(5 / 6)}]


def test_the_page_needs_nothing_else(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "url(" not in page and "<script" not in page
    assert page.count("data:image/png;base64,") == len(FIGURES)
    assert "&lt;ab_outer&gt; &amp; more" in page
    assert "ab_outer sends the least: 10 kB per host, 1/400 of ddp's. It loses no top-1." in html.unescape(page)


def test_a_loss_that_is_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(arguments, "system_problems", list)
    comparison = requested(["ab_outer", "--task", "pysrc-gpt", "--steps", "50", "--out", str(tmp_path)])
    made = [dataclasses.replace(one, top1=None, loss=2.0) for one in outcomes()]
    made[-2] = dataclasses.replace(made[-2], loss=None)  # the second seed of ab_outer
    found = {row.label: row for row in write_results(comparison, made, "abtrain compare")}
    assert (found["ab_outer"].loss, found["ddp"].loss) == (None, 2.0)
    assert {path.name for path in tmp_path.glob("*.png")} == FIGURES
    page = (tmp_path / "report.html").read_text()
    assert "Its validation loss is NaN or infinite." in page and "A loss of - is NaN or infinite." in page
    show(list(found.values()), Output())
    assert re.search("^ab_outer +- ", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium (Debian: apt-get install chromium)")
@pytest.mark.timeout(120)
@pytest.mark.parametrize("width", [1200, 390])
def test_the_page_in_a_browser(width: int, folder: Path) -> None:
    with Page(width) as page:
        page.open(folder / "report.html")
        assert page.evaluate("document.querySelectorAll('figure img').length") == len(FIGURES)
        assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 600)")
        # On a phone a table may be scrolled within itself; the page is as wide as the window.
        fits = "[...document.querySelectorAll('.scroll')].every(table => table.scrollWidth <= table.clientWidth)"
        assert width < 1200 or page.evaluate(fits)
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        assert page.evaluate("parseFloat(getComputedStyle(document.body).fontSize)") >= 16
        assert page.said == []
        asked = [address for address in page.requests if not address.startswith("data:")]
        assert asked == [(folder / "report.html").as_uri()]


@pytest.mark.parametrize(("count", "text"), [(352, "352 B"), (251_300, "251 kB"), (41e6, "41 MB"), (3.1e9, "3.1 GB")])
def test_sizes(count: float, text: str) -> None:
    assert human_bytes(count) == text


def test_findings_name_what_is_lost() -> None:
    made = outcomes(seeds=1)
    lossy = [dataclasses.replace(each, top1=88.5) if each.label == "ab_outer" else each for each in made]
    for finding in findings(rows(lossy, 4)):
        assert finding.endswith("It loses 1.50 points of top-1: 88.50 % instead of 90.00 %.")
    without = [dataclasses.replace(each, top1=None, loss=0.2 if each.label == "ab_outer" else 0.3) for each in made]
    for finding in findings(rows(without, 4)):
        assert finding.endswith("Its validation loss is 0.100 lower than ddp's: 0.200 instead of 0.300.")
    wasteful = [dataclasses.replace(each, wire_bytes=9e6) if ":sigma" in each.label else each for each in made]
    chatty = [each for each in wasteful if each.label != "ab_outer"]
    assert "225% of ddp's" in findings(rows(chatty, 4))[0]
