"""What surrounds the optimizer's steps: a look at the gradients, and factors' steps in coordinates of the weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch.optim import Optimizer

from abtrain.errors import UsageError
from abtrain.lowrank.model import FactoredModel
from abtrain.lowrank.precondition import Preconditioner
from abtrain.nonfinite import GradientGuard, OnNonFinite
from abtrain.phase import Phase


class Coming(NamedTuple):
    """The step that an optimizer is about to make.

    Attributes:
        step: its index.
        phase: that it belongs to.
        shared: whether all workers have its gradients.
    """

    step: int
    phase: Phase
    shared: bool


class StepHooks:
    """Hooks on an optimizer, from here until `close`.

    Args:
        optimizer: over the model's parameters.
        model: whose factors are preconditioned.
        on_nonfinite: what becomes of gradients that are not finite.
        coming: tells of the step that is about to be made; None: of none that a recipe knows.

    Attributes:
        count: steps that the optimizer has made since this was last set to 0.
        round_began: whether a round begins with the next step. One that a gradient scaler skips calls no hook, so it
            stays due.
        preconditioner: of the round.
        guard: what looks at the gradients.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: FactoredModel,
        on_nonfinite: OnNonFinite,
        coming: Callable[[], Coming | None],
    ) -> None:
        self.count = 0
        self.round_began = True
        self.preconditioner = Preconditioner(optimizer, damping=0)
        self.guard = GradientGuard(optimizer, on_nonfinite)
        self._model = model
        self._coming = coming
        self._handles = (
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        )

    def close(self) -> None:
        """Takes the hooks off the optimizer."""
        for handle in self._handles:
            handle.remove()

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        coming = self._coming()
        if coming is None:
            return
        self.guard.look(coming.step, coming.shared)
        if not coming.phase.damping:
            return
        # PyTorch hands over the arguments of optimizer.step, the optimizer itself the first of them.
        if (args[1] if len(args) > 1 else kwargs.get("closure")) is not None:
            raise UsageError(
                "optimizer.step(closure) makes gradients after they ought to be preconditioned: "
                "call backward before optimizer.step(), or set damping=0"
            )
        records = self._model.records
        if self.round_began:
            self.preconditioner = Preconditioner(optimizer, coming.phase.damping, coming.phase.factor_lr)
            self.preconditioner.refresh(records.values())
            self.round_began = False
        self.preconditioner.before_step(records.values())

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.count += 1
        self.preconditioner.after_step()
