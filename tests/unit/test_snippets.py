"""Python in README and docs runs: each block with a new model and one worker. Whole examples have their own tests."""

from __future__ import annotations

import ast
import re
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import abtrain
from abtrain import recipes
from abtrain.commands.train.config import TrainConfig
from tests.pages import PAGES, ROOT, fenced, inline_code, names_of

EXAMPLES = [file.read_text(encoding="utf-8") for file in sorted((ROOT / "examples").glob("*.py"))]


def fragments() -> list[Any]:
    """All Python blocks but whole examples, with the names that earlier blocks of the page import."""
    found = []
    for page in PAGES:
        imports = ""
        for number, (text, not_run) in enumerate(fenced(page, "python")):
            if text in EXAMPLES or text.startswith("--8<--"):
                continue
            marks = [pytest.mark.skip(reason=not_run)] if not_run else []
            found.append(pytest.param(imports + text, id=f"{page.relative_to(ROOT)} {number}", marks=marks))
            imports += "".join(
                f"{ast.unparse(node)}\n"
                for node in ast.parse(text).body
                if isinstance(node, ast.Import | ast.ImportFrom)
            )
    return found


def with_parts_of_a_loop() -> dict[str, Any]:
    """What pages take as given: model, optimizer, scheduler, batches and a loss."""
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    recipe, loss_fn, rank = recipes.ab_outer(20, every=4), nn.functional.cross_entropy, 0
    loader = [(torch.randn(8, 16), torch.randint(4, (8,))) for _ in range(3)]
    (x1, y1), (x2, y2), (x, y) = loader
    dataset, workers, epochs = TensorDataset(torch.cat([x1, x2, x]), torch.cat([y1, y2, y])), 1, 40

    def validate(module: nn.Module) -> Tensor:
        with torch.no_grad():
            return module(x)

    return {"abtrain": abtrain, "torch": torch} | locals()


def factored(names: dict[str, Any]) -> abtrain.ABTraining:
    """The model in training, in the middle of a round with factors."""
    ab = abtrain.ABTraining(names["model"], names["optimizer"], names["recipe"])
    for x, y in names["loader"] * 2:
        names["loss_fn"](ab(x), y).backward()
        names["optimizer"].step()
        names["optimizer"].zero_grad()
        ab.step()
    return ab


@pytest.mark.parametrize("text", fragments())
def test_the_block_runs(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = with_parts_of_a_loop()
    if "ABTraining(" not in text:
        names["ab"] = factored(names)
    # Machines that run tests have no GPU; autocast and scalers take a CPU in its place.
    exec(compile(text.replace('"cuda"', '"cpu"'), "block", "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=names_of(PAGES))
def test_code_in_the_text_is_that_of_the_library(page: Path) -> None:
    """Recipes and rank rules that are called in a line of text are built, and what is named of `ab` exists."""
    ab = factored(with_parts_of_a_loop())
    for code in inline_code(page):
        for call in re.findall(r"(?:abtrain\.)?(recipes\.\w+\([^()]*\))", code):
            eval(call.replace("=...", "=8"), {"recipes": recipes, "total_steps": 10_000})
        for name in re.findall(r"(?<![\w.])ab\.(\w+)", code):
            assert hasattr(ab, name), code
        for name in re.findall(r"(?<![\w.])abtrain\.(\w+)\(", code):
            assert hasattr(abtrain, name), code


@pytest.mark.parametrize("page", PAGES, ids=names_of(PAGES))
def test_settings_in_a_file_exist(page: Path) -> None:
    known = {field.name for field in fields(TrainConfig)}
    for text, _ in fenced(page, "toml"):
        assert set(tomllib.loads(text)) <= known, text
