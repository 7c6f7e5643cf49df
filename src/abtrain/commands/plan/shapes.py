"""Provides the tensor shapes that predictions need, for a task's model or for an assumed model of any size.

Tensors are on PyTorch's meta device: they have shapes and dtypes, but no storage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from abtrain.errors import ConfigurationError
from abtrain.lowrank.classify import Kind, classify
from abtrain.lowrank.svd import MatrixShape
from abtrain.optim import hidden_matrices
from abtrain.own import own_names, shared_buffers
from abtrain.recipes.factoring import Factoring
from abtrain.recipes.numbers import number_problems, whole_number_problems

_QUARTER = 1 / 4
_WIDTH = 1024
_COUNT = 1000
"""The approximate number of weights of an assumed model if its width is not set. More would only slow predictions."""
_MOST = 20_000


@dataclass(frozen=True)
class ModelShapes:
    """The tensors of a model on the meta device, without values.

    Attributes:
        parameters: the parameters by name, in the model's order. Tied parameters appear once.
        kinds: the treatment of each parameter (see `abtrain.lowrank.classify`).
        without_gradient: the names of parameters that DDP ignores, because they require no gradient or belong to one
            worker.
        buffers: the buffers that workers share, by name.
        hidden: the names of the matrices inside the model, which Muon trains (see `abtrain.optim.hidden_matrices`).
    """

    parameters: Mapping[str, Tensor]
    kinds: Mapping[str, Kind]
    without_gradient: frozenset[str] = frozenset()
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    hidden: frozenset[str] = frozenset()

    @property
    def numel(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters.values())

    @property
    def hidden_numel(self) -> int:
        return sum(self.parameters[name].numel() for name in self.hidden)

    def matrices(self) -> dict[str, MatrixShape]:
        """Returns the matrix shape of each weight that may be factored, by name and in the model's order."""
        return {name: MatrixShape(p.shape) for name, p in self.parameters.items() if self.kinds[name] == "factored"}

    def compression(self, ranks: Mapping[str, int]) -> float:
        """Returns the compression: the parameters of the full model divided by those of the model with these ranks."""
        matrices = self.matrices()
        dense = sum(self.parameters[name].numel() for name in ranks)
        factored = sum(k * (matrices[name].m + matrices[name].n) for name, k in ranks.items())
        return self.numel / max(self.numel - dense + factored, 1)


def shapes_of(model: nn.Module, factoring: Factoring | None = None) -> ModelShapes:
    """Returns the shapes of a model on any device. All its parameters are assumed to be in the optimizer.

    Args:
        model: a model with dense weights.
        factoring: the factoring of the recipe; None if the recipe has no factored phase.
    """
    own, hidden = own_names(model), set(map(id, hidden_matrices(model)))
    return ModelShapes(
        {name: _meta(p) for name, p in model.named_parameters()},
        {treatment.name: treatment.kind for treatment in classify(model, factoring)},
        frozenset(name for name, p in model.named_parameters() if not p.requires_grad or name in own),
        {name: _meta(buffer) for name, buffer in shared_buffers(model).items()},
        frozenset(name for name, p in model.named_parameters() if id(p) in hidden),
    )


def assumed_shapes(parameters: int, width: int | None = None) -> ModelShapes:
    """Returns the shapes of a model of square float32 weights, all of which may be factored.

    The parameters that do not fill a square weight form one narrower weight and one vector. If the model is too small
    for the width, its weights have a smaller width.

    Args:
        parameters: the number of parameters.
        width: the number of rows and columns of a weight. The default is 1,024, or more for a model that would have
            over about 1,000 weights.

    Raises:
        ConfigurationError: a number is below 1, or the width is so small that there would be too many weights.
    """
    problems = whole_number_problems("parameters", parameters, 1)
    if width is not None:
        problems += whole_number_problems("width", width, 1)
        if not problems and parameters // width**2 > _MOST:
            least = math.isqrt(parameters // _MOST) + 1
            problems.append(
                f"width={width} splits the model into {parameters // width**2:,} weights, and at most {_MOST:,} are "
                f"allowed: use a width of at least {least:,}"
            )
    if problems:
        raise ConfigurationError(problems)
    width = min(width or max(_WIDTH, math.isqrt(parameters // _COUNT)), math.isqrt(parameters))
    count, rest = divmod(parameters, width * width)
    shapes: dict[str, tuple[int, ...]] = {f"weight{i}": (width, width) for i in range(count)}
    if rest >= width:
        shapes["narrow"] = (width, rest // width)
    if rest % width:
        shapes["vector"] = (rest % width,)
    kinds: dict[str, Kind] = {name: "factored" if len(shape) == 2 else "averaged" for name, shape in shapes.items()}
    hidden = frozenset(name for name, shape in shapes.items() if len(shape) == 2)
    return ModelShapes(
        {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, kinds, hidden=hidden
    )


def ranks_for(model: ModelShapes, compression: float | None) -> dict[str, int]:
    """Returns a rank k for each weight, with which the whole model has about this compression.

    All weights shrink by about the same factor.

    Args:
        model: the model whose weights are factored.
        compression: the parameters of the full model divided by those of the factored model. A value below 1 gives
            factors that are larger than their weights, up to full rank. None: each weight keeps a quarter.

    Raises:
        ConfigurationError: the compression is not a number above 0, or ranks of 1 do not reach it.
    """
    matrices = model.matrices()
    share = _QUARTER if compression is None else _share(model, compression)
    return {
        name: min(max(round(share * shape.m * shape.n / (shape.m + shape.n)), 1), shape.n)
        for name, shape in matrices.items()
    }


def _share(model: ModelShapes, compression: float) -> float:
    """Returns the share of its parameters that each factored weight keeps, so that the whole model is compressed."""
    problems = number_problems("compression", compression, above=0)
    if problems:
        raise ConfigurationError(problems)
    matrices = model.matrices()
    most = model.compression(dict.fromkeys(matrices, 1))
    if matrices and compression > most:
        raise ConfigurationError(
            f"compression={compression} is too large: factors of rank 1, the smallest possible, compress this model by "
            f"{most:.4g}. Use at most that"
        )
    full = sum(shape.m * shape.n for shape in matrices.values())
    # Parameters without factors keep their size, so the others must shrink by more than the whole model does.
    return (model.numel / compression - (model.numel - full)) / max(full, 1)


def _meta(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
