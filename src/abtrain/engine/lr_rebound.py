"""Scales learning rates by a ramp after weights change shape (paper, Section III)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer


class _Scaled(NamedTuple):
    """A param group with its scheduled learning rate, its scaled learning rate, and the factor between them."""

    group: dict[str, Any]
    scheduled: float | Tensor
    value: float
    factor: float


class LRRebound:
    """Scales the learning rates of optimizers only during their steps.

    `scale` is called when `optimizer.step` begins, and `put_back` when it ends. Schedulers therefore read and write
    unscaled rates. In step j = 0, 1, ... after `start(N)`, the factor is (j + 1) / (N + 1). From j = N on, it is 1.
    """

    def __init__(self) -> None:
        self._length = 0
        self._done = 0
        self._scaled: dict[int, list[_Scaled]] = {}

    @property
    def factor(self) -> float:
        """The factor of the learning rates in the next optimizer step."""
        return min(1.0, (self._done + 1) / (self._length + 1))

    def start(self, steps: int) -> None:
        """Begins a ramp of `steps` steps; 0 ends any ramp."""
        self._length, self._done = steps, 0

    def advance(self) -> None:
        """Restores the scheduled rates, and advances the ramp by a step, even if a gradient scaler skipped the step."""
        self.put_back()
        self._done = min(self._done + 1, self._length)

    def state_dict(self) -> dict[str, int]:
        """Returns the number of steps in the ramp (`length`) and of those that are done (`done`)."""
        return {"length": self._length, "done": self._done}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues the ramp from a `state_dict`."""
        self.put_back()
        self._length, self._done = int(state["length"]), int(state["done"])

    def scale(self, optimizer: Optimizer) -> None:
        """Scales the learning rates of an optimizer that is about to step."""
        # If the last step raised an error, its learning rates are still scaled.
        self.put_back(optimizer)
        factor = self.factor
        if factor == 1.0:
            return
        scaled_already = {id(one.group) for entries in self._scaled.values() for one in entries}
        entries = self._scaled.setdefault(id(optimizer), [])
        for group in optimizer.param_groups:
            # A wrapper of this optimizer may share its groups.
            if id(group) not in scaled_already:
                # The product is a new object, since the rate may be a tensor that a scheduler refers to.
                scheduled, group["lr"] = group["lr"], group["lr"] * factor
                entries.append(_Scaled(group, scheduled, float(group["lr"]), factor))

    def put_back(self, optimizer: Optimizer | None = None) -> None:
        """Restores the scheduled learning rates of an optimizer; None means all optimizers."""
        for key in list(self._scaled) if optimizer is None else [id(optimizer)]:
            for one in self._scaled.pop(key, ()):
                _restore(one)


def rewound(state: Mapping[str, int], back: int, in_phase: int) -> dict[str, int]:
    """Returns the `LRRebound.state_dict` of `back` steps earlier, when `in_phase` steps of the phase were done."""
    # The ramp may have begun in an earlier phase, or may have ended in the meantime.
    return {"length": state["length"], "done": max(state["done"] - back, min(state["length"], in_phase))}


def _restore(one: _Scaled) -> None:
    """Restores the scheduled learning rate, with any change that was made to the rate during the step.

    A scheduler inside the step, or an optimizer that decays its rate, may have multiplied the scaled rate by a number.
    The function then multiplies the scheduled rate by the same number. A rate that was newly set stays.
    """
    now, scheduled = float(one.group["lr"]), float(one.scheduled)
    if now != one.value:
        # Relative to size, the rate is nearer to the scheduled rate than to the scaled one: it was set, not multiplied.
        if scheduled * abs(now - one.value) > one.value * abs(now - scheduled):
            return
        if isinstance(one.scheduled, Tensor):
            one.scheduled.fill_(now / one.factor)
        else:
            one.group["lr"] = now / one.factor
            return
    one.group["lr"] = one.scheduled
