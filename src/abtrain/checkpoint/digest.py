"""The digest of weights, by which two runs are compared."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from abtrain.lowrank.names import tensors_of, without_compiled


def weights_digest(weights: nn.Module | Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a state dict, in the order of names.

    Names count without the segments `_orig_mod` that torch.compile adds. Entries that are no tensors do not count.

    Args:
        weights: a state dict or a model; factored weights count as the products W = A B.

    Returns:
        64 hexadecimal digits; equal for equal weights on any device.
    """
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    digest = hashlib.sha256()
    for name, value in sorted((without_compiled(name), value) for name, value in tensors_of(state).items()):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
