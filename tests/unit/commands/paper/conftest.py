"""The small scale, shrunk once more: digits, and runs of a second."""

from __future__ import annotations

import pytest

from abtrain.commands.paper import experiments
from abtrain.commands.paper.experiments import Model, Scale
from abtrain.commands.paper.published import AB, NO_GROUPS

_MLP = Model("digits-mlp", 1437, 1, 16, 32)


@pytest.fixture
def minute(monkeypatch: pytest.MonkeyPatch) -> Scale:
    scale = Scale(
        "tiny",
        {"MLP": _MLP},
        {"MLP": (_MLP, 2)},
        local=(2, 4),
        global_=(2, 4),
        workers_per_node=1,
        options={AB: {"sigma_cutoff": 0.3, "svd": "shared"}, NO_GROUPS: {"sigma_cutoff": 0.3}},
    )
    monkeypatch.setitem(experiments.SCALES, "tiny", scale)
    return scale
