"""Computes a digest of a model's weights, to compare the results of two runs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from abtrain.lowrank.names import tensors_of, without_compiled
from abtrain.shards import gathered


def weights_digest(weights: nn.Module | Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 of the names, dtypes, shapes and bytes in a state dict or a model, in order of names.

    The 64 hexadecimal digits are equal for equal weights on any device. A factored model has the digest of its dense
    form. Name segments `_orig_mod`, which torch.compile adds, and entries that are not tensors are ignored. Collective
    in the group if weights are sharded.
    """
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    digest = hashlib.sha256()
    for name, value in sorted((without_compiled(name), value) for name, value in tensors_of(state).items()):
        tensor = gathered(value).detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
