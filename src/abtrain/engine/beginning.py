"""Compares the workers' settings when a run begins, and gives all workers the same initial values."""

from __future__ import annotations

import logging
import sys

import torch

from abtrain.comm.communicator import Communicator
from abtrain.consistency.agreement import check_equal
from abtrain.consistency.settings import optimizer_settings, settings_at_start
from abtrain.engine.description import groups_and_traffic
from abtrain.engine.optimizer_problems import doubts_about_optimizers
from abtrain.engine.problems import doubts_about
from abtrain.merging.shared_tensors import SharedTensors
from abtrain.notices import is_set_up
from abtrain.own import IGNORED, own_names
from abtrain.recipes.recipe import Recipe
from abtrain.version import __version__

log = logging.getLogger("abtrain")


def begin(shared: SharedTensors, recipe: Recipe, comm: Communicator, **options: object) -> None:
    """Compares the settings of all workers, and gives all workers the same initial values. Collective over the world.

    The keyword arguments in `options` must be equal on all workers, too.

    Raises:
        RanksDisagreeError: settings differ; all workers raise it, and the message names the setting and the workers.
    """
    model, optimizers = shared.model, shared.model.optimizers
    settings = settings_at_start(optimizers) if shared.same_settings else ()
    values = {
        "topology": comm.topology,
        "recipe": recipe,
        "abtrain": __version__,
        "torch": torch.__version__,
        "optimizers": [f"{type(one).__module__}.{type(one).__qualname__}" for one in optimizers.all],
        **options,
        "param_groups": optimizer_settings(optimizers, model.parameters(), settings),
        IGNORED: ", ".join(sorted(own_names(model.model))),
        "names": list(shared.layout()),
        "model": shared.layout(),
    }
    check_equal(
        comm,
        values,
        "workers were started with different software or settings",
        "Use the same recipe, options, model, optimizer and versions of abtrain and PyTorch on every worker",
    )
    shared.agree()
    comm.begin_run()
    if comm.rank == 0:
        if comm.topology.world_size > 1:
            announce(groups_and_traffic(recipe, comm.topology))
        for doubt in [*doubts_about(recipe, comm), *doubts_about_optimizers(optimizers, recipe)]:
            log.warning(doubt)


def announce(text: str) -> None:
    """Logs a line that every user should see. Prints it to stderr instead if the program has not set up logging."""
    if is_set_up() or logging.root.manager.disable >= logging.INFO:
        log.info(text)
    else:
        print(f"abtrain: {text}", file=sys.stderr, flush=True)
