"""`abtrain inspect` gives the true reason why no weight of a file is factored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from abtrain.commands.export.finished import FinishedRun
from abtrain.commands.export.why_dense import why_dense
from abtrain.commands.train.config import TrainConfig
from abtrain.lowrank.model_file import save_model

REASON = "factors of rank 10 would save less than 10 %"


def file(folder: Path, form: str | None = "factored") -> Path:
    save_model(folder / "m.safetensors", {"w": torch.ones(2, 2)}, {"form": form} if form else {})
    return folder / "m.safetensors"


@pytest.mark.parametrize(
    ("form", "words"),
    [("dense", "written with dense weights"), (None, "another program"), ("factored", "save less than 10 %")],
)
def test_a_file_of_its_own(form: str | None, words: str, tmp_path: Path) -> None:
    assert words in why_dense(file(tmp_path, form), None)


@pytest.mark.parametrize(
    ("recipe", "ranks", "words"),
    [
        ("ddp", [], "the recipe ddp has no factored phase"),
        ("ab", [{"ranks": {"0.weight": 3}, "dense": {}}], "the recipe ended in a full-rank phase"),
        (
            "ab_outer",
            [{"ranks": {}, "dense": {"0.weight": REASON, "2.weight": REASON}}],
            f"{REASON} (0.weight, and 1 more weights)",
        ),
    ],
)
def test_the_file_of_a_run(recipe: str, ranks: list[object], words: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps({"ranks": ranks}))
    run = FinishedRun(tmp_path, "model", TrainConfig(recipe, steps=2000))
    assert why_dense(file(tmp_path), run) == words
