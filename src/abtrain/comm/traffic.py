"""The vocabulary in which modules describe the collectives that they call.

Beside the code that sends, a function `sent_by_...` predicts its calls from shapes alone; its tensors may be on
PyTorch's meta device. `abtrain.comm.meter` counts the same bytes when they are sent.
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
        call: the kind of collective; `gradients` is an all-reduce that overlaps with backward.
        scope: the ranks that take part.
        nbytes: payload of one worker.
        rounds: the number of successive collectives that share `nbytes` evenly; 3 for PowerSGD's buckets.
        ready: for `gradients`, the share of the backward pass after which they can be sent.
    """

    call: Call
    scope: Scope
    nbytes: int
    rounds: int = 1
    ready: float = 1.0


Calls = tuple[Traffic, ...]
