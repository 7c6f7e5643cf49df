"""Hooks around optimizer steps: they check ownership and gradients, and precondition the steps of factors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from abtrain.engine.gradient_guard import GradientGuard
from abtrain.engine.ownership import Ownership
from abtrain.errors import OnNonFinite, UsageError
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
