"""Writes recipes.md and commands.md from the recipes' signatures and from the commands' help texts.

python docs/make_pages.py            writes them
python docs/make_pages.py --check    exits with 1 if they do not have all recipes, commands and options
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from abtrain import recipes
from abtrain.commands.cli import COMMANDS
from abtrain.commands.plan.recipe_words import options_in_words, phases_in_words

PAGES = Path(__file__).resolve().parent
OPTION = re.compile(r"--[a-z][a-z-]+")
_STEPS = 10_000

_RECIPES = f"""# Recipes

This page is written by `docs/make_pages.py` from `abtrain.recipes`. `abtrain recipes RECIPE` shows the same, with the
bytes that each phase sends.

On the command line options follow the name, as in `ab_outer:every=40,wire=int4`. In Python they are keyword arguments:

```python
from abtrain import recipes

recipe = recipes.ab_outer(total_steps=10_000, every=40, wire="int4")
same = recipes.from_text("ab_outer:every=40,wire=int4", 10_000)
```

Which one to take: [Choose a recipe](how-to/choose.md). What wires are:
[Merges, wires and delays](how-to/merges-and-wires.md).

The phases below are those of a run of {_STEPS:,} steps with the default options. An empty default depends on other
options.
"""
_HEAD = """# Commands

This page is written by `docs/make_pages.py` from the help texts: `abtrain COMMAND --help` shows the same.

Bytes and seconds: [Choose a recipe](how-to/choose.md). Emulated clusters: [The lab](lab.md). The paper:
[The paper's experiments](paper.md).
"""


_VALUES = """
## Values of options

| option | values |
|---|---|
| `wire` | `fp32`, `bf16`, `int8`, `int4`, `int3`, `ternary`, `lowrank:4`, `auto` ([more](how-to/merges-and-wires.md)) |
| `merge` | `mean`; `trained_only` (over groups that trained the factor); `weighted` (by loss: `ab.step(loss)`) |
| `rank_rule` | `sigma:CUTOFF`, `energy:SHARE`, `stable:FACTOR` or `fixed:K` |
| `exclude` | globs of parameter names, separated by commas: `exclude=head.*,embed.*` |
| `optimizer_state` | `reset`, `project`, `auto` |
| `svd` | `each`, `shared` |

"""


def recipes_page() -> str:
    """The page about recipes."""
    parts = [_RECIPES.rstrip()]
    for name, recipe in recipes.RECIPES.items():
        about = re.sub(r"\n *\n? *Raises:.*", "", (recipe.__doc__ or "").strip(), flags=re.DOTALL)
        parts += [f"\n## {name}\n", re.sub(r"\n +", "\n", about) + "\n"]
        parts += [f"- {line}" for line in phases_in_words(recipe(_STEPS))]
        options = options_in_words(name)
        rows = [f"| `{one.name}` | {_code(one.default)} | {_cell(one.meaning)} |" for one in options]
        parts += ["\n| option | default | meaning |\n|---|---|---|", *rows] if rows else ["\nIt has no options."]
    return "\n".join(parts) + "\n" + _VALUES.rstrip() + "\n"


def help_of(*command: str) -> str:
    """The help text of a command, without frames."""
    environment = {**os.environ, "COLUMNS": "110", "NO_COLOR": "1", "TERM": "dumb"}
    ended = subprocess.run(
        [sys.executable, "-m", "abtrain", *command, "--help"],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    titled = re.sub(r"^╭─ (.*?) ─+╮$", r"\n\1:", ended.stdout, flags=re.MULTILINE)
    unframed = re.sub(r"^╰─+╯$|^│|│$", "", titled, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" +$", "", unframed, flags=re.MULTILINE)).strip()


def commands_page() -> str:
    """The page about commands."""
    texts = [f"\n## abtrain {name}\n\n```text\n{help_of(name)}\n```" for name in COMMANDS]
    return "\n".join((_HEAD, f"```text\n{help_of()}\n```", *texts)) + "\n"


def complete(page: str) -> bool:
    """Whether a page of commands has every option that the commands have, and no other; texts may differ by version."""
    sections = page.split("\n## abtrain ")[1:]
    shown = {section.split("\n")[0]: set(OPTION.findall(section)) for section in sections}
    return shown == {name: set(OPTION.findall(help_of(name))) for name in COMMANDS}


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    first, second = PAGES / "recipes.md", PAGES / "commands.md"
    if "--check" in sys.argv[1:]:
        sys.exit(
            first.read_text(encoding="utf-8") != recipes_page() or not complete(second.read_text(encoding="utf-8"))
        )
    first.write_text(recipes_page(), encoding="utf-8")
    second.write_text(commands_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
