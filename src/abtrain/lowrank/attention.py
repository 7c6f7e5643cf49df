"""Computes self-attention of nn.MultiheadAttention through the factors of its weights, without rebuilding these."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from abtrain.lowrank.layers import Factored, project


class LowRankAttention(Factored):
    """The base class of nn.MultiheadAttention with a factored weight.

    Self-attention of batches computes with the factors if the weights of the attention are not asked for. In all other
    cases, PyTorch's own method reads the weights, which are rebuilt then.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        masks = (key_padding_mask, attn_mask)
        if need_weights or not (query is key is value) or not _can_attend(self, query, *masks, is_causal):
            others: tuple[Any, ...] = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            result: tuple[Tensor, Tensor | None] = super().forward(query, key, value, *others)
            return result
        return _self_attention(self, query, *masks, is_causal), None


def _can_attend(
    module: Any, x: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None, is_causal: bool
) -> bool:
    """Returns whether `_self_attention` takes the arguments. PyTorch's method explains what is wrong with others."""
    if x.is_nested or x.ndim != 3 or x.shape[-1] != module.embed_dim or (is_causal and attn_mask is None):
        return False
    if not module._qkv_same_embed_dim or module.bias_k is not None or module.add_zero_attn:
        return False
    batch, length = x.shape[:2] if module.batch_first else x.shape[1::-1]
    shapes = ((length, length), (batch * module.num_heads, length, length))
    padding_fits = key_padding_mask is None or tuple(key_padding_mask.shape) == (batch, length)
    mask_fits = attn_mask is None or tuple(attn_mask.shape) in shapes
    masks = [mask for mask in (key_padding_mask, attn_mask) if mask is not None]
    known = all(mask.dtype == masks[0].dtype and mask.dtype in (torch.bool, x.dtype) for mask in masks)
    return padding_fits and mask_fits and known


def _self_attention(
    module: Any, x: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None, is_causal: bool
) -> Tensor:
    """Returns the attention of tokens x to each other: (N, L, E), or (L, N, E) unless `batch_first`."""
    heads: int = module.num_heads
    split = project(module, "in_proj_weight", x, module.in_proj_bias).unflatten(-1, (3, heads, -1))
    query, key, value = (split if module.batch_first else split.transpose(0, 1)).permute(2, 0, 3, 1, 4)
    is_causal = is_causal and key_padding_mask is None
    mask = None if attn_mask is None or is_causal else _added(attn_mask, x)
    if mask is not None and mask.ndim == 3:
        mask = mask.unflatten(0, (-1, heads))
    if key_padding_mask is not None:
        padding = _added(key_padding_mask, x)[:, None, None]
        mask = padding if mask is None else mask + padding
    dropout = module.dropout if module.training else 0.0
    attended = F.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal)  # (N, heads, L, E / heads)
    joined = attended.permute(*((0, 2) if module.batch_first else (2, 0)), 1, 3).flatten(2)
    return project(module.out_proj, "weight", joined, module.out_proj.bias)


def _added(mask: Tensor, x: Tensor) -> Tensor:
    """Returns a mask as numbers to be added: -inf where a Boolean mask forbids attention."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=x.dtype).masked_fill_(mask, float("-inf"))
