"""Checks whether a run can continue from a state, before anything changes.

Whoever can write to a checkpoint can change any value and its digest. This module therefore checks every value that
`ABTraining.load_state_dict` uses: its type, its range, and for tensors the name, shape and dtype.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from abtrain.checks import anything, blames_data, brief, first_problems, mapping, said, whole
from abtrain.comm.checksums import stable_repr
from abtrain.engine.state_parts import PARTS, ResumedRun, Resumption, position_of
from abtrain.lowrank.fit import MODEL_STATE, model_problems
from abtrain.recipes.recipe import Recipe

VERSION = 7
"""The version of the format of `ABTraining.state_dict`. Each change of the format increases it."""


def recipe_fingerprint(recipe: Recipe) -> str:
    """Returns 64 hexadecimal digits that identify a recipe. Equal recipes give equal digits in every process."""
    return hashlib.sha256(stable_repr(recipe).encode()).hexdigest()


def run_problem(state: Any, recipe: Recipe) -> str:
    """Returns a message if a state has another version or belongs to another recipe; otherwise an empty string."""
    version = state.get("version") if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping) or type(version) is not int or version != VERSION:
        return (
            f"this is not a state of version {VERSION} of abtrain's checkpoints, but {said(version)}: load what "
            "ABTraining.state_dict() returned, with the version of abtrain that saved it"
        )
    saved, wanted = state.get("recipe"), recipe_fingerprint(recipe)
    if isinstance(saved, str) and saved == wanted:
        return ""
    other = saved[:12] if isinstance(saved, str) else saved
    return (
        f"the checkpoint belongs to another recipe, not {recipe.name!r} of {recipe.total_steps} steps (fingerprint "
        f"{said(other)}, not {wanted[:12]!r}): build the recipe with the same settings, or start a new run"
    )


def state_problem(state: Any, run: ResumedRun) -> str:
    """Returns why a run cannot continue from a state, and the remedy; empty if it can. Does not communicate."""
    try:
        return run_problem(state, run.recipe) or _problem(state, run)
    except Exception as error:
        # If this worker raised the error now, the other workers would wait for it.
        if not blames_data(error):
            raise
        return _damaged([brief(error)])


def _problem(state: Mapping[str, Any], run: ResumedRun) -> str:
    # Each check assumes that the earlier ones have passed.
    problems = first_problems(
        lambda: mapping(dict.fromkeys(PARTS, anything))("the state", state),
        lambda: whole(0, run.recipe.total_steps)("step", state["step"]),
        lambda: MODEL_STATE("model", state["model"]),
    )
    if problems:
        return _damaged(problems)
    factored = position_of(run.recipe, state).phase.weights == "factored"
    unfit = model_problems(run.shared.model, state["model"], factored)
    if unfit:
        return (
            f"the checkpoint does not fit: {'; '.join(unfit)}. Build the model and the optimizer that it was saved "
            "from, or load another checkpoint"
        )
    at = Resumption(run, state)
    problems = first_problems(*(partial(_part_problems, part, at) for part in PARTS))
    return _damaged(problems) if problems else ""


def _damaged(problems: Sequence[str]) -> str:
    return (
        f"the state cannot be loaded: {'; '.join(problems)}. It was not saved by abtrain, or it is damaged: load "
        "another checkpoint, or start a new run"
    )


def _part_problems(part: str, at: Resumption) -> Iterator[str]:
    return PARTS[part](at)(part, at.state[part])
