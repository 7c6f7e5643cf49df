"""Cuts tensors into the pieces of a group's workers, and gives access to the shards of models under FSDP2.

FSDP2 (`torch.distributed.fsdp.fully_shard`) turns parameters into DTensors: each worker stores one piece of each. The
pieces of `piece` have the same bounds, so a worker's shard is the piece that it merges.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def piece(tensor: Tensor, place: int, count: int) -> Tensor:
    """Returns one of `count` pieces of a tensor, as a view. The first place gets all of a tensor without dimensions."""
    if tensor.ndim == 0:
        return tensor if place == 0 else tensor.view(1)[1:]
    size = -(-len(tensor) // count)
    return tensor[place * size : (place + 1) * size]


def cut(tensors: Mapping[str, Tensor], place: int, count: int) -> dict[str, Tensor]:
    """Returns the piece of each tensor for one of `count` places, as a view of it."""
    return {name: piece(tensor, place, count) for name, tensor in tensors.items()} if count > 1 else dict(tensors)


def whole(pieces: Sequence[Tensor]) -> Tensor:
    """Returns the tensor whose pieces, in the order of places, are given."""
    return pieces[0] if len(pieces) == 1 or pieces[0].ndim == 0 else torch.cat(list(pieces))


def is_sharded(tensor: Any) -> bool:
    """Returns whether a tensor is a DTensor, of which each worker stores one part."""
    # Importing the module takes half a second. If it is not imported yet, no tensor is sharded.
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Returns the data of a tensor, or of this worker's shard of it. Shares memory, but no autograd version counter."""
    held: Any = tensor
    if not is_sharded(tensor):
        return tensor.data
    with torch.no_grad():
        shard: Tensor = held.to_local()
    return shard.data


def undivided(tensor: Tensor) -> Tensor:
    """Returns the whole of a tensor on all workers that have a shard of it. Collective over them."""
    held: Any = tensor
    full: Tensor = held.full_tensor() if is_sharded(tensor) else tensor
    return full


def divided_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """Returns a tensor, which all workers have whole, sharded as a parameter is. Sends nothing."""
    if not is_sharded(parameter):
        return tensor
    held: Any = parameter
    distribute = sys.modules["torch.distributed.tensor"].distribute_tensor
    divided: Tensor = distribute(tensor, held.device_mesh, held.placements, src_data_rank=None)
    return divided


def like(parameter: Tensor, shard: Tensor) -> Tensor:
    """Returns a tensor that is sharded like a parameter, and has `shard` as this worker's part. Sends nothing."""
    held: Any = parameter
    sharded: Tensor = type(held.data).from_local(
        shard, held.device_mesh, held.placements, run_check=False, shape=held.shape, stride=held.stride()
    )
    return sharded


def is_like(parameter: Tensor, tensor: Tensor) -> bool:
    """Returns whether a tensor is sharded like a sharded parameter."""
    one: Any = parameter
    other: Any = tensor
    return is_sharded(other) and (one.shape, one.placements) == (other.shape, other.placements)


def have_one_form(weight: Tensor, tensor: Tensor) -> bool:
    """Returns whether a tensor has the shape of a weight, and is sharded like it if the weight is sharded."""
    if is_sharded(weight) or is_sharded(tensor):
        return is_sharded(weight) and is_like(weight, tensor)
    return weight.shape == tensor.shape


def gathered(tensor: Tensor) -> Tensor:
    """Returns a whole tensor: a sharded one as a copy on the CPU. Collective in the group for a sharded tensor."""
    held: Any = tensor.detach()
    complete: Tensor = held.full_tensor().cpu() if is_sharded(tensor) else tensor
    return complete


def fit_to(state: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Returns the state dict of a whole model so that a sharded model can load it. Sends nothing.

    The names and shapes may differ from the model's, as `load_state_dict` finds such errors.
    """
    held = {name: tensor for name, tensor in model.state_dict().items() if is_sharded(tensor)}
    return {name: _fit(value, held.get(name)) for name, value in state.items()}


def _fit(value: Any, parameter: Any) -> Any:
    whole_value = isinstance(value, Tensor) and not is_sharded(value)
    if parameter is None or not whole_value or value.shape != parameter.shape:
        return value
    mesh = parameter.device_mesh
    return like(parameter, piece(value, mesh.get_local_rank(), mesh.size()).to(parameter.device, parameter.dtype))


def fsdp_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields the modules to which `fully_shard` was applied, with their names."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        yield from ((name, one) for name, one in model.named_modules() if isinstance(one, fsdp.FSDPModule))


def is_first_fsdp(module: nn.Module) -> bool:
    """Returns whether a module is the wrapper class of PyTorch's first FSDP."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel)


def reshard(model: nn.Module) -> None:
    """Makes a model's parameters its shards again, after a forward pass that has gathered whole weights. Sends nothing.

    FSDP2 keeps the whole weights of the outermost module until the backward pass. Without one, the model would go on
    to use them, whatever is written to the shards.
    """
    for _, module in fsdp_modules(model):
        module.reshard()
