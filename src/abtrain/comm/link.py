"""The ranks of one scope on torch.distributed: how a collective is started, awaited, counted and timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from abtrain.comm.checksums import as_bytes
from abtrain.comm.communicator import Pending
from abtrain.comm.meter import Meter, Spans
from abtrain.comm.peers import Peers
from abtrain.errors import PeerLostError


@dataclass(frozen=True)
class Link:
    """The ranks of one scope as torch.distributed knows them (`group` None: the world), their meter, and all peers."""

    rank: int
    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None
    spans: Spans
    meter: Meter
    peers: Peers | None = None

    def carry(self, name: str, nbytes: int, collective: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Runs one collective to its end, timed, and counts `nbytes`; skips it if there is nothing to do."""
        self.start(name, nbytes, collective, *args, **kwargs).wait()

    def start(self, name: str, nbytes: int, collective: Callable[..., Any], *args: Any, **kwargs: Any) -> Pending[None]:
        """As `carry`, but only what is left to wait for at the end is waited for, and timed."""
        if len(self.ranks) == 1 or nbytes == 0:
            return Pending(lambda: None)
        self.meter.count(nbytes, self.spans)
        work = self.launch(name, collective, *args, **kwargs)

        def finish() -> None:
            with self.meter.waiting():
                self.wait(name, work)

        return Pending(finish)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Overwrites a contiguous tensor of any dtype with that of world rank `source`."""
        self.carry("broadcast", tensor.nbytes, dist.broadcast, as_bytes(tensor), src=source)

    def launch(self, name: str, collective: Callable[..., Any], *args: Any, **kwargs: Any) -> dist.Work:
        """Starts a collective. What is wrong with its arguments comes out as PyTorch's own error."""
        try:
            work: dist.Work = collective(*args, group=self.group, async_op=True, **kwargs)
        except dist.DistError as error:
            raise self.peer_lost(name) from error
        return work

    def wait(self, name: str, work: dist.Work | torch.futures.Future[Any]) -> None:
        """Waits for a collective under way. By now its arguments are good, so what fails is a peer."""
        try:
            work.wait()
        except RuntimeError as error:
            raise self.peer_lost(name) from error

    def peer_lost(self, name: str) -> PeerLostError:
        """The error to raise when a collective failed because of another worker."""
        told = "" if self.peers is None else f"{self.peers.roll_call()}. "
        return PeerLostError(
            f"rank {self.rank} lost a peer in {name} over ranks {list(self.ranks)}, {self.meter.where}: a worker died "
            f"or did not answer in time. {told}The first error in the other workers' output tells why"
        )
