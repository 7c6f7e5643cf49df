"""Trains the matrices inside a model with Muon, and its other parameters with AdamW.

Muon replaces the running mean of a matrix's gradients by the nearest matrix with orthonormal rows or columns, so that
a step changes all directions alike (Jordan et al., 2024, Muon: an optimizer for hidden layers in neural networks).
The parameters at both ends of a model are rows for single tokens, pixels or classes, for which this does not hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.optim import AdamW, Optimizer

from abtrain.optim.orthogonal import orthogonalized, working_dtype
from abtrain.shards import divided_like, undivided

_NOT_MATRICES = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase, nn.RNNBase)
"""Modules whose parameters Muon does not train. A recurrent layer keeps the matrices of its gates in one tensor."""

_SCALES: Mapping[str, Callable[[int, int], float]] = {
    "original": lambda m, n: math.sqrt(max(1.0, m / n)),
    "match_rms_adamw": lambda m, n: 0.2 * math.sqrt(max(m, n)),
    "spectral_unclamped": lambda m, n: math.sqrt(m / n),
}
"""The number by which the learning rate of a matrix (m, n) is multiplied, by PyTorch's name for it."""
_AT_ONCE = 2**22
"""The largest number of numbers in matrices that are orthogonalized together, since small ones are slow one by one."""


class Sharing(NamedTuple):
    """Divides the work of a step among workers whose gradients are equal.

    Attributes:
        workers: the number of these workers.
        place: the place of this worker among them, from 0.
        pass_on: overwrites a contiguous tensor on all of them by that of the worker at a place. Collective.
    """

    workers: int = 1
    place: int = 0
    pass_on: Callable[[Tensor, int], None] = lambda tensor, place: None


class Muon(torch.optim.Muon):
    """PyTorch's Muon, for weights of two or more dimensions, and faster.

    A weight of more than two dimensions is trained as the matrix (first dimension, product of the others). Matrices of
    one shape are orthogonalized together, on CPUs in float32. Those that FSDP2 has sharded are gathered for it. All
    arguments are those of `torch.optim.Muon`.

    Attributes:
        sharing: how workers divide the work of a step. ABTraining sets it for the workers of a group.

    Raises:
        ValueError: there are no parameters, or one has fewer than two dimensions.
    """

    sharing = Sharing()

    def __init__(self, params: Any, lr: float = 1e-3, **settings: Any) -> None:
        # PyTorch's constructor refuses more than two dimensions, but `add_param_group` does not.
        given = list(params)
        groups = given if given and isinstance(given[0], dict) else [{"params": given}]
        super().__init__([{"params": []}] if given else [], lr=lr, **settings)
        self.param_groups.clear()
        for group in groups:
            self.add_param_group(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group, as in all optimizers of PyTorch."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.ndim < 2:
                raise ValueError(
                    f"a parameter of shape {tuple(parameter.shape)} is not a matrix: train it with another optimizer, "
                    "such as AdamW"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes a training step, as in all optimizers of PyTorch."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for wave in self._waves():
            updates = [self._orthogonal(*work, mine=at == self.sharing.place) for at, work in enumerate(wave)]
            for at, (work, update) in enumerate(zip(wave, updates, strict=True)):
                self.sharing.pass_on(update, at)
                _apply(*work, update)
        return loss

    def _waves(self) -> Iterator[list[_Work]]:
        """Yields what is trained together: a batch of matrices for each worker, of about the same work."""
        work = [_Work(batch, group) for group in self.param_groups for batch in _batches(group["params"])]
        work.sort(key=_Work.products, reverse=True)
        workers = self.sharing.workers
        yield from (work[start : start + workers] for start in range(0, len(work), workers))

    def _orthogonal(self, parameters: Sequence[Tensor], group: Mapping[str, Any], *, mine: bool) -> Tensor:
        """Returns the orthogonalized updates (N, m, n) of matrices of one shape, or memory for another worker's."""
        updates = [undivided(self._update(parameter, group)).flatten(1) for parameter in parameters]
        if mine:
            stacked = torch.stack(updates)
            return orthogonalized(stacked, group["ns_coefficients"], group["ns_steps"], group["eps"]).contiguous()
        first = updates[0]
        return first.new_empty(len(updates), *first.shape, dtype=working_dtype(first.device))

    def _update(self, parameter: Tensor, group: Mapping[str, Any]) -> Tensor:
        """Adds a gradient to the running mean, and returns what is to be orthogonalized."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        mean = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(mean, group["momentum"]) if group["nesterov"] else mean


class _Work(NamedTuple):
    """Matrices of one shape that are trained together, and their param group."""

    parameters: Sequence[Tensor]
    group: Mapping[str, Any]

    def products(self) -> int:
        """Returns how many numbers are multiplied in one product of a matrix with its transpose, for all matrices."""
        shape = self.parameters[0].shape
        return len(self.parameters) * shape.numel() * min(shape[0], shape[1:].numel())


def _apply(parameters: Sequence[Tensor], group: Mapping[str, Any], updates: Tensor) -> None:
    """Changes matrices by their orthogonalized updates (N, m, n), and by weight decay."""
    lr = float(group["lr"])
    scaled = lr * _SCALES[group["adjust_lr_fn"] or "original"](*updates.shape[1:])
    for parameter, update in zip(parameters, updates, strict=True):
        parameter.mul_(1 - lr * group["weight_decay"])
        parameter.add_(divided_like(parameter, update.reshape(parameter.shape)), alpha=-scaled)


def _batches(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yields the parameters that have a gradient, in lists of one matrix shape and of few numbers in all."""
    alike = dict[Any, list[Tensor]]()
    for parameter in parameters:
        if parameter.grad is not None:
            key = (parameter.shape[0], parameter.shape[1:].numel(), parameter.dtype, parameter.device)
            batch = alike.setdefault(key, [])
            if batch and (len(batch) + 1) * parameter.numel() > _AT_ONCE:
                yield alike.pop(key)
                batch = alike.setdefault(key, [])
            batch.append(parameter)
    yield from alike.values()


def muon_and_adamw(
    model: nn.Module, lr: float, *, weight_decay: float = 0.05, momentum: float = 0.95
) -> list[Optimizer]:
    """Returns two optimizers for a model: Muon for its hidden matrices, and AdamW for its other parameters.

    Both have the same learning rate, that of AdamW: Muon's steps are scaled to the size of AdamW's (Liu et al., Muon is
    scalable for LLM training, arXiv 2502.16982). One of them is left out if it would have no parameters.

    Args:
        model: a model with dense weights. Parameters that do not require a gradient are left out.
        lr: the learning rate.
        weight_decay: decoupled weight decay, for parameters of two or more dimensions.
        momentum: the share of a running mean that a step of Muon keeps.
    """
    hidden = hidden_matrices(model)
    inside = {id(parameter) for parameter in hidden}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in inside]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizers: list[Optimizer] = []
    if hidden:
        settings = {"weight_decay": weight_decay, "momentum": momentum, "adjust_lr_fn": "match_rms_adamw"}
        optimizers.append(Muon(hidden, lr=lr, **settings))
    return [*optimizers, AdamW(groups, lr=lr, fused=True)] if groups else optimizers


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters that Muon trains: the trained matrices of a model, except those at its two ends.

    The ends are embeddings, weights that are tied to them, a convolution that is the model's first layer with a matrix,
    and its last such layer. The first and the last are those in the order in which the model registers its modules.
    Parameters that no layer multiplies by, such as positions (1, T, D), are left out as well.
    """
    found = list(_matrices(model))
    embedded = {id(p) for module in model.modules() if isinstance(module, _NOT_MATRICES) for p in module.parameters()}
    layers = list(dict.fromkeys(module for module, _ in found))
    ends = set(layers[-1:]) | {layer for layer in layers[:1] if isinstance(layer, _ConvNd)}
    kept = [p for layer, p in found if layer not in ends and id(p) not in embedded]
    return list(dict.fromkeys(kept))


def _matrices(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Parameter]]:
    """Yields the trained matrices of a model's layers, each with its layer, in the order of the model's modules."""
    for module in model.modules():
        if not isinstance(module, _NOT_MATRICES):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad and parameter.ndim >= 2 and name.endswith("weight"):
                    yield module, parameter
