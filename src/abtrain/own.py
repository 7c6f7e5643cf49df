"""Divides a model's tensors into those that workers share, and those that the model tells DDP to ignore.

`DistributedDataParallel` reads the names of ignored tensors from an attribute of the model. abtrain does not compare,
average or broadcast these tensors: each worker trains, saves and resumes its own.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

IGNORED = "_ddp_params_and_buffers_to_ignore"
"""The model attribute that `DistributedDataParallel._set_params_and_buffers_to_ignore_for_model` sets."""


def own_names(model: nn.Module) -> frozenset[str]:
    """Returns the names of the parameters and buffers that workers do not share, with every name of a tied tensor."""
    listed = ignored_names(model)
    if not listed:
        return frozenset()
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    own = {id(tensor) for name, tensor in tensors if name in listed}
    return frozenset(name for name, tensor in tensors if id(tensor) in own)


def ignored_names(model: nn.Module) -> frozenset[str]:
    """Returns the names in the model's `IGNORED` attribute, including names that no parameter or buffer has."""
    return frozenset(getattr(model, IGNORED, None) or ())


def shared_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters that workers share, by name. Tied parameters appear once."""
    own = own_names(model)
    return {name: parameter for name, parameter in model.named_parameters() if name not in own}


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the shared parameters that require a gradient."""
    return {name: parameter for name, parameter in shared_parameters(model).items() if parameter.requires_grad}


def shared_buffers(model: nn.Module, modules: Iterable[tuple[str, nn.Module]] | None = None) -> dict[str, Tensor]:
    """Returns the buffers that workers share, by name. Tied buffers appear once.

    `modules` are the names and modules of `model.named_modules()` that have buffers, if they are known.
    """
    own, seen, buffers = own_names(model), set[int](), dict[str, Tensor]()
    for prefix, module in model.named_modules() if modules is None else modules:
        for key, buffer in module._buffers.items():
            if buffer is not None and id(buffer) not in seen:
                seen.add(id(buffer))
                buffers[f"{prefix}.{key}" if prefix else key] = buffer
    return {name: buffer for name, buffer in buffers.items() if name not in own} if own else buffers
