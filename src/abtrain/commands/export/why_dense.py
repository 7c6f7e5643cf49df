"""Says why no weight in a model file is factored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from abtrain.commands.export.finished import FinishedRun
from abtrain.commands.files import is_regular, read_regular
from abtrain.commands.train.config import recipe_of
from abtrain.commands.train.folder_content import RESULT_FILE
from abtrain.lowrank.model_file import describe


def why_dense(file: Path, run: FinishedRun | None) -> str:
    """Returns the reason why a model file has no factors, as far as the file and its run show it.

    Raises:
        CheckpointError: the file cannot be read.
    """
    form = describe(file).get("form")
    if form == "dense":
        return "the file was written with dense weights: look at the file with factors, without form='dense'"
    if form is None:
        return "another program than abtrain wrote the file, or it has no description"
    if run is None:
        return "the recipe has no factored phase, or ended in a full-rank one, or factors would save less than 10 %"
    if not recipe_of(run.config).factored:
        return f"the recipe {run.config.recipe} has no factored phase"
    dense = _last_dense(run.folder / RESULT_FILE)
    if not dense:
        return "the recipe ended in a full-rank phase"
    name, reason = next(iter(dense.items()))
    return f"{reason} ({name}{f', and {len(dense) - 1} more weights' if len(dense) > 1 else ''})"


def _last_dense(file: Path) -> dict[str, str]:
    """Returns the reasons of weights that stayed dense when weights were last factored; empty if some were factored."""
    history: list[dict[str, Any]] = json.loads(read_regular(file)).get("ranks", []) if is_regular(file) else []
    return dict(history[-1]["dense"]) if history and not history[-1]["ranks"] else {}
