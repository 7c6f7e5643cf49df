"""The beginning of a run: workers compare what they were started with, and take the same initial values."""

from __future__ import annotations

import logging
import sys

import torch

from abtrain.comm.communicator import Communicator
from abtrain.consistency.settings import check_start
from abtrain.lowrank.model import FactoredModel
from abtrain.merging.shared_tensors import SharedTensors
from abtrain.own import IGNORED, own_names
from abtrain.recipes.recipe import Recipe
from abtrain.recipes.sync import GradientSync, WeightSync
from abtrain.version import __version__

log = logging.getLogger("abtrain")


def begin(state: SharedTensors, model: FactoredModel, recipe: Recipe, comm: Communicator, **options: object) -> None:
    """Compares versions, recipe, options and layouts, and makes initial values equal. Collective over the world.

    Args:
        state: the tensors that merges make equal.
        model: with its optimizers.
        recipe: of the run.
        comm: of this worker.
        options: the other arguments that have to be equal on all workers.

    Raises:
        RanksDisagreeError: on all workers, with what differs and where.
    """
    check_start(
        comm,
        recipe,
        abtrain=__version__,
        torch=torch.__version__,
        **options,
        **{IGNORED: ", ".join(sorted(own_names(model.model)))},
        names=list(state.layout()),
        model=state.layout(),
    )
    state.agree()
    comm.begin_run()


def levels(recipe: Recipe) -> bool:
    """Whether a recipe goes from rounds to shared gradients."""
    kinds = {type(phase.sync) for phase in recipe.phases}
    return {WeightSync, GradientSync} <= kinds


def announce(text: str) -> None:
    """Logs a line that every user needs, or prints it where the program has not set up logging."""
    if log.hasHandlers() or logging.root.manager.disable >= logging.INFO:
        log.info(text)
    else:
        print(f"abtrain: {text}", file=sys.stderr, flush=True)
