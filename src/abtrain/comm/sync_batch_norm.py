"""SyncBatchNorm layers that talk to the ranks of a scope, and can be copied and saved all the while.

A process group can be neither copied nor pickled, and with it in a layer nor can the model. So a layer that is pointed
at a group changes its class to one that finds the group outside of the layer, and is a plain layer again in a copy.
"""

from __future__ import annotations

import functools
from collections.abc import MutableMapping
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import nn

_GROUPS: MutableMapping[nn.Module, dist.ProcessGroup | None] = WeakKeyDictionary()
"""Of every layer that is pointed at a group; None: at the world."""
_OWN = "process_group"
"""The layer's own group stays in it under this name, and is hidden by a property."""
_KIND = "_kind_before"
"""In a class of layers that are pointed at a group: the class before."""


def point_at(layer: nn.SyncBatchNorm, group: dist.ProcessGroup | None) -> None:
    """From now on the layer takes its statistics over a group (None: the world)."""
    _GROUPS[layer] = group
    kind: Any = type(layer)
    if _KIND not in vars(kind):
        layer.__class__ = _pointed(kind)


def release(layer: nn.SyncBatchNorm) -> None:
    """The layer is what it was before `point_at`: its class, and the group it had."""
    _GROUPS.pop(layer, None)
    layer.__class__ = vars(type(layer)).get(_KIND, type(layer))


def _group_of(layer: nn.Module) -> Any:
    return _GROUPS.get(layer, vars(layer).get(_OWN))


def _set_group(layer: nn.Module, group: Any) -> None:
    vars(layer)[_OWN] = group


@functools.cache
def _pointed(kind: Any) -> Any:
    """The class of layers of this kind that are pointed at a group. It looks like the kind itself."""

    def as_plain(layer: nn.Module, protocol: Any) -> Any:
        # Later protocols insist on the object's own class.
        made_by, args, *rest = kind.__reduce_ex__(layer, 1)
        plain = tuple(kind if arg is type(layer) else arg for arg in args)
        return made_by, plain, *({**part, _OWN: None} if isinstance(part, dict) else part for part in rest)

    looks = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    changed = {_OWN: property(_group_of, _set_group), "__reduce_ex__": as_plain}
    return type(kind.__name__, (kind,), {_KIND: kind, **looks, **changed})
