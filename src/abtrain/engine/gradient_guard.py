"""NaN and infinity in gradients, found before an optimizer steps by them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from abtrain.checks import told_names
from abtrain.errors import NonFiniteError, OnNonFinite

log = logging.getLogger("abtrain")


_MOST_IN_A_ROW = 50
"""Steps left out, after which a run has diverged."""


class GradientGuard:
    """Looks at all gradients before each step of optimizers.

    Gradients that workers share are the same on all of them, and so is what becomes of the step, without a word sent.

    Args:
        optimizers: whose gradients they are.
        policy: `skip` leaves the step out; otherwise it is an error where gradients are shared, and left for the next
            merge to find where they are a worker's own.
        speaks: whether this worker logs what happens on all workers.
        parameters: gives all parameters by name.
        own: names of those that are each worker's own, though gradients are shared.
        whose: tells, after shared gradients that are not finite, which worker brought them.

    Attributes:
        skipped: indexes of the steps that were left out.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        policy: OnNonFinite,
        speaks: bool,
        parameters: Callable[[], Mapping[str, nn.Parameter]] = dict,
        own: Collection[str] = (),
        whose: Callable[[], str] = str,
    ) -> None:
        self._optimizers = optimizers
        self._policy = policy
        self._speaks = speaks
        self._parameters, self._own, self._whose = parameters, own, whose
        self.skipped: list[int] = []
        self._looked = -1

    def look(self, optimizer: Optimizer, step: int, shared: bool, in_closure: bool = False) -> None:
        """Drops the gradients of a step that is to be left out: optimizers pass over parameters without.

        Args:
            optimizer: that is about to step. Where steps may be left out, the first of several looks at the gradients
                of all: they come from the same backward pass.
            step: its index.
            shared: whether all workers have these gradients.
            in_closure: whether the optimizer has begun its step, and called for these gradients.

        Raises:
            NonFiniteError: the step cannot be made, or too many in a row were left out.
        """
        # A GradScaler that leaves it to the optimizer to skip has looked already.
        if not (shared or self._policy == "skip") or getattr(optimizer, "found_inf", None) is not None:
            return
        among = self._optimizers if self._policy == "skip" and step != self._looked else [optimizer]
        self._looked = step
        parameters = [p for one in among for group in one.param_groups for p in group["params"] if p.grad is not None]
        if shared and self._own:
            parameters = self._without_own(parameters)
        if _finite([p.grad for p in parameters]):
            return
        if self._policy != "skip":
            unchanged = "the optimizer may have moved weights before" if in_closure else "no weight was changed by them"
            raise NonFiniteError(
                f"NaN or infinity in the gradients that workers share at step {step}{self._where(parameters)}: "
                f"{unchanged}. Lower the learning rate, clip gradients, or leave such steps out: on_nonfinite='skip'"
            )
        self._leave_out(step, shared)
        for parameter in parameters:
            parameter.grad = None

    def _leave_out(self, step: int, shared: bool) -> None:
        if step in self.skipped[-1:]:
            return
        self.skipped.append(step)
        if self.skipped[-_MOST_IN_A_ROW:] == list(range(step - _MOST_IN_A_ROW + 1, step + 1)):
            raise NonFiniteError(
                f"the gradients of the last {_MOST_IN_A_ROW} steps up to {step} were all NaN or infinite: training has "
                "diverged. Lower the learning rate, or go on from an earlier checkpoint"
            )
        if not shared or self._speaks:
            log.warning("step %d: its gradient is not finite, and the step is left out", step)

    def _without_own(self, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """The parameters that workers share. What the policy leaves out of the others concerns this worker alone."""
        held = self._parameters()
        own = {id(held[name]) for name in self._own if name in held}
        alone = [p for p in parameters if id(p) in own]
        if self._policy == "skip" and not _finite([p.grad for p in alone if p.grad is not None]):
            log.warning("this worker's own gradients are not finite, and the step leaves their parameters alone")
            for parameter in alone:
                parameter.grad = None
        return [p for p in parameters if id(p) not in own]

    def _where(self, parameters: Sequence[nn.Parameter]) -> str:
        """The names of the parameters whose gradients are not finite, in brackets, and who brought them."""
        broken = {id(p) for p in parameters if p.grad is not None and not bool(torch.isfinite(p.grad).all())}
        names = told_names([name for name, parameter in self._parameters().items() if id(parameter) in broken])
        return f" ({names}){self._whose()}" if names else self._whose()


def _finite(gradients: list[Tensor]) -> bool:
    # A norm is read at the speed of memory. One that overflows says nothing yet.
    if not gradients or bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients))):
        return True
    return all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
