"""Optimizers as other people write them, each as small as it goes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Muon, Optimizer


def muon_and_adamw(model: nn.Module, kind: type[Muon] = Muon) -> list[Optimizer]:
    """Muon for the matrices of the small MLP, AdamW for the rest."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    return [kind(matrices, lr=1e-2), AdamW([p for p in model.parameters() if p.ndim != 2], lr=1e-2)]


class ByHand(SGD):
    """SGD whose state is what `begin` makes, and whose step adds `use` of it to the gradient."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float = 0.05) -> None:
        super().__init__(parameters, lr)

    def begin(self, parameter: nn.Parameter) -> dict[str, Any]:
        raise NotImplementedError

    def use(self, state: dict[str, Any], gradient: Tensor) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    if not state:
                        state |= self.begin(parameter)
                    parameter.sub_(group["lr"] * self.use(state, parameter.grad))


class Lists(ByHand):
    """Momentum in a list in a dict, with a count and a word beside it."""

    def begin(self, parameter: nn.Parameter) -> dict[str, Any]:
        return {"buffers": {"momentum": [torch.zeros_like(parameter)], "count": 0}, "word": "heavy"}

    def use(self, state: dict[str, Any], gradient: Tensor) -> Tensor:
        buffers = state["buffers"]
        buffers["count"] += 1
        momentum: Tensor = buffers["momentum"][0].mul_(0.9).add_(gradient)
        return momentum


class Codes(ByHand):
    """Momentum in codes of 8 bits, with their scale."""

    def begin(self, parameter: nn.Parameter) -> dict[str, Any]:
        return {"codes": torch.zeros_like(parameter, dtype=torch.int8), "scale": torch.zeros(())}

    def use(self, state: dict[str, Any], gradient: Tensor) -> Tensor:
        momentum = 0.9 * state["codes"].to(gradient.dtype) * state["scale"].to(gradient.dtype) + gradient
        state["scale"].fill_(float(momentum.abs().max()) / 127 + 1e-12)
        state["codes"].copy_((momentum / state["scale"]).round())
        return momentum


class RowsAndColumns(ByHand):
    """A mean of squares by rows, as Adafactor keeps it, in float32 whatever the parameter is."""

    def begin(self, parameter: nn.Parameter) -> dict[str, Any]:
        return {"rows": torch.zeros(len(parameter)), "step": 0}

    def use(self, state: dict[str, Any], gradient: Tensor) -> Tensor:
        state["step"] += 1
        squares = gradient.float().square().reshape(len(gradient), -1).mean(1)
        state["rows"].lerp_(squares, 0.1)
        roots = state["rows"].sqrt().add(1e-3).to(gradient.dtype)
        return 0.1 * gradient / roots.reshape(-1, *(1,) * (gradient.ndim - 1))


class Objects(ByHand):
    """State that is an object of a class of its own."""

    def begin(self, parameter: nn.Parameter) -> dict[str, Any]:
        return {"graft": nn.Identity()}

    def use(self, state: dict[str, Any], gradient: Tensor) -> Tensor:
        return gradient


class Masters(ByHand):
    """Steps float32 copies, and writes them to parameters of bf16."""

    def begin(self, parameter: nn.Parameter) -> dict[str, Any]:
        return {"master": parameter.detach().float().clone()}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if not state:
                state |= self.begin(parameter)
            state["master"].sub_(self.param_groups[0]["lr"] * parameter.grad.float())
            parameter.copy_(state["master"])


class EarlyMasters(Masters):
    """Makes its copies when it is built, and never again."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float = 0.05) -> None:
        super().__init__(parameters, lr)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] |= super().begin(parameter)

    def begin(self, parameter: nn.Parameter) -> dict[str, Any]:
        raise KeyError("master")


class Lookahead(Optimizer):
    """Around another optimizer, whose weights go halfway back to slow ones every few steps; no `Optimizer.__init__`.

    Args:
        early: whether the slow weights are made when it is built, or when they are first needed.
    """

    def __init__(self, optimizer: Optimizer, every: int = 3, early: bool = False) -> None:
        self.optimizer, self.every = optimizer, every
        self.param_groups, self.defaults = optimizer.param_groups, optimizer.defaults
        self.state = {}  # type: ignore[assignment]
        self.count = 0
        if early:
            for parameter in self._parameters():
                self.state[parameter] = {"slow": parameter.detach().clone()}

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self._parameters():
            self.state.setdefault(parameter, {}).setdefault("slow", parameter.detach().clone())
        self.optimizer.step(closure)
        self.count += 1
        if self.count % self.every == 0:
            for parameter in self._parameters():
                slow = self.state[parameter]["slow"]
                parameter.copy_(slow.lerp_(parameter, 0.5))

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "inner": self.optimizer.state_dict()}

    def load_state_dict(self, state_dict: Any) -> None:
        self.count = state_dict["count"]
        self.optimizer.load_state_dict(state_dict["inner"])


class SlowInAttribute(SGD):
    """Keeps slow weights where nobody looks."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float = 0.05) -> None:
        super().__init__(parameters, lr)
        self.slow = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]


class Sam(Optimizer):
    """Sharpness-aware minimization: two passes a step, the second of which moves the weights."""

    def __init__(self, parameters: Iterable[nn.Parameter], base: Callable[..., Optimizer], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})
        self.base = base(self.param_groups, lr=lr)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            self.state[parameter]["old"] = parameter.detach().clone()
            parameter.add_(parameter.grad, alpha=0.01)
            parameter.grad = None

    @torch.no_grad()
    def second_step(self) -> None:
        for parameter in (p for group in self.param_groups for p in group["params"] if "old" in self.state[p]):
            parameter.copy_(self.state[parameter]["old"])
        self.base.step()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


class RebindingSam(Sam):
    """Puts weights back by giving the parameter the memory of its copy, as many implementations do."""

    def second_step(self) -> None:
        for parameter in (p for group in self.param_groups for p in group["params"] if "old" in self.state[p]):
            parameter.data = self.state[parameter]["old"]
        self.base.step()


class Accumulating(Optimizer):
    """Makes every second step, as wrappers do that decide whether gradients are complete; no `Optimizer.__init__`."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.calls = optimizer, 0

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        return self.optimizer.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.calls += 1
        if self.calls % 2 == 0:
            self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self.calls % 2 == 0:
            self.optimizer.zero_grad(set_to_none)


class CallsParent(AdamW):
    """Its `step` is that of its parent, and both announce themselves."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Renamed(AdamW):
    """Nothing but another name."""


class Silent(SGD):
    """Changes weights past `step`."""

    @torch.no_grad()
    def update(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_(0.1 * parameter.grad)


class ScheduleFree(ByHand):
    """Evaluates and trains at different weights, and records which are in use."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float = 0.05) -> None:
        super().__init__(parameters, lr)
        self.param_groups[0] |= {"train_mode": True, "k": 0}

    def begin(self, parameter: nn.Parameter) -> dict[str, Any]:
        return {"z": parameter.detach().clone()}

    @torch.no_grad()
    def _move(self, train: bool) -> None:
        if self.param_groups[0]["train_mode"] != train:
            for parameter in self.param_groups[0]["params"]:
                if self.state[parameter]:
                    parameter.lerp_(self.state[parameter]["z"], 0.1 if train else 1 - 1 / 0.9)
        self.param_groups[0]["train_mode"] = train

    def train(self) -> None:
        self._move(True)

    def eval(self) -> None:
        self._move(False)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        group = self.param_groups[0]
        share = 1 / (group["k"] + 1)
        for parameter in (p for p in group["params"] if p.grad is not None):
            state = self.state[parameter]
            if not state:
                state |= self.begin(parameter)
            parameter.lerp_(state["z"], share).sub_(parameter.grad, alpha=group["lr"] * (1 - 0.9 * (1 - share)))
            state["z"].sub_(parameter.grad, alpha=group["lr"])
        group["k"] += 1
