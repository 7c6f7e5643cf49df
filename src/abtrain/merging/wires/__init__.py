"""Wires, built by name."""

from __future__ import annotations

from pkgutil import resolve_name

from abtrain.merging.wires.wire import Wire
from abtrain.recipes.wires import WireName


def make_wire(name: str) -> Wire:
    """Returns a new wire of that name (see `WireName.parse`).

    Raises:
        ConfigurationError: no wire has this name.
    """
    parsed = WireName.parse(name)
    wire: Wire = resolve_name(parsed.wire)(**parsed.values)
    return wire
