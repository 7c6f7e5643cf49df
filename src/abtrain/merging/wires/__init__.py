"""From the name of a wire to the wire."""

from __future__ import annotations

from pkgutil import resolve_name

from abtrain.merging.wires.wire import Wire
from abtrain.recipes.wires import WireName


def make_wire(name: str) -> Wire:
    """The wire called `name` (see `WireName.parse`), with nothing kept yet.

    Raises:
        ConfigurationError: no wire is called so.
    """
    parsed = WireName.parse(name)
    wire: Wire = resolve_name(parsed.wire)(**parsed.values)
    return wire
