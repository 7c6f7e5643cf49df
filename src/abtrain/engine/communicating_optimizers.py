"""Optimizers that talk to other workers themselves: with abtrain, what they send would be sent twice, or amid a round.

Nothing is imported here to find out: where a library is not loaded, none of its optimizers is there.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

_OF_TORCH = frozenset({"ZeroRedundancyOptimizer", "PostLocalSGDOptimizer", "DistributedOptimizer"})
"""Classes of torch.distributed."""
_LIBRARIES = ("bagua", "byteps", "deepspeed", "fairscale", "hivemind", "horovod", "torchft")
_KERNELS = ("deepspeed.ops.",)
"""Modules of these libraries whose optimizers are a worker's own."""
_GROUPS = frozenset({"ProcessGroup", "DeviceMesh"})
_COLLECTIVES = frozenset(
    {"all_gather", "all_gather_coalesced", "all_gather_into_tensor", "all_gather_object", "all_reduce"}
    | {"all_reduce_coalesced", "all_to_all", "all_to_all_single", "batch_isend_irecv", "broadcast"}
    | {"broadcast_object_list", "irecv", "isend", "reduce_scatter", "reduce_scatter_tensor"}
)
_DISTRIBUTED = frozenset({"distributed", "torch.distributed"})
"""How code names torch.distributed that does not have it in a global variable."""
_SHARDED = "fsdp_in_use"
"""The setting of D-Adaptation, Prodigy and their kin, without which they send nothing."""


def communicates(optimizer: object) -> str:
    """How it is known that an optimizer talks to other workers itself; empty if nothing says so.

    Args:
        optimizer: of any class; nothing of it is called.
    """
    inside = [(place, part) for place, part in _parts_of(optimizer) if isinstance(part, Optimizer)]
    found = ((place, _communicates(one)) for place, one in (("", optimizer), *inside))
    return next((f"{why}, at {place}" if place else why for place, why in found if why), "")


def _communicates(optimizer: object) -> str:
    """As `communicates`, without the optimizers inside this one."""
    kinds = [kind for kind in type(optimizer).__mro__ if kind is not object and not _is_of_torch_optim(kind)]
    return (
        next((f"it is a {_name(kind)}" for kind in kinds if _is_known(kind)), "")
        or next((f"its {place} is a {name}" for place, name in _groups_in(optimizer)), "")
        or next((call for kind in kinds for call in _calls_of(kind) if not _is_switched_off(optimizer)), "")
    )


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _is_of_torch_optim(kind: type) -> bool:
    return kind is Optimizer or kind.__module__.startswith("torch.optim.")


def _is_known(kind: type) -> bool:
    module = kind.__module__
    if module.startswith("torch.distributed."):
        return kind.__name__ in _OF_TORCH
    return module.partition(".")[0] in _LIBRARIES and not module.startswith(_KERNELS)


def _groups_in(optimizer: object) -> Iterator[tuple[str, str]]:
    """Places of groups of processes in an optimizer, and what they are: its attributes, and one level inside them."""
    for place, value in _parts_of(optimizer):
        found = _group_name(value)
        if found:
            yield place, found
            continue
        # A model or a tensor that an optimizer holds says nothing of what it does.
        inside = () if isinstance(value, nn.Module | Tensor | type) else _parts_of(value)
        yield from ((f"{place}{where}", _group_name(part)) for where, part in inside if _group_name(part))


def _parts_of(value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        yield from ((f"[{key!r}]", part) for key, part in value.items() if not isinstance(key, Tensor))
    elif isinstance(value, list | tuple | set | frozenset):
        yield from ((f"[{place}]", part) for place, part in enumerate(value))
    elif not isinstance(value, FunctionType | ModuleType):
        groups = getattr(value, "param_groups", None)
        yield from ((f".{name}", part) for name, part in getattr(value, "__dict__", {}).items())
        yield from (
            (f".param_groups[{i}]", group) for i, group in enumerate(groups if isinstance(groups, list) else ())
        )


def _group_name(value: object) -> str:
    """`ProcessGroup` or `DeviceMesh` if the value is one; otherwise empty."""
    kinds = (kind for kind in type(value).__mro__ if kind.__module__.partition(".")[0] == "torch")
    return next((kind.__name__ for kind in kinds if kind.__name__ in _GROUPS), "")


def _calls_of(kind: type) -> Iterator[str]:
    """The methods of a class that call collectives, and those of its module's functions that they call."""
    for name, held in vars(kind).items():
        function = _function(held)
        for one in [] if function is None else [function, *_helpers(function)]:
            called = _collectives(one)
            if called:
                yield f"{kind.__qualname__}.{name} calls {', '.join(called)}"


def _function(held: object) -> FunctionType | None:
    """The Python function behind a method, a property, or what `functools.wraps` was put on."""
    held = getattr(held, "__func__", getattr(held, "fget", held))
    unwrapped = inspect.unwrap(held) if callable(held) and not isinstance(held, type) else None
    return unwrapped if isinstance(unwrapped, FunctionType) else None


def _helpers(function: FunctionType) -> Iterator[FunctionType]:
    """Functions of the same module that a function calls by their names."""
    for name in sorted(_names_in(function.__code__)):
        helper = _function(function.__globals__.get(name))
        if helper is not None and helper.__globals__ is function.__globals__:
            yield helper


def _collectives(function: FunctionType) -> list[str]:
    """The collectives of torch.distributed that a function calls."""
    names = _names_in(function.__code__)
    held = [function.__globals__.get(name) for name in names]
    theirs = [value for value in held if _is_distributed(value)]
    called = {getattr(value, "__name__", "") for value in theirs}
    if theirs or names & _DISTRIBUTED:
        called |= names
    return sorted(called & _COLLECTIVES)


def _is_distributed(value: object) -> bool:
    """Whether something is torch.distributed or comes from there, under whatever name."""
    module = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", "")
    return isinstance(module, str) and f"{module}.".startswith("torch.distributed.")


def _names_in(code: CodeType) -> set[str]:
    """All names that a function uses, also in the functions inside it."""
    inner: Iterable[Any] = (const for const in code.co_consts if isinstance(const, CodeType))
    return {*code.co_names, *code.co_freevars}.union(*map(_names_in, inner))


def _is_switched_off(optimizer: object) -> bool:
    groups = getattr(optimizer, "param_groups", [])
    return any(_SHARDED in group for group in groups) and not any(group.get(_SHARDED) for group in groups)
