"""Writes recipes.md and commands.md from the recipes' signatures and from the commands' help texts.

python docs/make_pages.py            writes them
python docs/make_pages.py --check    exits with 1 if they differ from what it would write
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from pathlib import Path
from unittest import mock

from abtrain import recipes
from abtrain.commands import cli
from abtrain.commands.plan.recipe_words import options_in_words, phases_in_words

PAGES = Path(__file__).resolve().parent
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
| `wire` | `fp32`, `bf16`, `int8`, `int4`, `int3`, `ternary`, `auto` ([more](how-to/merges-and-wires.md)) |
| `merge` | `mean`; `trained_only` (over groups that trained the factor); `weighted` (by loss: `ab.step(loss)`) |
| `rank_rule` | `sigma:CUTOFF`, `energy:SHARE`, `stable:FACTOR`, `share:SHARE` or `fixed:K` |
| `exclude` | globs of whole parameter names: `exclude=head.*,embed.*`; in Python a list, `exclude=["head.*"]` |
| `optimizer_state` | `reset`, `project`, `auto` |
| `svd` | `auto`, `each`, `shared` |

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
    """The help text of a command at 80 columns."""
    said = io.StringIO()
    with mock.patch.dict(os.environ, COLUMNS="80"), contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        cli.main([*command, "--help"])
    return said.getvalue().strip()


def commands_page() -> str:
    """The page about commands."""
    texts = [f"\n## abtrain {name}\n\n```text\n{help_of(name)}\n```" for name in cli.COMMANDS]
    return "\n".join((_HEAD, f"```text\n{help_of()}\n```", *texts)) + "\n"


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    """Writes the pages, or checks them."""
    pages = {PAGES / "recipes.md": recipes_page(), PAGES / "commands.md": commands_page()}
    if "--check" in sys.argv[1:]:
        sys.exit(any(page.read_text(encoding="utf-8") != text for page, text in pages.items()))
    for page, text in pages.items():
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
