"""Checks whether a run can continue from a state, before anything changes.

Whoever can write to a checkpoint can change any value and its digest. This module therefore checks every value that
`ABTraining.load_state_dict` uses: its type, its range, and for tensors the name, shape and dtype.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from abtrain.checks import anything, blames_data, brief, first_problems, mapping, said, told_names, whole
from abtrain.comm.checksums import stable_repr
from abtrain.consistency.agreement import leaves
from abtrain.engine.state_parts import PARTS, ResumedRun, Resumption, position_of
from abtrain.errors import ConfigurationError
from abtrain.lowrank.fit import MODEL_STATE, model_problems
from abtrain.merging.sharded_state import conversion_problem
from abtrain.recipes import automatic
from abtrain.recipes.recipe import Recipe

VERSION = 11
"""The version of the format of `ABTraining.state_dict`. Each change of the format increases it."""
_MOST_NAMED = 4
"""The largest number of settings in a message."""


def recipe_fingerprint(recipe: Recipe) -> str:
    """Returns 64 hexadecimal digits that identify a recipe. Equal recipes give equal digits in every process."""
    return hashlib.sha256(stable_repr(recipe).encode()).hexdigest()


def recipe_settings(recipe: Recipe) -> dict[str, str]:
    """Returns all settings of a recipe as text, by name, such as `cycle[0].steps`."""
    return {name.removeprefix("recipe."): value for name, value in leaves("recipe", recipe) if name != "recipe"}


def recipe_of(state: Any, recipe: Recipe) -> Recipe:
    """Returns the recipe of a state that `recipe`, which chooses by measurement, has been completed to.

    Returns `recipe` itself if it had chosen nothing yet when the state was saved, or if the state is malformed.
    """
    options = state.get("chosen") if isinstance(state, Mapping) else None
    if recipe.choice is None or not options or not isinstance(options, Mapping):
        return recipe
    with suppress(ConfigurationError, TypeError):
        return automatic.completed(recipe, {str(name): value for name, value in options.items()})
    return recipe


def run_problem(state: Any, recipe: Recipe) -> str:
    """Returns a message if a state has another version or belongs to another recipe; otherwise an empty string."""
    version = state.get("version") if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping) or type(version) is not int or version != VERSION:
        return f"this is not a state of version {VERSION} of abtrain's checkpoints, but {_told_kind(state)}"
    saved, wanted = state.get("recipe"), recipe_fingerprint(recipe)
    if isinstance(saved, str) and saved == wanted:
        return ""
    return (
        f"the checkpoint belongs to another recipe, not {recipe.name!r} of {recipe.total_steps} steps "
        f"({_unlike(state, saved, recipe)}): build the recipe with the same settings, or start a new run"
    )


def _unlike(state: Mapping[str, Any], fingerprint: object, recipe: Recipe) -> str:
    """Describes the first settings in which the recipe of a state differs from this one, or both fingerprints."""
    saved, wanted = state.get("settings"), recipe_settings(recipe)
    named = isinstance(saved, Mapping) and all(isinstance(one, str) for pair in saved.items() for one in pair)
    if saved and named:
        names = [name for name in dict.fromkeys((*wanted, *saved)) if saved.get(name) != wanted.get(name)]
        more = f"; and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
        absent = "absent"
        told = [
            f"{ascii(name[:60])[1:-1]} was {ascii(saved.get(name, absent)[:60])[1:-1]}, and is "
            f"{wanted.get(name, absent)[:60]} now"
            for name in names[:_MOST_NAMED]
        ]
        if told:
            return "; ".join(told) + more
    other = fingerprint[:12] if isinstance(fingerprint, str) else fingerprint
    return f"fingerprint {said(other)}, not {recipe_fingerprint(recipe)[:12]!r}"


def _told_kind(state: Any) -> str:
    """Returns what a value is that is not a state of this version, and the remedy."""
    remedy = "load what ABTraining.state_dict() returned, with the version of abtrain that saved it"
    if isinstance(state, str | Path):
        return f"the text {said(str(state))}: read the file first, such as by torch.load(path), and {remedy}"
    if not isinstance(state, Mapping):
        return f"{said(state)}: {remedy}"
    if type(state.get("version")) is int:
        return f"of version {said(state['version'])}: {remedy}"
    if _is_of_optimizer(state):
        return f"the state of an optimizer: ABTraining.state_dict() includes its optimizers, so {remedy}"
    if _is_of_model(state):
        return f"the state of a model, without step and optimizers: {_for_model('state', state)}"
    for key, held in state.items():
        place = f"state[{said(key)}]"
        if isinstance(held, Mapping) and type(held.get("version")) is int and "recipe" in held:
            return f"a dict that contains one: load {place}"
        if _is_of_model(held):
            return f"a dict, in which {said(key)} is the state of a model: {_for_model(place, held)}"
    return f"a dict with {told_names([said(key) for key in state]) or 'no entries'}: {remedy}"


def _is_of_optimizer(state: Mapping[Any, Any]) -> bool:
    return state.keys() >= {"state", "param_groups"}


def _is_of_model(state: Any) -> bool:
    """Returns whether a value looks like `model.state_dict()`, whose names may belong to factors."""
    return isinstance(state, Mapping) and any(isinstance(value, Tensor) for value in state.values())


def _for_model(place: str, state: Mapping[Any, Any]) -> str:
    """Returns how to load the state of a model, which is found at a `place` in the user's code."""
    names = {name for name in state if isinstance(name, str)}
    if any(name.endswith(".A") and f"{name.removesuffix('.A')}.B" in names for name in names):
        return "save factors by ab.save(path), and load the file by abtrain.load(model, path) before a run begins"
    return f"load it by ab.load_dense_state_dict({place}); a run continues only from ABTraining.state_dict()"


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
    merger, size = state["merger"], run.comm.topology.group_size
    saved = merger.get("places") if isinstance(merger, Mapping) else None
    if type(saved) is int and saved > 0 and saved != size:
        return (
            f"the checkpoint was saved by groups of {saved} workers, which divide the work of merges, but this run has "
            f"groups of {size}: pass group_size={saved}"
        )
    factored = position_of(run.recipe, state).phase.weights == "factored"
    place = run.comm.topology.place_of(run.comm.rank)
    unfit = model_problems(run.shared.model, state["model"], factored, place, size)
    if unfit:
        return (
            f"the checkpoint does not fit: {'; '.join(unfit)}. Build the model and the optimizer that it was saved "
            "from, or load another checkpoint"
        )
    misfit = conversion_problem(run.shared.model, state["model"], place, size)
    if misfit:
        return misfit
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
