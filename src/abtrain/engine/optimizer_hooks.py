"""Runs before and after optimizer steps: scales learning rates, checks parameters and gradients, preconditions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from abtrain.engine.gradient_guard import GradientGuard
from abtrain.engine.lr_rebound import LRRebound
from abtrain.engine.lr_rebound import rewound as rewound_rebound
from abtrain.engine.ownership import Ownership
from abtrain.engine.progress import Progress
from abtrain.errors import OnNonFinite, UsageError
from abtrain.failpoints import fail_at
from abtrain.lowrank.model import FactoredModel
from abtrain.lowrank.optimizers import is_nested
from abtrain.lowrank.precondition import Preconditioner
from abtrain.merging.changes import is_finite
from abtrain.modes import in_own_modes, own_modes
from abtrain.recipes.phase import Phase
from abtrain.shards import local

_IDLE = 10
"""The number of consecutive calls of `ab.step()` without an optimizer step before a warning."""
_UNSEEN = 2
"""The number of consecutive training steps that may change weights without a known optimizer, before an error."""
_WATCHED = 250
"""The largest number of parameters whose changes without a known optimizer are counted."""


class OptimizerHooks:
    """Registers hooks with the optimizers, and removes them in `close`.

    Before an optimizer step, the hooks scale the learning rates, check which parameters the optimizers have, check the
    gradients, and precondition the gradients of factors, in this order. After the step, they first restore the
    scheduled rates, since other hooks may call schedulers. Then they precondition the changes of the factors.

    Args:
        frozen: the names of parameters that are not trained.

    Attributes:
        round_began: whether the next step begins a round, which ends with a merge. The value stays true if a gradient
            scaler skips that step, since a skipped step calls no hook.
        rebound: the `LRRebound` that scales the learning rates.
        guard: the `GradientGuard` that checks the gradients.
        preconditioner: the `Preconditioner` of the factors in the current round.
    """

    def __init__(
        self, model: FactoredModel, frozen: Sequence[str], progress: Progress, on_nonfinite: OnNonFinite
    ) -> None:
        self.round_began = True
        self._model, self._progress = model, progress
        acting = self._acting = model.optimizers.acting
        self.rebound = LRRebound()
        self.guard = GradientGuard(model, on_nonfinite, progress)
        self.preconditioner = Preconditioner(model.optimizers, damping=0)
        self._ownership = Ownership(model, frozen)
        self._stepped: set[int] = set()
        self._before_any: dict[str, Tensor] | None = {}
        self._versions: dict[str, int] = {}
        self._watched = (-1, list[str]())
        self._unseen = self._idle = 0
        self._handles: list[Any] = []
        for one in acting:
            first = one.register_step_post_hook(self._put_rates_back)
            # This hook runs first. A scheduler that another hook calls then reads the scheduled rate.
            one._optimizer_step_post_hooks.move_to_end(first.id, last=False)  # type: ignore[attr-defined]
            self._handles += [first, one.register_step_pre_hook(self._before), one.register_step_post_hook(self._after)]
            self._handles.append(one.register_state_dict_pre_hook(self._before_saving))

    @property
    def stepped(self) -> bool:
        """Whether an optimizer has stepped since the last `end_step`."""
        return bool(self._stepped)

    @property
    def all_stepped(self) -> bool:
        """Whether every optimizer has stepped since the last `end_step`."""
        return len(self._stepped) == len(self._acting)

    def end_step(self) -> None:
        """Ends a training step, which a gradient scaler may have skipped.

        Raises:
            UsageError: a weight has changed, but the hooks have seen no optimizer step.
        """
        changed = "" if self._stepped else self._changed_unseen()
        if changed:
            kinds = ", ".join(type(optimizer).__name__ for optimizer in self._model.optimizers.given)
            raise UsageError(
                f"weight {changed} changed, but abtrain saw no call to step() of {kinds}. Build optimizers before "
                "ABTraining, change weights only through optimizers that were passed to it or that these wrap, and "
                "initialize weights before building it"
            )
        if self._stepped:
            self._before_any, self._unseen, self._idle = None, 0, 0
        elif not self._unseen:
            self._check_idle_step()
        self._versions = self._count_changes()
        self._stepped.clear()
        self.rebound.advance()

    def _check_idle_step(self) -> None:
        """Refuses an `ab.step()` before its optimizer step. A gradient scaler skips only NaN and infinity."""
        gradients = [local(p.grad) for p in self._model.optimizers.parameters() if p.grad is not None]
        finite = not self.guard.anywhere(not all(map(is_finite, gradients)))
        if finite and self.guard.anywhere(any(bool(gradient.any()) for gradient in gradients)):
            raise UsageError(
                "ab.step() was called without optimizer.step() while gradients are left: call it once after every "
                "optimizer.step(), not at each micro batch. To skip a step, call optimizer.zero_grad() before ab.step()"
            )
        self._idle += 1
        if self._idle == min(_IDLE, self._progress.recipe.total_steps):
            self._progress.warn_once(
                "idle",
                f"no optimizer has stepped in the last {self._idle} calls of ab.step(): call it once after every "
                "optimizer.step(). A GradScaler that skips so many steps has met NaN or infinity each time",
            )

    def _changed_unseen(self) -> str:
        """Returns the name of a weight that changed although no optimizer step was seen; empty if there is none.

        After an optimizer's first step, one such change is allowed, but not two in consecutive steps. The loop may have
        made it, for example by weight clipping in a step that a gradient scaler skips.
        """
        if self._before_any is not None:
            now = self._sample()
            return next((name for name, held in self._before_any.items() if not torch.equal(held, now[name])), "")
        versions = self._count_changes()
        changed = [name for name, version in versions.items() if version != self._versions.get(name, version)]
        self._unseen = self._unseen + 1 if changed else 0
        return changed[0] if self._unseen >= _UNSEEN else ""

    def _count_changes(self) -> dict[str, int]:
        """Returns autograd's number of writes to each parameter, by name. The number does not include merges.

        Of many parameters, it is that of some: an optimizer changes more than a few.
        """
        parameters = self._model.parameters()
        if self._watched[0] != self._model.version:
            stride = -(-len(parameters) // _WATCHED) or 1
            # Names only, since references to parameters would keep their memory when weights are factored.
            self._watched = self._model.version, list(islice(parameters, 0, None, stride))
        return {name: parameters[name]._version for name in self._watched[1]}

    def watch(self) -> None:
        """Stores samples of the weights after merges and phase changes, to detect changes without an optimizer."""
        if self._before_any is not None:
            self._before_any = self._sample()

    def close(self) -> None:
        """Removes the hooks from the optimizers."""
        self.rebound.put_back()
        for handle in self._handles:
            handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the hooks, as tensors and JSON values."""
        return {
            "round_began": self.round_began,
            "skipped_steps": list(self.guard.skipped),
            "rebound": self.rebound.state_dict(),
            "preconditioner": self.preconditioner.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restores a saved `state_dict`, with its tensors on `device`."""
        self.round_began, self.guard.skipped = state["round_began"], list(state["skipped_steps"])
        self.rebound.load_state_dict(state["rebound"])
        self.preconditioner.load_state_dict(state["preconditioner"], device)
        self._stepped.clear()
        # Loading changes weights without a step.
        self._before_any = None

    def _sample(self) -> dict[str, Tensor]:
        """Returns a copy of one row of each optimized parameter, by name. One row is enough to detect a step."""
        held = {id(parameter) for parameter in self._model.optimizers.parameters()}
        parts = {name: local(p) for name, p in self._model.parameters().items() if id(p) in held}
        return {name: part[(0,) * max(part.ndim - 1, 0)].clone() for name, part in parts.items() if part.numel()}

    @in_own_modes
    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if is_nested(optimizer):
            return None
        self._model.reshard()
        self.rebound.scale(optimizer)
        position = self._progress.position
        if position is None:
            return None
        self._check_order(optimizer)
        self._ownership.check(optimizer)
        # `args` and `kwargs` are those of optimizer.step; the first argument is the optimizer.
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if callable(closure):
            if position.phase.damping:
                raise UsageError(
                    "optimizer.step(closure) computes gradients too late for preconditioning: "
                    "call backward before optimizer.step(), or set damping=0"
                )
            checked = self._checked(optimizer, closure)
            return ((args[0], checked, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": checked})
        self.guard.look(optimizer)
        if position.phase.damping:
            self._precondition(optimizer, position.phase)
        return None

    def _check_order(self, optimizer: Optimizer) -> None:
        """Raises UsageError if an optimizer steps in `ab.merged()`, in a backward pass, or twice before `ab.step()`."""
        progress = self._progress
        progress.refuse_in_view("optimizer.step()")
        if progress.shares_gradients:
            fail_at(progress.comm.rank, progress.steps_done, "sync.end")
        if id(optimizer) in self._stepped:
            raise UsageError(
                f"optimizer.step() was called again before ab.step(), after step {progress.steps_done}: call ab(x) in "
                "place of model(x), ab.step() once after every optimizer.step(), and accumulate under ab.no_sync()"
            )
        if progress.averages_gradients and torch._C._current_graph_task_id() >= 0:
            raise UsageError(
                "optimizer.step() was called inside the backward pass, before its gradients were averaged over "
                "workers: call it after loss.backward()"
            )

    def _before_saving(self, optimizer: Optimizer) -> None:
        """Logs a warning, once, that the state of factors is saved, which no new optimizer can load."""
        # abtrain itself calls a `state_dict` that a class has overridden.
        plain = all(type(one).state_dict is Optimizer.state_dict for one in self._model.optimizers.all)
        if plain and self._model.records:
            self._progress.warn_once(
                "optimizer state",
                "optimizer.state_dict() holds the state of factors now, and only an optimizer of the same factors can "
                "load it. Save ab.state_dict(), which holds model and optimizers, and load it by ab.load_state_dict()",
            )

    def _checked(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Returns a closure that calls `closure`, checks the gradients, and returns the loss."""

        def look() -> Any:
            loss = closure()
            with own_modes():
                self.guard.look(optimizer, in_closure=True)
            return loss

        return look

    def _precondition(self, optimizer: Optimizer, phase: Phase) -> None:
        records = self._model.records
        if self.round_began:
            self.preconditioner = Preconditioner(self._model.optimizers, phase.damping, phase.factor_lr)
            self.preconditioner.refresh(records.values())
            self.round_began = False
        self.preconditioner.before_step(optimizer, records.values())

    @in_own_modes
    def _put_rates_back(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not is_nested(optimizer):
            self.rebound.put_back(optimizer)

    @in_own_modes
    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not is_nested(optimizer):
            self._stepped.add(id(optimizer))
            self.preconditioner.after_step(optimizer)


def rewound(state: Mapping[str, Any], step: int, back: int, in_phase: int) -> dict[str, Any]:
    """Returns the entries of `OptimizerHooks` in an `ABTraining.state_dict`, as they were when a round began.

    Args:
        state: the result of `ABTraining.state_dict`.
        step: the number of training steps done when that round began.
        back: the number of training steps between the start of that round and the state.
        in_phase: the number of steps of the phase done when that round began.
    """
    return {
        "round_began": True,
        "skipped_steps": [skipped for skipped in state["skipped_steps"] if skipped < step],
        "rebound": rewound_rebound(state["rebound"], back, in_phase),
    }
