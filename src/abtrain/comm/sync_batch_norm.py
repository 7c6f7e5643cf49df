"""Lets SyncBatchNorm layers communicate over a scope, in a model that can still be copied and saved.

A process group cannot be copied or pickled, nor can a layer that contains one. So the layers get a subclass that finds
the group outside the layer. Copies of such a layer are plain layers again.
"""

from __future__ import annotations

import functools
from collections.abc import MutableMapping
from contextlib import ExitStack
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import nn

from abtrain.comm.link import Link
from abtrain.errors import ConfigurationError

_GROUPS: MutableMapping[nn.Module, dist.ProcessGroup | None] = WeakKeyDictionary()
"""For each layer that communicates over a scope, the scope's process group; None: the world."""
_OWN = "process_group"
"""The attribute of a layer's own group, hidden by a property of the subclass."""
_KIND = "_kind_before"
"""The attribute of the subclass that contains the original class."""


def point_sync_batch_norm(module: nn.Module, link: Link, alone: bool) -> ExitStack:
    """Makes every SyncBatchNorm compute statistics over the ranks of the link, until the returned stack is closed.

    Otherwise a SyncBatchNorm communicates with the whole world at every step, which groups are meant to avoid.

    Raises:
        ConfigurationError: the scope is one rank of a larger world (`alone` is False).
    """
    layers = [layer for layer in module.modules() if isinstance(layer, nn.SyncBatchNorm)]
    if layers and len(link.ranks) == 1 and not alone:
        raise ConfigurationError(
            f"the model has {len(layers)} SyncBatchNorm layers, but groups of one worker have no other worker to "
            "synchronize with: use BatchNorm layers, or a group_size of at least 2"
        )
    pointed = ExitStack()
    for layer in layers:
        _GROUPS[layer] = link.group
        kind: Any = type(layer)
        if _KIND not in vars(kind):
            layer.__class__ = _pointed(kind)
        pointed.callback(_release, layer)
    return pointed


def _release(layer: nn.SyncBatchNorm) -> None:
    _GROUPS.pop(layer, None)
    layer.__class__ = vars(type(layer)).get(_KIND, type(layer))


def _group_of(layer: nn.Module) -> Any:
    return _GROUPS.get(layer, vars(layer).get(_OWN))


def _set_group(layer: nn.Module, group: Any) -> None:
    vars(layer)[_OWN] = group


@functools.cache
def _pointed(kind: Any) -> Any:
    """Returns a subclass of `kind`, with the same name, that finds its process group outside the layer."""

    def as_plain(layer: nn.Module, protocol: Any) -> Any:
        # Later pickle protocols require the object's actual class.
        made_by, args, *rest = kind.__reduce_ex__(layer, 1)
        plain = tuple(kind if arg is type(layer) else arg for arg in args)
        return made_by, plain, *({**part, _OWN: None} if isinstance(part, dict) else part for part in rest)

    looks = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    changed = {_OWN: property(_group_of, _set_group), "__reduce_ex__": as_plain}
    return type(kind.__name__, (kind,), {_KIND: kind, **looks, **changed})
