"""Lets users' code read a factored weight, as `module.weight` or as a Parameter obtained before it was factored.

Both have the value W = A B, and gradients of W flow to the factors if gradients are enabled. `grad` contains the
gradients of the factors. Writing to the value raises an error, because it would not change the model. Among the
module's parameters, a `FactoredMark` comes before the factors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from abtrain.errors import UsageError
from abtrain.lowrank.nested import tensors_in, with_tensors
from abtrain.lowrank.weight import FactoredWeight, read_product

_NEEDS_NO_VALUE = frozenset(
    {"shape", "ndim", "dtype", "device", "layout", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized"}
    | {"size", "numel", "nelement", "dim", "ndimension", "is_floating_point", "is_complex", "element_size"}
    | {"get_device", "__len__", "is_leaf", "grad_fn", "_version"}
)
_NO_WRITE = frozenset({"__invert__", "__index__", "__int__", "__iter__"})
_HOOKS = frozenset({"register_hook", "register_post_accumulate_grad_hook", "retain_grad"})
MARK_SHAPE = (1,) * 8
"""The shape of a `FactoredMark`. No weight has so many dimensions, so in-place operations cannot broadcast the mark."""


def keep_(record: FactoredWeight) -> None:
    """Makes the weight's dense Parameter return the product of the factors when read, until `give_back_` is called."""
    record.dense.__class__ = FactoredParameter
    record.dense._abtrain_record = record  # type: ignore[attr-defined]


def give_back_(dense: nn.Parameter) -> None:
    """Undoes `keep_`: makes `dense` a plain Parameter again."""
    dense.__class__ = nn.Parameter
    for name in ("_abtrain_record", "_abtrain_gradient"):
        dense.__dict__.pop(name, None)


def shown(record: FactoredWeight, W: Tensor) -> Tensor:
    """Returns the value W of a factored weight as a read-only tensor that refers to the weight's record."""
    read = W.as_subclass(ReadOnly)
    read._abtrain_record = record
    return read


class _StandIn(Tensor):
    """The base class of tensors that represent a factored weight or share memory with its value."""

    _abtrain_record: FactoredWeight | None = None
    """The record of the weight that the tensor represents; None for views and other tensors that share its memory."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name, kwargs = _name_of(func), kwargs or {}
        for refused in _refused_by(name, args, kwargs):
            _refuse(refused, name)
        memory: set[int] = set()
        foreign = not all(issubclass(one, ReadOnly | nn.Parameter) for one in types)

        def value(tensor: Tensor) -> Tensor:
            if isinstance(tensor, FactoredParameter):
                tensor = tensor._without_value() if name in _NEEDS_NO_VALUE else tensor._product()
            if isinstance(tensor, ReadOnly):
                memory.update(_memory(tensor))
                tensor = tensor.as_subclass(Tensor) if foreign else tensor
            return tensor

        with torch._C.DisableTorchFunctionSubclass():
            args, kwargs = with_tensors(args, value), with_tensors(kwargs, value)
            if not foreign:
                return _of_result(name, func(*args, **kwargs), memory)
        # Called outside the block, so that the `__torch_function__` of other tensor classes runs.
        return func(*args, **kwargs)

    def _plain(self) -> Tensor:
        """Returns a writable copy, with the type that the tensor has while the weight is dense."""
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = memo[id(self)] = self._plain()
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._plain().__reduce_ex__(protocol)


class ReadOnly(_StandIn):
    """The read-only value of a factored weight, or a view of it. It has the weight's record if read from the module."""

    @property
    def grad(self) -> Tensor | None:
        """The gradients of the factors as one vector, as in `FactoredParameter.grad`; for a view, its own gradient."""
        if self._abtrain_record is not None:
            return self._abtrain_record.dense.grad
        with torch._C.DisableTorchFunctionSubclass():
            return super().grad

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        if self._abtrain_record is None:
            _refuse(self, "grad")
        self._abtrain_record.dense.grad = value

    def _plain(self) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            copied = self.detach().clone().as_subclass(Tensor)
            return copied if self._abtrain_record is None else nn.Parameter(copied)


class FactoredParameter(_StandIn, nn.Parameter):
    """The Parameter of a dense weight while the weight is factored. Its value is the product of the factors."""

    _abtrain_record: FactoredWeight
    _abtrain_gradient: tuple[Tensor, list[int]] | None = None
    """The factors' gradients as one vector, and the memory address of each gradient; None before the first read."""

    def _product(self) -> Tensor:
        """Returns W = A B, with a gradient to the factors if gradients are enabled."""
        record = self._abtrain_record
        W = read_product(record, record.A, record.B) if record.hooks else record.product_of(record.A, record.B)
        return record.lay_out(W).as_subclass(ReadOnly)

    def _without_value(self) -> Tensor:
        """Returns a tensor with the shape, dtype and device of W. Its values have no meaning."""
        return self._abtrain_record.A.detach().new_empty(()).expand(self._abtrain_record.matrix_shape.dense)

    def _plain(self) -> Tensor:
        return nn.Parameter(self._abtrain_record.laid_out())

    @property
    def data(self) -> Tensor:
        return self._abtrain_record.laid_out().as_subclass(ReadOnly)

    @data.setter
    def data(self, value: Tensor) -> None:
        _refuse(self, "data")

    @property
    def _base(self) -> None:  # type: ignore[override]  # nobody can set it in torch either
        """None, since this is not a view. Raises a UsageError under torch.compile, which would read an empty tensor."""
        if torch._guards.TracingContext.try_get() is not None:
            raise UsageError(
                f"a compiled function uses a parameter of shape {tuple(self.shape)} that was taken from the model "
                "before its weight was factored: in that function, read the weight from its module, as module.weight"
            )

    @property
    def requires_grad(self) -> bool:
        return self._abtrain_record.A.requires_grad or self._abtrain_record.B.requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        if value != self.requires_grad:
            _refuse(self, "requires_grad")

    @property
    def grad(self) -> Tensor | None:
        """The gradients of A and B as one vector that shares their memory; None if neither factor has a gradient."""
        gradients = {factor: factor.grad for factor in self._abtrain_record.factors if factor.grad is not None}
        known = self._abtrain_gradient
        if known is not None and known[1] == [gradient.data_ptr() for gradient in gradients.values()]:
            return known[0]
        self._abtrain_gradient = None
        if not gradients:
            return None
        flat = torch.cat([gradient.detach().reshape(-1) for gradient in gradients.values()])
        pieces = flat.split([factor.numel() for factor in gradients])
        for factor, piece in zip(gradients, pieces, strict=True):
            factor.grad = piece.view(factor.shape)
        # While this reference exists, no other gradient can be allocated at the vector's address.
        self._abtrain_gradient = (flat, [piece.data_ptr() for piece in pieces])
        return flat

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        if value is None:
            self._abtrain_record.A.grad = self._abtrain_record.B.grad = None
            return
        flat, trained = self.grad, [factor for factor in self._abtrain_record.factors if factor.requires_grad]
        expected = (sum(factor.numel() for factor in trained),) if flat is None else tuple(flat.shape)
        if tuple(value.shape) != expected:
            raise UsageError(
                f"a gradient of shape {tuple(value.shape)} was set on a weight of shape {tuple(self.shape)} that is "
                f"currently factored: its gradient must be one vector of shape {expected}, for both factors. Change "
                "gradients in place, or set the gradients of model.parameters()"
            )
        if flat is None:
            for factor in trained:
                factor.grad = torch.zeros_like(factor)
            flat = self.grad
        assert flat is not None
        with torch.no_grad():
            flat.copy_(value)

    @grad.deleter
    def grad(self) -> None:
        self.grad = None


class FactoredMark(nn.Parameter):
    """Marks the place of a factored weight among a module's parameters. The mark is a zero that is never trained.

    Code that averages weights, such as torch's AveragedModel, pairs the `parameters()` of a model with those of a copy.
    It would pair a weight of the copy with a factor, and broadcasting might hide the mistake. The mark makes such code
    fail with an explanation. Code that sums norms or counts parameters may read the mark.
    """

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(other.ndim for other in tensors_in((args, kwargs)) if not isinstance(other, FactoredMark)):
            raise UsageError(
                "the parameters of a model were combined with other tensors, but some of its weights are currently "
                "factored into A and B. Combine the tensors of `state_dict()`, which are full weights, or use "
                "ABTraining.ema for a running average"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        # As a FactoredMark, the base would be a view that has another base, and so on without end.
        whole = isinstance(result, Tensor) and result.shape == MARK_SHAPE and _name_of(func) != "_base"
        return result.as_subclass(FactoredMark) if whole and not isinstance(result, FactoredMark) else result

    @property
    def requires_grad(self) -> bool:
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        """Ignores the value, so that a loop that unfreezes all parameters of a model leaves the mark frozen."""

    def requires_grad_(self, requires_grad: bool = True) -> FactoredMark:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Makes a saved mark a plain Parameter, so that exported programs can be loaded without abtrain."""
        with torch._C.DisableTorchFunctionSubclass():
            return super().__reduce_ex__(protocol)


def _of_result(name: str, result: Any, memory: set[int]) -> Any:
    """Makes tensors in a result read-only if they are views of a factored weight's value. Other tensors stay plain."""

    def read_only(item: Tensor) -> Tensor:
        views = type(item) is Tensor and item.numel() and memory.intersection(_memory(item))
        return item.as_subclass(ReadOnly) if views else item

    if name == "_base":
        return result  # a read-only base would be a view that has another base, and so on without end
    return result.copy() if name in ("numpy", "__array__") else with_tensors(result, read_only)


def _memory(tensor: Tensor) -> tuple[int, ...]:
    """Returns the address of a tensor's storage in a tuple; empty if it has none (meta device, functorch)."""
    if tensor.layout != torch.strided or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return ()
    place = tensor.untyped_storage().data_ptr()
    return (place,) if place else ()


def _name_of(func: Callable[..., Any]) -> str:
    """Returns the name of a function, or of the attribute that it reads; `NAME=` if it sets or deletes an attribute."""
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__", "__delete__"):
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        return attribute if name == "__get__" else f"{attribute}="
    return name


def _refused_by(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> list[_StandIn]:
    """Returns the arguments that represent factored weights and that a function would write to or add a hook to."""
    first = args[:1] or list(kwargs.values())
    in_place = (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace") is True
    operator = name == "__setitem__" or (name.startswith("__i") and name not in _NO_WRITE)
    written = first if in_place or operator or name.endswith("=") else []
    refused = [tensor for tensor in tensors_in([written, kwargs.get("out")]) if isinstance(tensor, _StandIn)]
    hooked = first if name in _HOOKS else []
    return refused + [one for one in hooked if isinstance(one, _StandIn) and one._abtrain_record is not None]


def _refuse(tensor: Tensor, name: str) -> NoReturn:
    with torch._C.DisableTorchFunctionSubclass():
        shape = tensor._abtrain_record.matrix_shape.dense if isinstance(tensor, FactoredParameter) else tensor.shape
    raise UsageError(
        f"{name} on a weight of shape {tuple(shape)} that is currently factored would have no effect on the model, "
        "which uses the weight's factors A and B instead: do this before a factored phase, or exclude this weight from "
        "factoring, with the recipe's option exclude"
    )
