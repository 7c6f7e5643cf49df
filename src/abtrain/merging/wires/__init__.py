"""From the name of a wire to the wire."""

from __future__ import annotations

from abtrain.merging.wires.direct import DirectWire, Wire
from abtrain.merging.wires.low_rank import LowRankWire
from abtrain.recipes.sync import WireName


def make_wire(name: str) -> Wire:
    """The wire called `name` (see `WireName.parse`), with nothing learnt yet.

    Raises:
        ConfigurationError: no wire is called so.
    """
    parts = WireName.parse(name)
    return LowRankWire(parts.rank, parts.code) if parts.rank else DirectWire(parts.code, parts.reply)
