"""Finds NaN and infinity in gradients before an optimizer uses them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from abtrain.checks import told_names
from abtrain.consistency.agreement import largest
from abtrain.engine.progress import Progress
from abtrain.errors import NonFiniteError, OnNonFinite
from abtrain.lowrank.model import FactoredModel
from abtrain.own import own_names
from abtrain.shards import local

log = logging.getLogger("abtrain")

_MOST_IN_A_ROW = 50
"""The number of consecutive skipped steps after which a run counts as diverged."""


class GradientGuard:
    """Checks gradients for NaN and infinity before each optimizer step.

    Workers that share gradients have the same gradients, so they skip the same steps without communication. Only the
    workers of a group that share a sharded model tell each other.

    Args:
        policy: the reaction to gradients that are not finite. `skip` skips the step. Under other policies, an
            error is raised if all workers share the gradients. Otherwise the next merge finds NaN and infinity.

    Attributes:
        skipped: the indexes of the skipped steps.
        whose: a function that returns the end of an error message: the worker that produced NaN or infinity.
    """

    def __init__(self, model: FactoredModel, policy: OnNonFinite, progress: Progress) -> None:
        self._model, self._policy, self._progress = model, policy, progress
        self._own = own_names(model.model)
        self.whose: Callable[[], str] = str
        self.skipped: list[int] = []
        self._looked = -1

    def look(self, optimizer: Optimizer, in_closure: bool = False) -> None:
        """Checks gradients. Skips a step by removing its gradients: optimizers ignore parameters without a gradient.

        Args:
            optimizer: the optimizer that is about to step. Under `skip`, the gradients of all optimizers are checked
                before the first of them steps, since one backward pass computes all gradients.
            in_closure: whether the closure of an optimizer step computed these gradients.

        Raises:
            NonFiniteError: gradients that all workers share are not finite, without `skip`; or 50 steps were skipped.
        """
        step, shared = self._progress.steps_done, self._progress.shares_gradients
        skips = self._policy == "skip"
        # If `found_inf` is set, a GradScaler has checked the gradients, and the optimizer itself skips the step.
        if not (shared or skips) or getattr(optimizer, "found_inf", None) is not None:
            return
        checked = self._model.optimizers.acting if skips and step != self._looked else [optimizer]
        self._looked = step
        parameters = [p for one in checked for group in one.param_groups for p in group["params"] if p.grad is not None]
        if self._progress.averages_gradients and self._own:
            parameters = self._without_own(parameters)
        if not self.anywhere(not _finite(parameters)):
            return
        if not skips:
            unchanged = "the optimizer may have changed weights before" if in_closure else "they have changed no weight"
            raise NonFiniteError(
                f"NaN or infinity in the gradients that workers share at step {step}{self._where(parameters)}: "
                f"{unchanged}. Lower the learning rate, clip gradients, or skip such steps: on_nonfinite='skip'"
            )
        self._skip(step, shared)
        for parameter in parameters:
            parameter.grad = None

    def anywhere(self, flag: bool) -> bool:
        """Returns whether a flag is true on any worker of the group, since each has other shards of a sharded model."""
        if not self._model.sharded:
            return flag
        return bool(largest(self._progress.comm, [float(flag)], scope="group")[0])

    def _skip(self, step: int, shared: bool) -> None:
        if step in self.skipped[-1:]:
            return
        self.skipped.append(step)
        if self.skipped[-_MOST_IN_A_ROW:] == list(range(step - _MOST_IN_A_ROW + 1, step + 1)):
            raise NonFiniteError(
                f"the gradients of each of the last {_MOST_IN_A_ROW} steps, up to step {step}, had NaN or infinity: "
                "training has diverged. Lower the learning rate, or continue from an earlier checkpoint"
            )
        if len(self.skipped) == 1 and (not shared or self._progress.comm.rank == 0):
            remedy = "If this repeats (see ab.skipped_steps), lower the learning rate or clip gradients"
            log.warning("step %d is skipped: its gradients are not finite. %s", step, remedy)

    def _without_own(self, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """Returns the parameters that workers share. Under `skip`, removes other gradients if not all are finite."""
        own = {id(parameter) for name, parameter in self._model.parameters().items() if name in self._own}
        alone = [p for p in parameters if id(p) in own]
        if self._policy == "skip" and not _finite(alone):
            log.warning("parameters that only this worker has keep their values in this step: gradients are not finite")
            for parameter in alone:
                parameter.grad = None
        return [p for p in parameters if id(p) not in own]

    def _where(self, parameters: Sequence[nn.Parameter]) -> str:
        """Returns, for a message, the parameters whose gradients are not finite, and the worker that caused this."""
        broken = {id(p) for p in parameters if not _finite([p])}
        names = told_names([name for name, parameter in self._model.parameters().items() if id(parameter) in broken])
        return f" ({names}){self.whose()}" if names else self.whose()


def _finite(parameters: Sequence[nn.Parameter]) -> bool:
    """Returns whether all gradients are finite."""
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    # The norm needs one pass over memory. It may overflow although all elements are finite.
    if not gradients or bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients))):
        return True
    return all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
