"""From the name of a wire to the wire."""

from __future__ import annotations

from abtrain.comm.low_rank_wire import LowRankWire
from abtrain.comm.wire import DirectWire, Wire
from abtrain.sync import WireName


def make_wire(name: str) -> Wire:
    """The wire called `name` (see `WireName.parse`), with nothing learnt yet.

    Raises:
        ConfigurationError: no wire is called so.
    """
    parts = WireName.parse(name)
    return LowRankWire(parts.rank, parts.code) if parts.rank else DirectWire(parts.code, parts.reply)
