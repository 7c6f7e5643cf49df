"""Whether a run can go on from a state, found out before anything changes.

Whoever can write to a checkpoint can put any value anywhere, with digests that fit. So every value that
`ABTraining.load_state_dict` is about to use is checked: its type, its range, and for tensors name, shape and dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from abtrain.checks import (
    anything,
    blames_data,
    brief,
    each,
    first_problems,
    mapping,
    number,
    said,
    text,
    whole,
)
from abtrain.engine.saved_state import run_problem
from abtrain.engine.state_parts import PARTS, Place, Run, position_of
from abtrain.lowrank.fit import MODEL_STATE, model_problems
from abtrain.recipes.numbers import MOST
from abtrain.recipes.recipe import Recipe


def state_problem(state: Any, run: Run) -> str:
    """Why a run cannot go on from a state, with the remedy; empty if it can. Changes nothing, and talks to nobody."""
    try:
        return run_problem(state, run.recipe) or _problem(state, run)
    except Exception as error:
        # A worker that raised here would leave the others waiting for it.
        if not blames_data(error):
            raise
        return _damaged([brief(error)])


def _problem(state: Mapping[str, Any], run: Run) -> str:
    # Each stage relies on what those before it have found to be right.
    problems = first_problems(
        lambda: mapping(dict.fromkeys(PARTS, anything))("the state", state),
        lambda: _DECISIONS("decisions", state["decisions"]),
        lambda: _decision_problems(state["decisions"], run.recipe),
        lambda: whole(_decided_until(state), run.recipe.total_steps)("step", state["step"]),
        lambda: MODEL_STATE("model", state["model"]),
    )
    if problems:
        return _damaged(problems)
    _, position = position_of(run.recipe, state)
    unfit = model_problems(run.model, state["model"], position.phase.weights == "factored")
    if unfit:
        return (
            f"the checkpoint does not fit: {'; '.join(unfit)}. Build the model and the optimizer that it was saved "
            "from, or load another checkpoint"
        )
    place = Place(run, state)
    problems = first_problems(*(partial(_part_problems, part, place) for part in PARTS))
    return _damaged(problems) if problems else ""


def _damaged(problems: Sequence[str]) -> str:
    return (
        f"the state cannot be loaded: {'; '.join(problems)}. It was not saved by abtrain, or it is damaged: load "
        "another checkpoint, or start a new run"
    )


def _part_problems(part: str, place: Place) -> Iterator[str]:
    return PARTS[part](place)(part, place.state[part])


_DECISIONS = each(mapping({"step": whole(1, MOST), "ended": text(), "measure": text(), "value": number()}))


def _decision_problems(decisions: Sequence[Mapping[str, Any]], recipe: Recipe) -> Iterator[str]:
    before = 0
    for one in decisions:
        step = one["step"]
        position = recipe.at(step - 1) if before < step < recipe.total_steps else None
        until = None if position is None or position.last or not position.merges else position.phase.until
        if (
            position is None
            or until is None
            or (one["ended"], one["measure"]) != (position.phase.name, until.measure)
            or not one["value"] < until.below
        ):
            yield f"decisions has one of step {said(step)}, at which this recipe leaves nothing to decide that way"
            return
        recipe, before = recipe.cut_after(position), step


def _decided_until(state: Mapping[str, Any]) -> int:
    """The first step at which all that a state says was decided can have been."""
    return max((int(one["step"]) for one in state["decisions"]), default=0)
