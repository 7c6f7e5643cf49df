"""Validates the optimizers at the start of a run, and their state as soon as it exists."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from abtrain.checkpoint.trees import split
from abtrain.checks import brief, told_names
from abtrain.comm.communicator import Communicator
from abtrain.consistency.nested_state import cannot_be_shared
from abtrain.engine.communicating_optimizers import communicates
from abtrain.engine.optimizer_hooks import OptimizerHooks
from abtrain.engine.sharding import state_unlike_shards
from abtrain.errors import UsageError, a_or_an
from abtrain.lowrank.model_state import more_of
from abtrain.lowrank.optimizer import PROJECTABLE
from abtrain.lowrank.optimizers import Optimizers, announces_steps, is_a, parameters_of
from abtrain.merging.copies import kept_elsewhere
from abtrain.merging.shared_tensors import SharedTensors
from abtrain.own import trained_parameters
from abtrain.recipes.factoring import OptimizerState
from abtrain.recipes.recipe import Recipe
from abtrain.shards import local

log = logging.getLogger("abtrain")

_FIRST_STEPS = 2
"""The number of steps within which most optimizers create their state."""
_WITHOUT_FACTORS = "use another optimizer, or a recipe without factors such as local_sgd"
_CANNOT_FOLLOW = f"which abtrain cannot convert when weights are factored: {_WITHOUT_FACTORS}"
_NOT_MOVED = "outside its state, so they undo merges: keep them in optimizer.state[parameter], where merges find them"


def form_problems(optimizer: object) -> list[str]:
    """Returns a message, in a list, if an object is neither an optimizer nor a list of optimizers."""
    remedy = "pass a torch.optim.Optimizer, or a list of optimizers that share no parameters"
    if isinstance(optimizer, Optimizer):
        return []
    if not isinstance(optimizer, Sequence) or isinstance(optimizer, str):
        return [f"the optimizer is {a_or_an(type(optimizer).__name__)}, not a torch.optim.Optimizer: {remedy}"]
    if not optimizer:
        return [f"the list of optimizers is empty: {remedy}"]
    odd = [type(one).__name__ for one in optimizer if not isinstance(one, Optimizer)]
    if odd:
        return [f"the list of optimizers has {a_or_an(odd[0])}, not a torch.optim.Optimizer: {remedy}"]
    if len(set(map(id, optimizer))) < len(optimizer):
        return [f"the list contains the same optimizer twice: {remedy}"]
    return []


def optimizer_problems(model: nn.Module, optimizers: Optimizers, recipe: Recipe) -> list[str]:
    """Returns one message for each problem of the optimizers with this model and recipe."""
    problems = _held_problems(model, optimizers)
    for optimizer in optimizers.given:
        evidence = communicates(optimizer)
        if evidence:
            problems.append(
                f"{type(optimizer).__name__} communicates with other workers itself ({evidence}), as abtrain does: "
                "pass an optimizer that does not, such as the one that it wraps, or turn its distributed options off"
            )
    for optimizer in optimizers.acting:
        kind = type(optimizer).__name__
        hooks = getattr(optimizer, "_optimizer_step_pre_hooks", {}).values()
        if any(isinstance(getattr(hook, "__self__", None), OptimizerHooks) for hook in hooks):
            problems.append(f"{kind} belongs to another ABTraining: call close() on that one first")
        if not announces_steps(optimizer):
            problems.append(
                f"{kind} does not call Optimizer.__init__, so abtrain cannot see its steps: call it in "
                f"{kind}.__init__, or pass the optimizer that {kind} wraps"
            )
        if recipe.lr_rebound_steps > 0 and any("lr" not in group for group in optimizer.param_groups):
            problems.append(
                f"a param group of {kind} has no 'lr', which recipe {recipe.name!r} scales: use another optimizer, "
                "or a recipe without LR rebound"
            )
    problems += [problem for optimizer in optimizers.all for problem in _saving_problems(optimizer)]
    return problems + (_factoring_problems(optimizers, recipe) if recipe.factored else [])


def doubts_about_optimizers(optimizers: Optimizers, recipe: Recipe) -> list[str]:
    """Returns warnings about optimizer settings that are valid but possibly unintended; equal on all workers."""
    doubts = _old_steps(optimizers)
    for optimizer in optimizers.all:
        doubts += _copies_outside_state(optimizer, _NOT_MOVED)
    unknown = _not_projectable(optimizers, recipe, "auto")
    if unknown:
        doubts.append(
            f"the state of {unknown} cannot be converted to factors: it is reset whenever weights are factored"
        )
    return doubts


def _old_steps(optimizers: Optimizers, most: int = 0) -> list[str]:
    """Returns a warning, in a list, if the optimizers have made more than `most` steps."""
    steps = max((_steps_of(optimizer) for optimizer in optimizers.stateful), default=0)
    if steps <= most:
        return []
    return [
        f"the optimizer has already made {steps - most:g} steps, but the recipe begins at step 0: to continue a run "
        "of abtrain, pass what ab.state_dict() returned to ab.load_state_dict()"
    ]


class NewState:
    """Checks new optimizer state: whether it can be saved, made equal on all workers, and converted to factors."""

    def __init__(self, shared: SharedTensors, recipe: Recipe, comm: Communicator) -> None:
        self._shared, self._recipe, self._speaks = shared, recipe, comm.rank == 0
        self._warned_of_steps = bool(_old_steps(shared.model.optimizers))
        phases = recipe.phases
        # If workers share gradients after a phase with merges, their optimizer state must be made equal first.
        self._equalized = (
            comm.topology.world_size > 1
            and any(phase.rounds is not None for phase in phases)
            and any(phase.shares_gradients for phase in phases)
        )

    def check(self, steps_done: int) -> None:
        """Checks the optimizer state after a training step, and logs warnings.

        Args:
            steps_done: the number of training steps before this one.

        Raises:
            UsageError: the recipe does not support the state, or an optimizer is in evaluation mode.
        """
        optimizers = self._shared.model.optimizers
        for optimizer in optimizers.all:
            # Schedule-free optimizers have the entry `train_mode`.
            if any(group.get("train_mode") is False for group in optimizer.param_groups):
                raise UsageError(
                    f"{type(optimizer).__name__} is in evaluation mode at ab.step(): call optimizer.train() "
                    "before it, and validate between ab.step() and the next training step"
                )
        if not self._shared.copies.look() and steps_done >= _FIRST_STEPS:
            return
        doubts = [doubt for optimizer in optimizers.stateful for doubt in self._doubts(optimizer)]
        if steps_done == 0 and not self._warned_of_steps:
            doubts += _old_steps(optimizers, most=1)
        for doubt in doubts if self._speaks else ():
            log.warning(doubt)

    def _doubts(self, optimizer: Optimizer) -> list[str]:
        """Returns warnings about the state of an optimizer that has stepped.

        Raises:
            UsageError: the recipe does not support the state.
        """
        kind, odd, factored = type(optimizer).__name__, cannot_be_shared(optimizer.state), self._recipe.factored
        unsharded = state_unlike_shards(optimizer)
        if unsharded:
            raise UsageError(
                f"{kind} keeps {unsharded} in its state, which is not sharded like the weight that it belongs to: use "
                "an optimizer whose state has the shape of the weights, such as AdamW or SGD"
            )
        if odd and self._equalized:
            raise UsageError(
                f"{kind} keeps {odd} in its state, which cannot be made equal on all workers as recipe "
                f"{self._recipe.name!r} requires: use another optimizer or a recipe that only merges, such as local_sgd"
            )
        copies = _copies_outside_state(optimizer, _CANNOT_FOLLOW if factored else _NOT_MOVED)
        if copies and factored:
            raise UsageError(copies)
        unsaved = (
            [f"{kind} keeps {odd} in its state, so checkpoints cannot be saved: use another optimizer"] if odd else []
        )
        return unsaved + copies


def _copies_outside_state(optimizer: Optimizer, consequence: str) -> list[str]:
    """Returns a message with a `consequence`, in a list, if an optimizer keeps weight copies outside its state."""
    name = kept_elsewhere(optimizer)
    kind = type(optimizer).__name__
    return [f"{kind} keeps copies of the weights in its attribute {name!r}, {consequence}"] if name else []


def _not_projectable(optimizers: Optimizers, recipe: Recipe, policy: OptimizerState) -> str:
    """Returns the classes of optimizers whose state cannot be converted; empty if the recipe has another policy."""
    if recipe.factoring is None or recipe.factoring.optimizer_state != policy:
        return ""
    return ", ".join(dict.fromkeys(type(one).__name__ for one in optimizers.acting if not is_a(one, PROJECTABLE)))


def _held_problems(model: nn.Module, optimizers: Optimizers) -> list[str]:
    """Returns a message for each violated rule: optimizers have each trained parameter once, and no other tensor."""
    held = optimizers.parameters()
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    problems = []
    strangers = [str(tuple(parameter.shape)) for parameter in held if id(parameter) not in known]
    if strangers:
        problems.append(
            f"the optimizer has {len(strangers)} parameters that the model does not have "
            f"(shapes {told_names(strangers)}): build it from this model's parameters()"
        )
    held_ids = set(map(id, held))
    idle = [name for name, p in trained_parameters(model).items() if id(p) not in held_ids]
    if idle:
        problems.append(
            f"these parameters require gradients, but are in no optimizer: {told_names(idle)}. Pass all optimizers, as "
            "a list, and freeze the parameters that are not to be trained (requires_grad_(False))"
        )
    holders = Counter(key for optimizer in optimizers.given for key in set(map(id, parameters_of(optimizer))))
    twice = sorted(known.get(key, "a parameter") for key, count in holders.items() if count > 1)
    if twice:
        problems.append(f"two optimizers have the same parameters: {told_names(twice)}. Keep each in one only")
    return problems


def _saving_problems(optimizer: Optimizer) -> list[str]:
    """Returns a message, in a list, if additional entries of an optimizer's `state_dict` cannot be saved."""
    kind = type(optimizer).__name__
    try:
        split(more_of(optimizer))
    except TypeError as error:
        return [f"the content of {kind}.state_dict() cannot be saved: {error}"]
    except Exception as error:
        return [f"{kind}.state_dict() fails, so its content cannot be saved: {brief(error)}"]
    return []


def _factoring_problems(optimizers: Optimizers, recipe: Recipe) -> list[str]:
    problems = []
    if recipe.phases[0].weights == "factored" and any(map(_steps_of, optimizers.stateful)):
        problems.append("the optimizer has made steps, but weights are factored at step 0: begin with a new optimizer")
    for optimizer in optimizers.all:
        if isinstance(optimizer, LBFGS):
            problems.append(f"LBFGS keeps one flat copy of all gradients, {_CANNOT_FOLLOW}")
        problems += _copies_outside_state(optimizer, _CANNOT_FOLLOW)
        odd = _state_from_start(optimizer)
        if odd:
            problems.append(
                f"{type(optimizer).__name__} creates {odd!r} in its state only when it is built, so factors have none: "
                f"{_WITHOUT_FACTORS}"
            )
    unknown = _not_projectable(optimizers, recipe, "project")
    if unknown:
        problems.append(
            f"optimizer_state='project' cannot convert the state of {unknown}: use 'auto' or 'reset', or one of "
            f"{', '.join(sorted(known.__name__ for known in PROJECTABLE))}"
        )
    return problems


def _state_from_start(optimizer: Optimizer) -> str:
    """Returns the key of state that only the optimizer's constructor can create; empty if there is none."""
    if is_a(optimizer, PROJECTABLE) or _steps_of(optimizer):
        return ""
    for parameter, state in _states_of(optimizer):
        for key, value in state.items():
            # The optimizer can make copies of weights again.
            is_tensor = isinstance(value, Tensor) and value.shape == parameter.shape
            if not is_tensor or not torch.equal(value.to(parameter), parameter):
                return str(key)
    return ""


def _steps_of(optimizer: Optimizer) -> float:
    """Returns the number of steps that an optimizer has made; 1 if its state has no counter but shows a step."""
    made = 0.0
    for parameter, state in _states_of(optimizer):
        count = state.get("step")
        if isinstance(count, int | float | Tensor):
            made = max(made, float(count))
        elif any(_has_moved(value, parameter) for value in state.values()):
            made = max(made, 1.0)
    return made


def _states_of(optimizer: Optimizer) -> list[tuple[Tensor, dict[str, Any]]]:
    """Returns pairs of a parameter and its state."""
    states = optimizer.state.items()
    return [(held, state) for held, state in states if isinstance(held, Tensor) and isinstance(state, dict)]


def _has_moved(value: Any, parameter: Tensor) -> bool:
    """Returns whether a state tensor shows that a step was made: it is neither zero nor a copy of its weight."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape or not local(value).any():
        return False
    return not torch.equal(local(value).to(local(parameter)), local(parameter))
