"""Starts, awaits, counts and times collectives of one scope on torch.distributed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from abtrain.comm.checksums import as_bytes
from abtrain.comm.communicator import Pending
from abtrain.comm.meter import Meter, Spans
from abtrain.comm.peers import Peers
from abtrain.errors import PeerLostError


@dataclass(frozen=True)
class Link:
    """Runs collectives in a scope's process group (None: the world). `meter` counts them, `peers` names lost ranks.

    `spans` and `senders` are those of `Meter.count`.
    """

    rank: int
    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None
    spans: Spans
    meter: Meter
    peers: Peers | None = None
    senders: int = 1

    def start(
        self, name: str, nbytes: int, collective: Callable[..., Any], *args: Any, outcome: Any = None, **kwargs: Any
    ) -> Pending[Any]:
        """Starts a collective and counts `nbytes`. Its `wait` returns `outcome`; only the time in `wait` is measured.

        A collective with nothing to send is skipped.
        """
        if len(self.ranks) == 1 or nbytes == 0:
            return Pending(lambda: outcome)
        self.meter.count(nbytes, self.spans, self.senders)
        launched = self.launch(name, collective, *args, **kwargs)

        def finish() -> Any:
            with self.meter.waiting():
                launched.wait()
            return outcome

        return Pending(finish)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Overwrites a contiguous tensor of any dtype with the tensor of world rank `source`."""
        self.start("broadcast", tensor.nbytes, dist.broadcast, as_bytes(tensor), src=source).wait()

    def launch(self, name: str, collective: Callable[..., Any], *args: Any, **kwargs: Any) -> Pending[None]:
        """Starts a collective without counting or timing it. Wrong arguments raise PyTorch's own error."""
        with self.naming_lost_peer(name, dist.DistError):
            work: dist.Work = collective(*args, group=self.group, async_op=True, **kwargs)

        def finish() -> None:
            # The arguments have been accepted, so any failure is due to another worker.
            with self.naming_lost_peer(name, RuntimeError):
                work.wait()

        return Pending(finish)

    @contextmanager
    def naming_lost_peer(self, name: str, kind: type[RuntimeError]) -> Iterator[None]:
        """Converts errors of type `kind`, raised inside the context, into a PeerLostError for the collective `name`."""
        try:
            yield
        except kind as error:
            raise self.peer_lost(name) from error

    def peer_lost(self, name: str) -> PeerLostError:
        """Returns the error for a collective that failed because of another worker."""
        missing = "" if self.peers is None else f"{self.peers.roll_call()}. "
        return PeerLostError(
            f"rank {self.rank} lost a peer in {name} over ranks {list(self.ranks)}, {self.meter.where}: a worker died, "
            f"ended early or did not answer in time. {missing}Look at the first error in the other workers' output"
        )
