"""factorize_ / restore_: a weight of a live model <-> its factors, in place.

The module object stays, and so does the `Parameter` object of the weight: its storage is freed while the factors live,
and filled again afterwards. Whoever holds either keeps a valid reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from abtrain.lowrank.classify import has_factored_form, owner
from abtrain.lowrank.layers import FACTORED_LAYERS, LowRankWeight
from abtrain.lowrank.matrix import MatrixShape
from abtrain.lowrank.svd import Factors


@dataclass(frozen=True)
class FactoredWeight:
    """The record of one factored weight: all that is needed to use it and to undo it.

    Attributes:
        name: the weight's name in the model.
        module: that holds it.
        attribute: the weight's name in the module.
        dense: the weight's own Parameter, empty while the factors live.
        A: (m, k).
        B: (k, n).
        matrix_shape: how the weight is seen as a matrix.
        dense_type: the module's class before.
        order: of the module's own parameters before.
        strides: of the dense weight before.
    """

    name: str
    module: nn.Module
    attribute: str
    dense: nn.Parameter
    A: nn.Parameter
    B: nn.Parameter
    matrix_shape: MatrixShape
    dense_type: type[nn.Module]
    order: tuple[str, ...]
    strides: tuple[int, ...]

    @property
    def k(self) -> int:
        return self.B.shape[0]

    def weight(self) -> Tensor:
        """W = A B in the weight's own shape, without a gradient. Halves are multiplied in float32."""
        with torch.no_grad():
            wide = self.A.dtype if self.A.dtype == torch.float64 else torch.float32
            return self.matrix_shape.to_tensor((self.A.to(wide) @ self.B.to(wide)).to(self.A.dtype))

    def state_keys(self) -> tuple[str, str]:
        """Names of A and B in the model's state_dict."""
        path = self.name.removesuffix(self.attribute)
        if self.dense_type in FACTORED_LAYERS and type(self.module) is FACTORED_LAYERS[self.dense_type]:
            return f"{path}A", f"{path}B"
        stem = f"{path}parametrizations.{self.attribute}"
        return f"{stem}.original0", f"{stem}.original1"


def factorize_(model: nn.Module, name: str, factors: Factors) -> FactoredWeight:
    """Puts factors in the place of weight `name`, in place, and frees the dense weight.

    Args:
        model: that holds the weight.
        name: the weight's name, as in `named_parameters()`.
        factors: A (m, k) and B (k, n).

    Returns:
        The record that `restore_` takes.
    """
    module, attribute = owner(model, name)
    dense = module.get_parameter(attribute)
    shape, dense_type = MatrixShape(dense.shape), type(module)
    order, strides = tuple(module._parameters), dense.stride()
    if has_factored_form(module):
        del module._parameters[attribute]
        module.__class__ = FACTORED_LAYERS[dense_type]
        A, B = nn.Parameter(factors.A), nn.Parameter(factors.B)
        module.matrix_shape = shape  # type: ignore[assignment]  # plain attribute of the factored class
        module.register_parameter("A", A)
        module.register_parameter("B", B)
    else:
        rebuild = LowRankWeight(shape, *factors)
        parametrize.register_parametrization(module, attribute, rebuild)
        A = module.get_parameter(f"parametrizations.{attribute}.original0")
        B = module.get_parameter(f"parametrizations.{attribute}.original1")
        del rebuild._start
    dense.grad = None
    dense.data = dense.data.new_empty(0)
    return FactoredWeight(name, module, attribute, dense, A, B, shape, dense_type, order, strides)


def restore_(record: FactoredWeight) -> nn.Parameter:
    """Undoes `factorize_`: W = A B is back in the module, in the Parameter object that was there before.

    Of several weights of one module, the last that was factored is restored first.
    """
    module, attribute = record.module, record.attribute
    W = record.weight()
    # In the memory layout of before: optimizer state of dense neighbours, and fused optimizers, go by it.
    record.dense.data = torch.empty_strided(W.shape, record.strides, dtype=W.dtype, device=W.device).copy_(W)
    if type(module) is FACTORED_LAYERS.get(record.dense_type):
        del module._parameters["A"], module._parameters["B"], module.matrix_shape
        module.__class__ = record.dense_type  # type: ignore[assignment]
    else:
        parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)
        delattr(module, attribute)
    module.register_parameter(attribute, record.dense)
    for name in record.order:
        module._parameters[name] = module._parameters.pop(name)
    return record.dense
