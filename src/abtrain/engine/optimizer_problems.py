"""Validates a loop's optimizers before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from abtrain.checkpoint.tensor_files import split
from abtrain.checks import brief
from abtrain.engine.communicating_optimizers import communicates
from abtrain.lowrank.model_state import more_of
from abtrain.lowrank.optimizer import PROJECTABLE, is_projectable
from abtrain.lowrank.optimizers import Optimizers, announces_steps, parameters_of
from abtrain.merging.copies import kept_elsewhere
from abtrain.own import shared_parameters
from abtrain.recipes.recipe import Recipe

_MOST_TOLD = 4


def form_problems(optimizer: object) -> list[str]:
    """Why this is neither an optimizer nor a list of them; empty if it is."""
    remedy = "give a torch.optim.Optimizer, or a list of them with parameters of their own"
    if isinstance(optimizer, Optimizer):
        return []
    if not isinstance(optimizer, Sequence) or isinstance(optimizer, str):
        return [f"the optimizer is a {type(optimizer).__name__}, and no torch.optim.Optimizer: {remedy}"]
    if not optimizer:
        return [f"the list of optimizers is empty: {remedy}"]
    odd = [type(one).__name__ for one in optimizer if not isinstance(one, Optimizer)]
    if odd:
        return [f"the list of optimizers holds a {odd[0]}, and no torch.optim.Optimizer: {remedy}"]
    if len(set(map(id, optimizer))) < len(optimizer):
        return [f"the list holds one optimizer twice: {remedy}"]
    return []


def optimizer_problems(model: nn.Module, optimizers: Optimizers, recipe: Recipe) -> list[str]:
    """One message for each thing that cannot be; empty if all is well."""
    problems = _held_problems(model, optimizers)
    for optimizer in optimizers.given:
        talks = communicates(optimizer)
        if talks:
            problems.append(
                f"{type(optimizer).__name__} talks to other workers itself ({talks}), which abtrain does: give an "
                "optimizer of one process, such as the one inside, or the same without its distributed options"
            )
    for optimizer in optimizers.acting:
        kind = type(optimizer).__name__
        if not announces_steps(optimizer):
            problems.append(
                f"{kind} does not call Optimizer.__init__, so that its steps cannot be seen: call it there, or give "
                "the optimizer inside"
            )
        if _scales_rates(recipe) and any("lr" not in group for group in optimizer.param_groups):
            problems.append(
                f"a param group of {kind} has no 'lr', which recipe {recipe.name!r} multiplies: use another optimizer, "
                "or a recipe without local_lr and LR rebound"
            )
    problems += [problem for optimizer in optimizers.all for problem in _saving_problems(optimizer)]
    return problems + (_factoring_problems(optimizers, recipe) if recipe.factored else [])


def doubts_about_optimizers(optimizers: Optimizers, recipe: Recipe) -> list[str]:
    """Returns warnings about settings that are allowed but may not be intended; equal on all workers."""
    doubts = [*filter(None, [old_steps(optimizers)])]
    for optimizer in optimizers.all:
        name = kept_elsewhere(optimizer)
        if name:
            doubts.append(
                f"{type(optimizer).__name__} keeps copies of the weights in its attribute {name!r}, outside of its "
                "state: merges do not move them, and are undone as far as the optimizer goes back to them"
            )
    automatic = recipe.factoring is not None and recipe.factoring.optimizer_state == "auto"
    unknown = [type(one).__name__ for one in optimizers.acting if not is_projectable(one)] if automatic else []
    if unknown:
        doubts.append(
            f"the state of {', '.join(dict.fromkeys(unknown))} cannot follow weights into their factors: it is reset "
            "where weights are factored"
        )
    return doubts


def old_steps(optimizers: Optimizers, most: int = 0) -> str:
    """Returns a warning if the optimizers have made more than `most` steps; empty otherwise."""
    steps = max((_steps_of(optimizer) for optimizer in optimizers.stateful), default=0)
    if steps <= most:
        return ""
    return (
        f"the optimizer has stepped {steps - most:g} times already, and the recipe begins at step 0: to go on with a "
        "run of abtrain, load what ab.state_dict() gave with ab.load_state_dict()"
    )


def _held_problems(model: nn.Module, optimizers: Optimizers) -> list[str]:
    """Every trained parameter has to be held, once, and no other."""
    held = optimizers.parameters()
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    problems = []
    strangers = [tuple(parameter.shape) for parameter in held if id(parameter) not in known]
    if strangers:
        problems.append(
            f"the optimizer holds {len(strangers)} parameters that the model does not have "
            f"(shapes {', '.join(map(str, strangers[:_MOST_TOLD]))}): build it from this model's parameters()"
        )
    held_ids = set(map(id, held))
    idle = [name for name, p in shared_parameters(model).items() if p.requires_grad and id(p) not in held_ids]
    if idle:
        more = f" and {len(idle) - _MOST_TOLD} more" if len(idle) > _MOST_TOLD else ""
        problems.append(
            f"{', '.join(idle[:_MOST_TOLD])}{more} require gradients, but no optimizer that was given holds them: no "
            "worker would share what another one makes of them. Give all optimizers, as a list, and freeze what is "
            "not trained (requires_grad_(False))"
        )
    seen: set[int] = set()
    twice: list[str] = []
    for optimizer in optimizers.given:
        mine = set(map(id, parameters_of(optimizer)))
        twice += [known.get(key, "a parameter") for key in mine & seen]
        seen |= mine
    if twice:
        problems.append(
            f"{', '.join(sorted(twice)[:_MOST_TOLD])} is held by two optimizers: give each parameter to one of them"
        )
    return problems


def _saving_problems(optimizer: Optimizer) -> list[str]:
    """Checks that the other entries of an optimizer's `state_dict` are data, so that a run can resume from them."""
    kind = type(optimizer).__name__
    try:
        split(more_of(optimizer))
    except TypeError as error:
        return [f"what {kind}.state_dict() holds cannot be saved: {error}"]
    except Exception as error:
        return [f"{kind}.state_dict() fails, so that what it holds cannot be saved: {brief(error)}"]
    return []


def _factoring_problems(optimizers: Optimizers, recipe: Recipe) -> list[str]:
    problems = []
    if recipe.phases[0].weights == "factored" and any(map(_steps_of, optimizers.stateful)):
        problems.append("the optimizer has stepped already, and the recipe starts factored: begin with a new optimizer")
    for optimizer in optimizers.all:
        kind, name = type(optimizer).__name__, kept_elsewhere(optimizer)
        if isinstance(optimizer, LBFGS):
            problems.append(
                "LBFGS keeps one flat copy of all gradients, which cannot follow weights that are factored: use "
                "another optimizer, or a recipe without factors such as local_sgd"
            )
        if name:
            problems.append(
                f"{kind} keeps copies of the weights in its attribute {name!r}, which cannot follow weights that are "
                "factored: use another optimizer, or a recipe without factors such as local_sgd"
            )
    projects = recipe.factoring is not None and recipe.factoring.optimizer_state == "project"
    unknown = [type(one).__name__ for one in optimizers.acting if not is_projectable(one)] if projects else []
    if unknown:
        problems.append(
            f"optimizer_state='project' does not know the state of {', '.join(dict.fromkeys(unknown))}: use 'auto' or "
            f"'reset', or one of {', '.join(sorted(known.__name__ for known in PROJECTABLE))}"
        )
    return problems


def _scales_rates(recipe: Recipe) -> bool:
    return recipe.lr_rebound_steps > 0 or any(phase.local_lr != 1 for phase in recipe.phases)


def _steps_of(optimizer: Optimizer) -> float:
    """How many steps an optimizer has made, as far as its state says; state without a count is of one at least."""
    states: list[dict[str, Any]] = [state for state in optimizer.state.values() if isinstance(state, dict) and state]
    counts = [state["step"] for state in states if "step" in state]
    made = [float(count) for count in counts if isinstance(count, int | float | Tensor)]
    return max(made, default=1.0 if states else 0.0)
