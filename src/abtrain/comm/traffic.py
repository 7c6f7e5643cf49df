"""The vocabulary in which modules describe the collectives that they call.

A function `sent_by_...` beside the code that sends gives its calls from shapes alone; its tensors may be on PyTorch's
meta device. `abtrain.comm.meter` counts the same bytes when they are sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from abtrain.comm.communicator import Scope

Call = Literal["all_reduce", "all_gather", "exchange", "broadcast", "gradients"]


@dataclass(frozen=True)
class Traffic:
    """One collective, or one bucket of DDP's gradients.

    Attributes:
        call: how it is sent. `gradients` is an all-reduce that overlaps with backward.
        scope: over whom.
        nbytes: payload of one worker.
        rounds: collectives one after another that `nbytes` are spread over evenly; PowerSGD's buckets take three.
        ready: of `gradients`, the share of the backward pass after which they can be sent.
    """

    call: Call
    scope: Scope
    nbytes: int
    rounds: int = 1
    ready: float = 1.0


Calls = tuple[Traffic, ...]
