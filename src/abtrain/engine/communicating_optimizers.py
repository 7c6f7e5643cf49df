"""Finds optimizers that communicate with other workers themselves.

Such optimizers would send data twice, or between merges. The check imports none of the libraries that define them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType, ModuleType

from torch import Tensor, nn
from torch.optim import Optimizer

_OF_TORCH = frozenset({"ZeroRedundancyOptimizer", "PostLocalSGDOptimizer", "DistributedOptimizer"})
"""Optimizer classes of torch.distributed that communicate."""
_LIBRARIES = ("bagua", "byteps", "deepspeed", "fairscale", "hivemind", "horovod", "torchft")
_KERNELS = ("deepspeed.ops.",)
"""Prefixes of modules in `_LIBRARIES` whose optimizers do not communicate."""
_GROUPS = frozenset({"ProcessGroup", "DeviceMesh"})
_COLLECTIVES = frozenset(
    {"all_gather", "all_gather_coalesced", "all_gather_into_tensor", "all_gather_object", "all_reduce"}
    | {"all_reduce_coalesced", "all_to_all", "all_to_all_single", "batch_isend_irecv", "broadcast"}
    | {"broadcast_object_list", "irecv", "isend", "reduce_scatter", "reduce_scatter_tensor"}
)
_DISTRIBUTED = frozenset({"distributed", "torch.distributed"})
"""Names in a function's code by which it uses torch.distributed as an attribute or after a local import."""
_SHARDED = "fsdp_in_use"
"""The setting in param groups that makes D-Adaptation, Prodigy and similar optimizers communicate."""


def communicates(optimizer: object) -> str:
    """Returns the evidence that an optimizer communicates with other workers; empty if there is none.

    Args:
        optimizer: an object of any class. The function calls none of its methods.
    """
    inside = [(place, part) for place, part in _parts_of(optimizer) if isinstance(part, Optimizer)]
    found = ((place, _evidence(one)) for place, one in (("", optimizer), *inside))
    return next((f"{why}, at {place}" if place else why for place, why in found if why), "")


def _evidence(optimizer: object) -> str:
    """Returns the evidence that an optimizer communicates itself. Ignores the optimizers that it contains."""
    kinds = [kind for kind in type(optimizer).__mro__ if kind not in (object, Optimizer)]
    kinds = [kind for kind in kinds if not kind.__module__.startswith("torch.optim.")]
    groups = ((place, _group_name(part)) for place, part in _near_parts(optimizer))
    return (
        next((f"it is a {kind.__module__}.{kind.__qualname__}" for kind in kinds if _is_known(kind)), "")
        or next((f"its {place} is a {name}" for place, name in groups if name), "")
        or next((call for kind in kinds for call in _calls_of(kind) if not _is_switched_off(optimizer)), "")
    )


def _is_known(kind: type) -> bool:
    module = kind.__module__
    if module.startswith("torch.distributed."):
        return kind.__name__ in _OF_TORCH
    return module.partition(".")[0] in _LIBRARIES and not module.startswith(_KERNELS)


def _near_parts(optimizer: object) -> Iterator[tuple[str, object]]:
    """Yields the attributes of an optimizer and their direct items, each with the path to it."""
    for place, value in _parts_of(optimizer):
        yield place, value
        # Attributes of a model or a tensor do not show that the optimizer communicates.
        if not isinstance(value, nn.Module | Tensor | type):
            yield from ((f"{place}{where}", part) for where, part in _parts_of(value))


def _parts_of(value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        yield from ((f"[{key!r}]", part) for key, part in value.items() if not isinstance(key, Tensor))
    elif isinstance(value, list | tuple | set | frozenset):
        yield from ((f"[{place}]", part) for place, part in enumerate(value))
    elif not isinstance(value, FunctionType | ModuleType):
        yield from ((f".{name}", part) for name, part in getattr(value, "__dict__", {}).items())
        groups = getattr(value, "param_groups", None)
        if isinstance(groups, list):
            yield from ((f".param_groups{place}", group) for place, group in _parts_of(groups))


def _group_name(value: object) -> str:
    """Returns `ProcessGroup` or `DeviceMesh` if the value is an instance of it; otherwise an empty string."""
    kinds = (kind for kind in type(value).__mro__ if kind.__module__.partition(".")[0] == "torch")
    return next((kind.__name__ for kind in kinds if kind.__name__ in _GROUPS), "")


def _calls_of(kind: type) -> Iterator[str]:
    """Yields a description of each method that calls collectives, directly or through a function of its module."""
    for name, held in vars(kind).items():
        function = _function(held)
        for one in (function, *_helpers(function)) if function else ():
            called = _collectives(one)
            if called:
                yield f"{kind.__qualname__}.{name} calls {', '.join(called)}"


def _function(held: object) -> FunctionType | None:
    """Returns the Python function behind a method or a property, without wrappers made by `functools.wraps`."""
    held = getattr(held, "__func__", getattr(held, "fget", held))
    unwrapped = inspect.unwrap(held) if callable(held) and not isinstance(held, type) else None
    return unwrapped if isinstance(unwrapped, FunctionType) else None


def _helpers(function: FunctionType) -> Iterator[FunctionType]:
    """Yields the functions of the same module that a function calls by name."""
    for name in sorted(_names_in(function.__code__)):
        helper = _function(function.__globals__.get(name))
        if helper is not None and helper.__globals__ is function.__globals__:
            yield helper


def _collectives(function: FunctionType) -> list[str]:
    """Returns the names of the torch.distributed collectives that a function calls."""
    names = _names_in(function.__code__)
    held = [function.__globals__.get(name) for name in names]
    theirs = [value for value in held if _is_distributed(value)]
    called = {getattr(value, "__name__", "") for value in theirs}
    if theirs or names & _DISTRIBUTED:
        called |= names
    return sorted(called & _COLLECTIVES)


def _is_distributed(value: object) -> bool:
    """Returns whether a value is the module torch.distributed or is defined in it."""
    module = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", "")
    return isinstance(module, str) and f"{module}.".startswith("torch.distributed.")


def _names_in(code: CodeType) -> set[str]:
    """Returns all names that a function uses, including the names in nested functions."""
    inner = [_names_in(const) for const in code.co_consts if isinstance(const, CodeType)]
    return {*code.co_names, *code.co_freevars}.union(*inner)


def _is_switched_off(optimizer: object) -> bool:
    groups = getattr(optimizer, "param_groups", [])
    return any(_SHARDED in group for group in groups) and not any(group.get(_SHARDED) for group in groups)
