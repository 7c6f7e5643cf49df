"""Raises torch.compile's limit on the graphs of a model by as many graphs as the recipe's phases need."""

from __future__ import annotations

import torch
from torch import nn

from abtrain.lowrank.model import FactoredModel

GRAPHS_PER_FORM = 8
"""torch's own limit for a model that keeps its form."""


class GraphLimit:
    """Raises torch.compile's limit whenever a recipe gives the model a new form: other ranks, or other trained factors.

    torch makes a graph for each form, and keeps it for when the form returns. Beyond `recompile_limit` graphs, it runs
    the model eagerly, or stops under `fullgraph=True`.
    """

    def __init__(self) -> None:
        self._forms: set[tuple[tuple[str, int, bool, bool], ...]] = set()

    def allow_form(self, model: FactoredModel) -> None:
        """Allows graphs for the form that the model has now, in each of its compiled modules."""
        records = model.records.items()
        self._forms.add(tuple((name, one.k, one.A.requires_grad, one.B.requires_grad) for name, one in records))
        # torch counts the graphs of all modules that `Module.compile` has compiled together.
        needed = GRAPHS_PER_FORM * len(self._forms) * sum(_is_compiled(module) for module in model.model.modules())
        if needed:
            config = torch._dynamo.config
            config.recompile_limit = max(config.recompile_limit, needed)
            config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, needed)


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or isinstance(module, torch._dynamo.OptimizedModule)
