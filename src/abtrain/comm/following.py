"""Copies the first rank's buffers to the other ranks, as DDP does, on torch.distributed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from abtrain.comm.buckets import pack, unpack
from abtrain.comm.checksums import as_bytes, fingerprint
from abtrain.comm.communicator import Calls, Scope, Traffic
from abtrain.comm.data_parallel import REMEDY, Layouts
from abtrain.comm.link import Link
from abtrain.errors import RanksDisagreeError

_MARK = 0x3A7E_91C4_D05B_682F
"""The first number of a message that contains no buffers. Random buffers begin with it with a probability of 2**-64."""
_MARK_BYTES = 16


class Following:
    """Keeps a module's buffers on all ranks of a link equal to those on the first rank.

    A message of an unexpected size kills the receiver's process without an error, or its bytes are misread. So after a
    change of shapes, a rank sends or receives one more message of each old size. One of these messages contains a mark
    and a fingerprint of the first rank's new layouts. On CPUs, a rank whose buffers have not changed finds the mark. On
    accelerators it does not look for it, since reading a message would block.

    The initial `buffers` must have the same names, shapes and dtypes on all ranks.
    """

    def __init__(self, link: Link, buffers: Mapping[str, Tensor]) -> None:
        self._link = link
        self._layouts = Layouts(buffers)
        self._device = next((buffer.device for buffer in buffers.values()), torch.device("cpu"))
        self._sizes = [bucket.flat.nbytes for bucket in pack(list(buffers.values()), widen=False)]

    def follow(self, named: Mapping[str, Tensor]) -> None:
        """Overwrites buffers, by name, with those of the first rank. Collective over the link.

        Raises:
            RanksDisagreeError: buffers of this rank and of the first rank changed their shapes differently.
        """
        first, buffers = self._link.ranks[0], list(named.values())
        changed = self._layouts.changes(named)
        if changed:
            self._agree(changed)
        buckets = pack(buffers, widen=False)
        self._sizes = [bucket.flat.nbytes for bucket in buckets]
        for place, bucket in enumerate(buckets):
            self._link.broadcast(bucket.flat, first)
            if place == self._place and bucket.flat.device.type == "cpu" and _mark_in(bucket.flat)[0] == _MARK:
                raise RanksDisagreeError(
                    f"buffers have changed on rank {first}, whose log names them, but not on rank {self._link.rank}. "
                    f"{REMEDY}"
                )
        for buffer, received in zip(buffers, unpack(buckets, buffers), strict=True):
            buffer.copy_(received)

    @property
    def _place(self) -> int | None:
        """Returns the index of the first message that is large enough for the mark; None if there is none."""
        return next((place for place, nbytes in enumerate(self._sizes) if nbytes >= _MARK_BYTES), None)

    def _agree(self, changed: str) -> None:
        if self._place is None:
            return
        mark = [_MARK, fingerprint(*self._layouts.known.items())]
        first, received = self._link.ranks[0], mark
        for place, nbytes in enumerate(self._sizes):
            message = torch.zeros(nbytes, dtype=torch.uint8, device=self._device)
            if place == self._place and self._link.rank == first:
                message[:_MARK_BYTES] = as_bytes(torch.tensor(mark, dtype=torch.int64, device=self._device))
            self._link.broadcast(message, first)
            received = _mark_in(message) if place == self._place else received
        if received != mark:
            raise RanksDisagreeError(f"buffer {changed} on rank {self._link.rank}, but not on rank {first}. {REMEDY}")


def sent_by_follow(buffers: Sequence[Tensor], scope: Scope) -> Calls:
    """Returns the collective calls of one `Following.follow` if no buffer has changed its shape."""
    return tuple(Traffic("broadcast", scope, bucket.flat.nbytes) for bucket in pack(buffers, widen=False))


def _mark_in(message: Tensor) -> list[int]:
    numbers: list[int] = as_bytes(message)[:_MARK_BYTES].view(torch.int64).tolist()
    return numbers
