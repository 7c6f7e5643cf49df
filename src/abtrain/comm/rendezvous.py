"""Runs collectives between threads: each thread contributes tensors, and all threads get the result."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from torch import Tensor

from abtrain.errors import PeerLostError, RanksDisagreeError

# The tensors of each rank of the scope, in rank order -> the tensors that every rank gets.
Combine = Callable[[Sequence[Sequence[Tensor]]], list[Tensor]]


@dataclass(eq=False)
class _Post:
    """One rank's call of a collective, and the call's result."""

    rank: int
    ranks: tuple[int, ...]
    call: str
    tensors: Sequence[Tensor]
    outcome: list[Tensor] | RanksDisagreeError | None = None

    @property
    def layout(self) -> list[str]:
        return [f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in self.tensors]


class Rendezvous:
    """Runs collectives between threads, for scopes that may overlap.

    A rank posts its call and waits. The last rank of the scope to post its call completes the call for all ranks. If a
    rank leaves, the ranks that wait for it stop waiting. A rank waits at most `timeout` seconds for the others.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._posts: dict[int, _Post] = {}
        self._gone: dict[int, str] = {}
        self._changed = threading.Condition()

    def meet(
        self, rank: int, ranks: tuple[int, ...], call: str, tensors: Sequence[Tensor], combine: Combine, where: str
    ) -> list[Tensor]:
        """Joins a collective of `ranks` with `tensors`, and returns the result of `combine`.

        All ranks share the returned tensors: copy them before writing to them. `where` gives the rank's step and
        phase, for the message about a lost worker.

        Raises:
            RanksDisagreeError: another rank made a different call, or passed different shapes or dtypes.
            PeerLostError: another rank left, or did not join in time.
        """
        post = _Post(rank, ranks, call, tensors)
        with self._changed:
            self._posts[rank] = post
            try:
                self._settle(post, combine)
                self._changed.wait_for(lambda: post.outcome is not None or self._missed(post), self._timeout)
            finally:
                del self._posts[rank]
            if post.outcome is None:
                why = self._why_alone(post)
                raise PeerLostError(f"rank {rank} lost a peer in {call} over ranks {list(ranks)}, {where}: {why}")
            if isinstance(post.outcome, RanksDisagreeError):
                raise post.outcome
            return post.outcome

    def leave(self, rank: int, why: str) -> None:
        """Informs the other ranks that `rank` makes no more calls. `why` completes "rank R ..." in their errors."""
        with self._changed:
            self._gone[rank] = why
            self._changed.notify_all()

    def _settle(self, post: _Post, combine: Combine) -> None:
        """Gives the collective's ranks its result if `post` is the last call, or an error if calls do not match."""
        waiting = self._waiting(post.ranks)
        for peer in waiting:
            # Each of the two waits for the other in a collective that the other has not called.
            if peer.ranks != post.ranks and post.rank in peer.ranks:
                self._refuse(self._waiting({*post.ranks, *peer.ranks}), post, peer)
                return
        # The others wait in a collective of another scope first.
        peers = [peer for peer in waiting if peer.ranks == post.ranks]
        if len(peers) < len(post.ranks):
            return
        for peer in peers:
            if (peer.call, peer.layout) != (peers[0].call, peers[0].layout):
                self._refuse(peers, peers[0], peer)
                return
        outcome = combine([peer.tensors for peer in peers])
        for peer in peers:
            peer.outcome = outcome
        self._changed.notify_all()

    def _refuse(self, posts: Sequence[_Post], one: _Post, other: _Post) -> None:
        for post in posts:
            post.outcome = RanksDisagreeError(
                f"{_call_of(one, other)}, but {_call_of(other, one)}: all ranks of a scope must make the same calls "
                "in the same order"
            )
        self._changed.notify_all()

    def _waiting(self, ranks: Iterable[int]) -> list[_Post]:
        """Returns the calls of these ranks without an outcome. A call stays listed until its rank wakes up."""
        return [self._posts[r] for r in ranks if r in self._posts and self._posts[r].outcome is None]

    def _missed(self, post: _Post) -> list[int]:
        """Returns the ranks of the call that have left, in order of leaving: the first may be why others left."""
        return [r for r in self._gone if r in post.ranks]

    def _why_alone(self, post: _Post) -> str:
        missed = self._missed(post)
        if missed:
            return f"rank {missed[0]} {self._gone[missed[0]]}"
        here = {post.rank, *(p.rank for p in self._waiting(post.ranks))}
        late = [r for r in post.ranks if r not in here]
        return f"ranks {late} did not call it within {self._timeout:g} s"


def _call_of(post: _Post, other: _Post) -> str:
    """Describes `post` by the first tensor in which it differs from `other`."""
    pairs = list(zip_longest(post.layout, other.layout, fillvalue="nothing"))
    mine = next((a for a, b in pairs if a != b), pairs[0][0] if pairs else "nothing")
    return f"rank {post.rank} called {post.call} over ranks {list(post.ranks)} with {mine}"
