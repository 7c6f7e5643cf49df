"""Compresses a trained model: factors its weights by SVD, and returns it as plain PyTorch modules."""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from abtrain.errors import ConfigurationError, NonFiniteError, UsageError
from abtrain.lowrank.classify import Treatment, classify, owner
from abtrain.lowrank.layers import Factored
from abtrain.lowrank.plain import becomes_two_layers, kind_of, plain_copy, refuse_sharded
from abtrain.lowrank.surgery import factorize_
from abtrain.lowrank.svd import Factors, MatrixShape, decompose
from abtrain.modes import own_modes
from abtrain.recipes.factoring import Factoring, RankRule

_WORTHWHILE = 1.2
"""The ratio of sizes from which a smaller model is worth the accuracy that it may lose."""
_HARDLY_PAYS = (
    "This hardly pays: few weights can be factored, or they are not of low rank. Keep the given model, take a rank "
    "rule that cuts more, or train with factors, which lowers the ranks."
)


@dataclass(frozen=True)
class CompressedWeight:
    """Describes what `compress` did to one weight.

    Attributes:
        name: the name of the weight in the given model.
        shape: its shape.
        rank: the rank k of its factors; 0 if it stays dense.
        parameters: the number of elements of both factors, or of the dense weight.
        error: the relative error |W - A B| / |W| in the Frobenius norm; 0 for a dense weight.
        reason: the reason why it stays dense; empty for a factored weight.
    """

    name: str
    shape: tuple[int, ...]
    rank: int
    parameters: int
    error: float
    reason: str


@dataclass(frozen=True)
class Compressed:
    """Contains a compressed model, and a description of each of its weights. `print` shows a table.

    The given model stays as it was: the small one is `model`.

    Attributes:
        model: a copy of the given model in plain PyTorch modules, with two small layers for each factored one.
        weights: the descriptions of all weights with at least two dimensions.
        parameters: the numbers of parameters before and after compression.
    """

    model: nn.Module
    weights: tuple[CompressedWeight, ...]
    parameters: tuple[int, int]

    def __str__(self) -> str:
        width = max((len(weight.name) for weight in self.weights), default=6)
        lines = [f"{'weight':<{width}}  {'shape':>14}  {'rank':>5}  {'parameters':>11}   error"]
        for weight in self.weights:
            shape, rank = "x".join(map(str, weight.shape)), str(weight.rank or "dense")
            lost = f"  {weight.error:.4f}" if weight.rank else ""
            lines.append(f"{weight.name:<{width}}  {shape:>14}  {rank:>5}  {weight.parameters:>11,}{lost}")
        for weight in self.weights:
            if weight.reason:
                lines.append(textwrap.fill(f"{weight.name} stays dense: {weight.reason}", 80, subsequent_indent="  "))
        before, after = self.parameters
        if before < _WORTHWHILE * after:
            lines += textwrap.wrap(_HARDLY_PAYS, 80)
        return "\n".join([*lines, f"{before:,} parameters before, {after:,} after: {before / max(after, 1):.2f} : 1"])


@own_modes()
def compress(model: nn.Module, rank_rule: RankRule, *, exclude: Sequence[str] = ()) -> Compressed:
    """Factors the weights of a trained model by SVD, without training. The given model is not changed.

    Linear layers and convolutions are factored where their factors are smaller. All other weights stay as they are.

    Args:
        model: a model with dense weights.
        rank_rule: chooses how many singular values of each weight are kept, such as `Energy(0.95)`.
        exclude: globs of the names of parameters that stay dense, such as `head.*`.

    Raises:
        ConfigurationError: the rank rule or `exclude` is invalid.
        NonFiniteError: a weight contains NaN or infinity.
        UsageError: an ABTraining is training the model, and it has factors already; or the model is sharded.
    """
    refuse_sharded(model)
    factoring = Factoring(rank_rule, exclude=exclude)  # type: ignore[arg-type]  # `problems` checks it
    problems = factoring.problems()
    names = [name for name, _ in model.named_parameters()]
    unmatched = [] if problems else [glob for glob in exclude if not any(fnmatchcase(name, glob) for name in names)]
    problems += [f"exclude={glob!r} matches no parameter: use names such as {names[0]!r}" for glob in unmatched]
    if problems:
        raise ConfigurationError(problems)
    if any(isinstance(module, Factored) for module in model.modules()):
        raise UsageError("the model has factors already: abtrain.to_plain(model) makes plain modules of them")
    copied, trained = copy.deepcopy(model), {name: p.requires_grad for name, p in model.named_parameters()}
    for parameter in copied.parameters():
        # A model for inference has frozen weights, and those can be factored too.
        parameter.requires_grad_(parameter.is_floating_point() or parameter.requires_grad)
    treatments = [treatment for treatment in classify(copied, factoring) if len(treatment.shape) >= 2]
    weights = tuple(_compressed(copied, treatment, rank_rule) for treatment in treatments)
    plain, _ = plain_copy(copied)
    for name, parameter in plain.named_parameters():
        path, _, attribute = name.rpartition(".")
        # The two layers in place of NAME are NAME.0 and NAME.1.
        known = name if name in trained else f"{path.rpartition('.')[0]}.{attribute}".removeprefix(".")
        parameter.requires_grad_(trained[known])
    before, after = (sum(p.numel() for p in one.parameters()) for one in (model, plain))
    return Compressed(plain, weights, (before, after))


def _compressed(model: nn.Module, treatment: Treatment, rank_rule: RankRule) -> CompressedWeight:
    """Factors one weight in place if its factors are smaller. Returns its description."""
    name, shape, numel = treatment.name, treatment.shape, treatment.numel
    if treatment.kind != "factored":
        return CompressedWeight(name, shape, 0, numel, 0.0, treatment.reason)
    module, attribute = owner(model, name)
    weight = module.get_parameter(attribute).detach()
    if attribute != "weight" or not becomes_two_layers(model, name.rpartition(".")[0]):
        return CompressedWeight(name, shape, 0, numel, 0.0, f"{kind_of(module)} computes with the dense weight")
    W = MatrixShape(weight.shape).to_matrix(weight)
    try:
        factors = decompose(W, rank_rule)
    except NonFiniteError as error:
        raise NonFiniteError(f"{name}: {error}") from error
    size = factors.A.numel() + factors.B.numel()
    if size >= numel:
        return CompressedWeight(name, shape, 0, numel, 0.0, f"factors of rank {factors.k} would not be smaller")
    lost = _relative_error(W, factors)
    factorize_(model, name, factors)
    return CompressedWeight(name, shape, factors.k, size, lost, "")


def _relative_error(W: Tensor, factors: Factors) -> float:
    norm = float(W.double().norm())
    return float((W.double() - factors.A.double() @ factors.B.double()).norm()) / norm if norm else 0.0
