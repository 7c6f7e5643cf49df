"""README and docs: Python compiles, whole examples run, options of commands and scripts exist, links lead to files."""

from __future__ import annotations

import ast
import os
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
import tomllib
from functools import cache
from pathlib import Path

import pytest

from abtrain import recipes
from abtrain.commands.cli import COMMANDS
from abtrain.commands.plan.advice import CASES
from tests.pages import PAGES, ROOT, blocks, names_of

GENERATED = ("recipes.md", "commands.md")
MOST_WORDS = 900
MAKE_PAGES = runpy.run_path(str(ROOT / "docs" / "make_pages.py"))
help_of = cache(MAKE_PAGES["help_of"])


def shell_lines(page: Path) -> list[str]:
    """Lines of fenced shell blocks and of blocks that are indented by four, without comments and continuations."""
    text = page.read_text(encoding="utf-8")
    indented = textwrap.dedent("\n".join(re.findall(r"^    \S.*$", text, re.MULTILINE)))
    joined = "\n".join((*blocks(page, "bash"), indented)).replace("\\\n", " ")
    return [re.sub(r"\s# .*| +&$", "", line).strip() for line in joined.splitlines()]


def given_to_abtrain(line: str) -> list[list[str]]:
    """The arguments of `abtrain` in a line, or of `-m abtrain` under another program: command first."""
    words = shlex.split(line.replace("$(which abtrain)", "abtrain"))
    begins = [i for i, word in enumerate(words) if word == "abtrain" and words[i + 1 : i + 2]]
    return [words[i + 1 :] for i in begins if i == 0 or words[i - 1] in ("sudo", "-m") or words[i - 1].endswith("=")]


@pytest.mark.parametrize("page", PAGES, ids=names_of(PAGES))
def test_python_compiles(page: Path) -> None:
    for block in blocks(page, "python"):
        if not block.startswith("--8<--"):
            ast.parse(block)


def test_the_readme_has_the_whole_example() -> None:
    assert blocks(ROOT / "README.md", "python")[0] == (ROOT / "examples" / "own_loop.py").read_text(encoding="utf-8")


def test_tutorials_have_the_whole_examples() -> None:
    """A page includes a file by a line that the formatter must not have changed."""
    for name, example in (("own-model", "own_loop"), ("gpt", "gpt"), ("lora", "lora")):
        page = ROOT / "docs" / "tutorials" / f"{name}.md"
        assert f'\n--8<-- "examples/{example}.py"\n' in page.read_text(encoding="utf-8")
    for name, example in (("sharded-models", "sharded"), ("save-and-resume", "resumable")):
        page = ROOT / "docs" / "how-to" / f"{name}.md"
        assert f'\n--8<-- "examples/{example}.py"\n' in page.read_text(encoding="utf-8")


def test_the_whole_example_runs_on_one_worker(tmp_path: Path) -> None:
    """With fewer steps, since this is about the calls and not about the accuracy."""
    source = (ROOT / "examples" / "own_loop.py").read_text(encoding="utf-8")
    short = re.sub(r"^STEPS = \d+$", "STEPS = 60", source, flags=re.MULTILINE)
    assert short != source
    (tmp_path / "own_loop.py").write_text(short, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    ended = subprocess.run(
        [sys.executable, "own_loop.py"], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=200
    )
    assert ended.returncode == 0, ended.stderr
    assert re.search(r"accuracy \d+\.\d%, factored \d+\.\d : 1", ended.stdout), ended.stdout
    assert (tmp_path / "model.pt").exists()


@pytest.mark.parametrize("page", PAGES, ids=names_of(PAGES))
def test_commands_have_the_options_that_they_are_given(page: Path) -> None:
    if page.name in GENERATED:
        return
    for line in shell_lines(page):
        if "abtrain" not in line:
            continue
        for command, *arguments in given_to_abtrain(line):
            assert command in COMMANDS or command.startswith("-") or command.isupper(), line
            own = arguments[: arguments.index("--")] if "--" in arguments else arguments
            options = [word.partition("=")[0] for word in own if word.startswith("--")]
            unknown = [option for option in options if not re.search(rf"{option}\b", help_of(command))]
            assert not unknown, f"{line}: {unknown}"
            if command in ("train", "recipes", "plan") and own and not own[0].startswith("-") and own[0] != "RECIPE":
                recipes.from_text(own[0], 10_000)


@pytest.mark.parametrize("page", PAGES, ids=names_of(PAGES))
def test_scripts_have_the_options_that_they_are_given(page: Path) -> None:
    """Scripts of this repository, wherever a shell line starts them."""
    for line in shell_lines(page):
        for script, arguments in re.findall(r"\b((?:examples|benchmarks)/[\w/]+\.py)([^;&|]*)", line):
            source = (ROOT / script).read_text(encoding="utf-8")
            for option in re.findall(r"(?<!\S)--([a-z-]+)", arguments.partition(" -- ")[0]):
                assert f"--{option}" in source or re.search(rf"\b{option.replace('-', '_')}\b", source), line


@pytest.mark.parametrize("page", PAGES, ids=names_of(PAGES))
def test_recipes_in_the_text_exist(page: Path) -> None:
    """Recipes with options, such as `ab_outer:every=40`, wherever they stand."""
    found = re.findall(rf"\b(?:{'|'.join(recipes.RECIPES)}):[a-z_]+=[\w.:=,*]*\w", page.read_text(encoding="utf-8"))
    for text in found:
        recipes.from_text(text, 10_000)


@pytest.mark.parametrize("page", PAGES, ids=names_of(PAGES))
def test_rows_of_benchmarks_exist(page: Path) -> None:
    """Rows that `benchmarks/run.py` is told to run."""
    text = page.read_text(encoding="utf-8")
    for line in re.findall(r"python benchmarks/run\.py [^`\n]+", text):
        benchmark, *arguments = shlex.split(line)[2:]
        rows = runpy.run_path(str(ROOT / "benchmarks" / "lines.py"))["BENCHMARKS"][benchmark][1]
        asked = arguments[arguments.index("--only") + 1 :] if "--only" in arguments else []
        assert set(asked) <= set(rows), line


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_links_lead_to_files(name: str) -> None:
    """Links between pages of docs/ are checked by `make docs`."""
    text = re.sub(r"```.*?```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_messages_are_those_of_the_library() -> None:
    """Parts of messages that docs/troubleshooting.md explains; a placeholder in the page is `...`."""
    texts = []
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    known = "\n".join(texts)
    rows = re.findall(
        r"^\| (`.*?) \|", (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    for part in re.findall(r"`([^`]+)`", "\n".join(rows)):
        assert all(piece.strip() in known for piece in part.split("...")), part


def test_the_readme_shows_a_run_as_it_is_displayed() -> None:
    shown = next(block for block in blocks(ROOT / "README.md", "text") if "┌" in block)
    display = (ROOT / "src" / "abtrain" / "commands" / "train" / "display.py").read_text(encoding="utf-8")
    for label in re.findall(r"^│ (.*?) +│", shown, re.MULTILINE):
        assert f'"{label}"' in display, label


def test_the_readme_is_short() -> None:
    text = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(re.findall(r"\w+", re.sub(r"\(http[^)]*\)", " ", text))) <= MOST_WORDS


def test_the_pages_name_all_extras() -> None:
    """For users, that is: `dev`, `docs` and `bench` are for those who change abtrain."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = set(project["optional-dependencies"]) - {"dev", "docs", "bench"}
    table = (ROOT / "docs" / "index.md").read_text(encoding="utf-8").partition("| extra |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == extras
    line = re.search(r"Extras: (.*?)\.\n", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert line and set(re.findall(r"`(\w+)`", line[1])) == extras


def test_generated_pages_are_up_to_date() -> None:
    for name in GENERATED:
        shown = (ROOT / "docs" / name).read_text(encoding="utf-8")
        assert shown == MAKE_PAGES[name.replace(".md", "_page")](), "run python docs/make_pages.py"


def test_plan_and_the_readme_recommend_the_same() -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Which recipe?")[2].partition("##")[0]
    assert re.findall(r"^\| .* \| `([^`]+)`", section, re.MULTILINE) == [*CASES.values(), "ddp"]


def test_every_page_is_in_the_site() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in sorted((ROOT / "docs").rglob("*.md")):
        assert f" {page.relative_to(ROOT / 'docs')}\n" in nav, page
