"""Steps of Adam on a worker's share of a batch, as long as the whole batch would make them.

Adam divides the mean of its gradients, m, by the root of their mean square, v = s + e: what they have in common, and
their noise. Of n workers each sees an n-th of the batch, so its e is n times that of the whole batch, and where noise
rules its steps are shorter by sqrt(n). They are unlike each other, and merges average them: the run goes slower.

The whole batch's v would be s + e / n = v / n + (1 - 1 / n) s, and s is at most m^2. So the step is multiplied by

    sqrt(v / (v / n + (1 - 1 / n) min(m^2, v))),

of each element its own: 1 where its gradients agree, and up to sqrt(n) where they are noise. m and v are Adam's, less
their bias (Kingma and Ba, arXiv 1412.6980). Nothing is sent for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from abtrain.lowrank.precondition import decoupled_decay


class NoiseCorrection:
    """Surrounds the steps of an optimizer of Adam's family; others keep no `exp_avg_sq`, and are left alone.

    Args:
        optimizer: whose steps they are.
        workers: n, how many train apart.
    """

    def __init__(self, optimizer: Optimizer, workers: int) -> None:
        self._optimizer = optimizer
        self._workers = workers
        self._starts: list[tuple[nn.Parameter, Tensor, dict[str, Any]]] = []

    @torch.no_grad()
    def before_step(self) -> None:
        """Remembers where the parameters would be by weight decay alone."""
        if self._workers == 1:
            return
        self._starts = [
            (p, p.detach() * (1 - decoupled_decay(group)), group)
            for group in self._optimizer.param_groups
            if "betas" in group
            for p in group["params"]
            if p.grad is not None and not p.grad.is_sparse and not p.is_complex()
        ]

    @torch.no_grad()
    def after_step(self) -> None:
        """Replaces the steps made since `before_step`, in place."""
        for p, start, group in self._starts:
            state = self._optimizer.state[p]
            if "exp_avg" in state and "exp_avg_sq" in state:
                p.copy_(start + _multiplier(state, group["betas"], self._workers) * (p - start))
        self._starts = []


def _multiplier(state: dict[str, Any], betas: tuple[float, float], workers: int) -> Tensor:
    """Of each element, in float32 at least."""
    m, v, step = state["exp_avg"], state["exp_avg_sq"], float(state["step"])
    m, v = (moment.to(torch.promote_types(moment.dtype, torch.float32)) for moment in (m, v))
    bias = (1 - betas[1] ** step) / (1 - betas[0] ** step) ** 2
    # An element that never had a gradient has 0 / 0, and makes no step either.
    agreement: Tensor = (bias * m.square() / v).nan_to_num(nan=1.0).clamp(max=1.0)
    return agreement.mul_(1 - 1 / workers).add_(1 / workers).rsqrt_()
