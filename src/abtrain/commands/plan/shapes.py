"""The shapes that a prediction starts from: of a real model, or of one that is only known by its size.

Tensors here are on PyTorch's meta device: they have shapes and dtypes, and no storage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from abtrain.errors import ConfigurationError
from abtrain.lowrank.classify import Kind, classify
from abtrain.lowrank.matrix import MatrixShape
from abtrain.own import own_names, shared_buffers
from abtrain.recipes.factoring import Factoring
from abtrain.recipes.numbers import number_problems, whole_number_problems

_WIDTH = 1024
_COUNT = 1000
"""Weights of an assumed model, unless a width is given: more would make predictions slow, and not better."""
_MOST = 20_000


@dataclass(frozen=True)
class ModelShapes:
    """A model's tensors without their content.

    Attributes:
        parameters: by name, tied ones once, in the model's order.
        kinds: what becomes of each parameter (see `abtrain.lowrank.classify`).
        without_gradient: names of parameters that DDP leaves alone: they require no gradient, or are a worker's own.
        buffers: by name, as far as workers share them.
    """

    parameters: Mapping[str, Tensor]
    kinds: Mapping[str, Kind]
    without_gradient: frozenset[str] = frozenset()
    buffers: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def numel(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters.values())

    def matrices(self) -> dict[str, MatrixShape]:
        """The weights that may be factored, as matrices, in the model's order."""
        return {name: MatrixShape(p.shape) for name, p in self.parameters.items() if self.kinds[name] == "factored"}

    def compression(self, ranks: Mapping[str, int]) -> float:
        """Parameters of the full model over parameters with the weights in `ranks` as factors of rank k."""
        matrices = self.matrices()
        saved = sum(self.parameters[name].numel() - matrices[name].factored_numel(k) for name, k in ranks.items())
        return self.numel / max(self.numel - saved, 1)


def shapes_of(model: nn.Module, factoring: Factoring | None = None) -> ModelShapes:
    """The shapes of a model, on whatever device, all of whose parameters are in the optimizer.

    Args:
        model: with all its weights dense.
        factoring: of the recipe; None where it has no factored phase.
    """
    own = own_names(model)
    return ModelShapes(
        {name: _meta(p) for name, p in model.named_parameters()},
        {treatment.name: treatment.kind for treatment in classify(model, factoring)},
        frozenset(name for name, p in model.named_parameters() if not p.requires_grad or name in own),
        {name: _meta(buffer) for name, buffer in shared_buffers(model).items()},
    )


def assumed_shapes(parameters: int, width: int | None = None) -> ModelShapes:
    """A model of `parameters` float32 numbers in square weights of `width`, all of which may be factored.

    What is left over is one narrower weight and one vector. A model too small for a weight of that width has one
    that is as wide as fits.

    Args:
        parameters: how many.
        width: of the weights; default 1,024, or so much more that there are about 1,000 weights.

    Raises:
        ConfigurationError: numbers below 1, or a width that makes too many weights.
    """
    problems = whole_number_problems("parameters", parameters, 1)
    if width is not None:
        problems += whole_number_problems("width", width, 1)
        if not problems and parameters // width**2 > _MOST:
            least = math.isqrt(parameters // _MOST) + 1
            problems.append(f"width={width} makes {parameters // width**2:,} weights: use one of at least {least:,}")
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
    return ModelShapes({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, kinds)


def ranks_for(model: ModelShapes, compression: float) -> dict[str, int]:
    """Ranks k by weight that together give the whole model about this compression, each weight cut alike.

    Args:
        model: whose weights are factored.
        compression: full parameters over factored ones; below 1 for factors that are larger than their weights, whose
            ranks end at full rank.

    Raises:
        ConfigurationError: a compression that is no number above 0, or that ranks of 1 do not reach.
    """
    problems = number_problems("compression", compression, above=0)
    if problems:
        raise ConfigurationError(problems)
    matrices = model.matrices()
    most = model.compression(dict.fromkeys(matrices, 1))
    if matrices and compression > most:
        raise ConfigurationError(
            f"compression={compression} is out of reach: factors of rank 1 and what is not factored compress this "
            f"model {most:.4g} : 1; use a number up to that"
        )
    full = sum(shape.m * shape.n for shape in matrices.values())
    # What is not factored keeps its size, so that the factors have to be smaller than compression alone says.
    share = (model.numel / compression - (model.numel - full)) / max(full, 1)
    return {
        name: min(max(round(share * shape.m * shape.n / (shape.m + shape.n)), 1), shape.n)
        for name, shape in matrices.items()
    }


def _meta(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
