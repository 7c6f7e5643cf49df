"""Hooks around optimizer steps: they check ownership and gradients, and precondition the steps of factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from abtrain.engine.gradient_guard import GradientGuard
from abtrain.errors import OnNonFinite, UsageError
from abtrain.lowrank.classify import owner
from abtrain.lowrank.model import FactoredModel
from abtrain.lowrank.optimizers import is_nested
from abtrain.lowrank.precondition import Preconditioner
from abtrain.modes import in_own_modes, own_modes
from abtrain.own import own_names
from abtrain.recipes.phase import Phase


class Coming(NamedTuple):
    """The step that an optimizer is about to make.

    Attributes:
        step: its index.
        phase: that it belongs to.
        shared: whether all workers have its gradients.
        averaged: whether its gradients are averaged over several workers, of a group at least.
    """

    step: int
    phase: Phase
    shared: bool
    averaged: bool


_UNSEEN = 2
"""Training steps in a row whose changes no optimizer has announced, after which another one is at work."""


class Ownership:
    """Makes sure that optimizers train the parameters that workers share, and no others.

    Args:
        model: with its optimizers, and all parameters that were there when training began.
        frozen: names of those that were not trained then.
    """

    def __init__(self, model: FactoredModel, frozen: Sequence[str]) -> None:
        self._model = model
        self._names = model.parameters().keys()
        self._frozen = {name: model.model.get_parameter(name) for name in frozen}
        self._own = own_names(model.model)
        self._checked: list[int] = []
        self._modules = [id(module) for module in model.model.modules()]
        self._known = {id(parameter) for parameter in model.model.parameters()}
        self._dense = self._places()

    def check(self, optimizer: Optimizer) -> None:
        """Checks the parameters of all optimizers before one of them steps.

        Raises:
            UsageError: they hold a parameter that no merge knows, or lack one that workers share; or one of these was
                frozen, thawed or replaced since training began.
        """
        held = [id(p) for one in self._model.optimizers.acting for group in one.param_groups for p in group["params"]]
        thawed = [name for name, p in self._frozen.items() if p.requires_grad and id(p) in held] if self._frozen else []
        if thawed:
            raise UsageError(
                f"{', '.join(thawed)} was frozen when ABTraining was built and is not shared, but is trained now: "
                "build ABTraining with every parameter that is to be trained"
            )
        modules = [id(module) for module in self._model.model.modules()]
        if modules != self._modules:
            self._check_modules()
            self._modules = modules
        if held != self._checked:
            self._check_held(held)
            self._dense = self._places()
            self._checked = held
        self._check_places(optimizer)

    def _check_modules(self) -> None:
        """Checks that every parameter is still in the model, once modules have come or gone."""
        now = {id(parameter) for parameter in self._model.model.parameters()}
        held = {id(parameter) for parameter in self._model.optimizers.parameters()}
        factored = self._model.records
        lost = [one.name for one in self._dense if id(one.parameter) not in now and one.name not in factored]
        lost += [name for name, factor in self._model.factors().items() if id(factor) not in now]
        if lost:
            raise UsageError(_moved(lost))
        added = [
            n for n, p in self._model.model.named_parameters() if p.requires_grad and id(p) not in held | self._known
        ]
        if added:
            raise UsageError(
                f"{', '.join(added[:4])} came to the model after ABTraining was built, and no optimizer holds it: "
                "build the model, the optimizer and then ABTraining with every parameter that is to be trained"
            )

    def _check_held(self, held: Sequence[int]) -> None:
        names = self._names | self._model.factors().keys()
        known = {id(p): name for name, p in self._model.parameters().items() if name in names}
        shapes = [str(tuple(p.shape)) for p in self._model.optimizers.parameters() if id(p) not in known]
        if shapes:
            raise UsageError(
                f"the optimizer holds {len(shapes)} parameters that the model did not have when ABTraining was built "
                f"(shapes {', '.join(shapes[:4])}): no worker would share them. Build the model and the optimizer with "
                "every parameter that is to be trained, and ABTraining after them"
            )
        unshared = self._own | self._frozen.keys()
        lost = [name for key, name in known.items() if name not in unshared and key not in held]
        if lost:
            raise UsageError(
                f"the optimizer no longer holds {', '.join(lost[:4])}, which workers share: leave the param groups as "
                "they were when ABTraining was built, and freeze parameters by a learning rate of 0"
            )

    def _places(self) -> list[_Place]:
        """Returns the places of the parameters that workers train together, factors aside."""
        factors, places = self._model.factors(), []
        for name, parameter in self._model.parameters().items():
            if name not in factors and name not in self._frozen and name not in self._own:
                module, attribute = owner(self._model.model, name)
                # A scripted module hands out its parameters anew at each call.
                if not isinstance(module, torch.jit.ScriptModule):
                    places.append(_Place(name, module._parameters, attribute, parameter))
        return places

    def _check_places(self, optimizer: Optimizer) -> None:
        moved = [one.name for one in self._dense if one.of_module.get(one.attribute) is not one.parameter]
        if moved:
            raise UsageError(_moved(moved))
        steps = self._model.optimizers.steps
        frozen = [
            one.name for one in self._dense if not one.parameter.requires_grad and steps(one.parameter) is optimizer
        ]
        frozen += [name for name, factor in self._model.frozen_factors().items() if steps(factor) is optimizer]
        if frozen:
            raise UsageError(
                f"{', '.join(frozen[:4])} was trained when ABTraining was built, and is frozen now: freeze parameters "
                "before ABTraining is built, or by a learning rate of 0"
            )


def _moved(names: Sequence[str]) -> str:
    return (
        f"{', '.join(names[:4])} is no longer a parameter of the model: pruning, weight norm, parametrizations, new "
        "modules and the like replace it. Apply them before the optimizer and ABTraining are built"
    )


class _Place(NamedTuple):
    """A parameter, and where it belongs."""

    name: str
    of_module: Mapping[str, Any]
    attribute: str
    parameter: nn.Parameter


class StepHooks:
    """Hooks on the optimizers of a model, from here until `close`.

    Args:
        model: with its optimizers; its factors are preconditioned.
        frozen: names of the parameters that were not trained when training began.
        on_nonfinite: what becomes of gradients that are not finite.
        speaks: whether this worker logs what happens on all workers.
        coming: tells of the step that is about to be made; None: of none that a recipe knows.
        whose: tells, after shared gradients that are not finite, which worker brought them.

    Attributes:
        round_began: whether a round begins with the next step. One that a gradient scaler skips calls no hook, so it
            stays due.
        preconditioner: of the round.
        guard: what looks at the gradients.
    """

    def __init__(
        self,
        model: FactoredModel,
        frozen: Sequence[str],
        on_nonfinite: OnNonFinite,
        speaks: bool,
        coming: Callable[[], Coming | None],
        whose: Callable[[], str] = str,
    ) -> None:
        self.round_began = True
        self._optimizers = model.optimizers
        self.preconditioner = Preconditioner(self._optimizers, damping=0)
        own = own_names(model.model)
        self.guard = GradientGuard(self._optimizers.acting, on_nonfinite, speaks, model.parameters, own, whose)
        self._model = model
        self._ownership = Ownership(model, frozen)
        self._coming = coming
        self._stepped: set[int] = set()
        self._before_any: dict[str, Tensor] | None = {}
        self._versions: dict[str, int] = {}
        self._unseen = 0
        self._handles = [
            handle
            for optimizer in self._optimizers.acting
            for handle in (
                optimizer.register_step_pre_hook(self._before),
                optimizer.register_step_post_hook(self._after),
            )
        ]

    @property
    def stepped(self) -> bool:
        """Whether an optimizer has stepped since `next_step`."""
        return bool(self._stepped)

    @property
    def all_stepped(self) -> bool:
        """Whether every optimizer has."""
        return len(self._stepped) == len(self._optimizers.acting)

    def next_step(self) -> None:
        """A training step ends.

        Raises:
            UsageError: weights have changed, and no optimizer was seen to step.
        """
        changed = "" if self._stepped else self._changed_unseen()
        if changed:
            kinds = ", ".join(type(optimizer).__name__ for optimizer in self._optimizers.given)
            raise UsageError(
                f"{changed} has changed, but no step of {kinds} was seen: abtrain listens to optimizer.step(), and to "
                "that of optimizers inside it. Let the optimizers that ABTraining was built with change weights, and "
                "set their first values before"
            )
        if self._stepped:
            self._before_any, self._unseen = None, 0
        self._versions = self._count_changes()
        self._stepped.clear()

    def _changed_unseen(self) -> str:
        """Names a weight that has changed although no optimizer was seen to step; empty if there is none.

        Once a step has been seen, one change alone may be the loop's own, such as clipping beside a step that a
        gradient scaler has left out.
        """
        if self._before_any is not None:
            now = self._sample()
            return next((name for name, held in self._before_any.items() if not torch.equal(held, now[name])), "")
        versions = self._count_changes()
        changed = [name for name, version in versions.items() if version != self._versions.get(name, version)]
        self._unseen = self._unseen + 1 if changed else 0
        return changed[0] if self._unseen >= _UNSEEN else ""

    def _count_changes(self) -> dict[str, int]:
        """Returns how often each parameter was written to, as autograd counts it; merges are not counted."""
        return {name: parameter._version for name, parameter in self._model.parameters().items()}

    def watch(self) -> None:
        """Merges and changes of phase are done: from here on only an optimizer changes weights."""
        if self._before_any is not None:
            self._before_any = self._sample()

    def goes_on(self) -> None:
        """Weights were loaded: that they are others says nothing."""
        self._stepped.clear()
        self._before_any = None

    def close(self) -> None:
        """Takes the hooks off the optimizers."""
        for handle in self._handles:
            handle.remove()

    def _sample(self) -> dict[str, Tensor]:
        """A row of each parameter that is held: a step changes more than that."""
        held = {id(parameter) for parameter in self._optimizers.parameters()}
        rows = {name: p.detach() for name, p in self._model.parameters().items() if id(p) in held and p.numel()}
        return {name: row[(0,) * max(row.ndim - 1, 0)].clone() for name, row in rows.items()}

    @in_own_modes
    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        coming = None if is_nested(optimizer) else self._coming()
        if coming is None:
            return None
        if id(optimizer) in self._stepped:
            raise UsageError(
                f"optimizer.step() was called again before ab.step(), after step {coming.step}: call ab.step() once "
                "after every optimizer.step(), and accumulate gradients under ab.no_sync()"
            )
        if coming.averaged and torch._C._current_graph_task_id() >= 0:
            raise UsageError(
                "optimizer.step() was called inside the backward pass, before its gradients were averaged over "
                "workers: call it after loss.backward()"
            )
        self._ownership.check(optimizer)
        # PyTorch hands over the arguments of optimizer.step, the optimizer itself the first of them.
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if callable(closure):
            self._refuse_closure(coming)
            looked = self._looked(optimizer, closure, coming)
            return ((args[0], looked, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": looked})
        self.guard.look(optimizer, coming.step, coming.shared)
        if coming.phase.damping:
            self._precondition(optimizer, coming.phase)
        return None

    def _refuse_closure(self, coming: Coming) -> None:
        if coming.phase.damping:
            raise UsageError(
                "optimizer.step(closure) makes gradients after they ought to be preconditioned: "
                "call backward before optimizer.step(), or set damping=0"
            )

    def _looked(self, optimizer: Optimizer, closure: Callable[[], Any], coming: Coming) -> Callable[[], Any]:
        """A closure after which its gradients are looked at: there are none before."""

        def look() -> Any:
            loss = closure()
            with own_modes():
                self.guard.look(optimizer, coming.step, coming.shared, in_closure=True)
            return loss

        return look

    def _precondition(self, optimizer: Optimizer, phase: Phase) -> None:
        records = self._model.records
        if self.round_began:
            self.preconditioner = Preconditioner(self._optimizers, phase.damping, phase.factor_lr)
            self.preconditioner.refresh(records.values())
            self.round_began = False
        self.preconditioner.before_step(optimizer, records.values())

    @in_own_modes
    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not is_nested(optimizer):
            self._stepped.add(id(optimizer))
            self.preconditioner.after_step(optimizer)
