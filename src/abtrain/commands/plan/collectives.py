"""How long collectives take, and what they put on the wire.

The alpha-beta model of Hockney (1994), as Thakur, Rabenseifner and Gropp use it (Optimization of collective
communication operations in MPICH, 2005): a message of m bytes takes alpha + m beta. Here alpha is the latency of a
link, and m beta the time of its frames at the link's rate; adding the numbers up costs nothing. Links are full duplex,
and a collective goes at the pace of the slowest link that it needs.

With n workers and M bytes:

    ring           2 (n-1) rounds of M/n, the least that bandwidth allows (Patarasuk and Yuan, Bandwidth optimal
                   all-reduce algorithms for clusters of workstations, 2009); Gloo's way
    hierarchical   half a ring inside each node, a ring between the nodes, half a ring inside each node

Both move 2 (n-1)/n M a node on average. A ring is laid over all workers as it is. A broadcast is a binomial tree, an
all-gather a ring of n-1 rounds, an exchange n-1 messages one after another (all three: Thakur et al.).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from abtrain.comm.traffic import Call
from abtrain.errors import ConfigurationError
from abtrain.recipes.numbers import number_problems, whole_number_problems

SEGMENT = 1448
"""Bytes of data in a full Ethernet frame: MTU 1500, less 20 of IP, 20 of TCP and 12 of TCP's timestamps."""
HEADERS = 66
"""Bytes around the data of a frame: those 52, and 14 of Ethernet. An acknowledgement is nothing else."""
SEGMENTS_PER_ACK = 16
"""Received frames that are acknowledged together. RFC 1122 (4.2.3.2) asks for one acknowledgement in two full segments,
but Linux's receive offload puts up to 44 into one before TCP sees them; how many depends on the device."""


ENVELOPE = 260
"""Bytes that Gloo sends beside the data of a message: its header, and notices that buffers are ready, in frames of
their own. Measured over a loopback device; it matters for small messages only."""
RING_PARTS = 2
"""Messages that Gloo cuts the one of a ring's round into, so that adding up one hides the other."""


def wire_bytes(nbytes: float, messages: float = 1) -> float:
    """Bytes at an interface that sends `nbytes` in messages of equal size, and receives and acknowledges as many."""
    if nbytes <= 0 or messages <= 0:
        return 0.0
    frames = messages * math.ceil(nbytes / messages / SEGMENT)
    return nbytes + frames * HEADERS * (1 + 1 / SEGMENTS_PER_ACK) + messages * ENVELOPE


@dataclass(frozen=True)
class NodeLink:
    """How a node is joined to the others.

    Args:
        rate: bits per second, in each direction.
        latency: seconds until a message's first byte arrives.
    """

    rate: float
    latency: float = 0.0

    def problems(self) -> list[str]:
        """Returns the problems of the link; empty if there are none."""
        found = number_problems("rate", self.rate, above=0)
        if not (math.isfinite(self.latency) and self.latency >= 0):
            found.append(f"latency={self.latency} is not a finite number of at least 0: use seconds")
        return found

    def seconds(self, nbytes: float, messages: float = 1) -> float:
        """Time of some data, sent at once in so many messages of equal size."""
        return self.latency + 8 * wire_bytes(nbytes, messages) / self.rate


LOCAL = NodeLink(rate=100e9, latency=2e-6)
"""Between the workers of one node: memory, or an NVLink."""


@dataclass(frozen=True)
class Cluster:
    """Nodes of `per_node` workers each, joined by links of which the slowest sets the pace.

    Args:
        nodes: how many.
        link: of the slowest node.
        per_node: workers a node.
        local: between the workers of a node.

    Raises:
        ConfigurationError: all that is wrong with it, at once.
    """

    nodes: int
    link: NodeLink
    per_node: int = 1
    local: NodeLink = LOCAL

    def __post_init__(self) -> None:
        found = whole_number_problems("nodes", self.nodes, 1) + whole_number_problems("per_node", self.per_node, 1)
        found += self.link.problems() + self.local.problems()
        if found:
            raise ConfigurationError(found)

    @property
    def workers(self) -> int:
        return self.nodes * self.per_node

    @property
    def pace(self) -> NodeLink:
        """The link that holds up a round in which everybody sends as much."""
        return self.link if self.nodes > 1 else self.local

    @property
    def swift(self) -> Cluster:
        """The same without latency: what bytes alone take."""
        return replace(self, link=NodeLink(self.link.rate), local=NodeLink(self.local.rate))

    def part(self, workers: int) -> Cluster:
        """As many of its workers as sit side by side: those of one node, or of several whole nodes."""
        if workers <= self.per_node:
            return Cluster(1, self.link, workers, self.local)
        return Cluster(-(-workers // self.per_node), self.link, self.per_node, self.local)


class Cost(NamedTuple):
    """The cost of one collective: seconds, and bytes that an average node puts on its link, headers included."""

    seconds: float
    wire: float


def ring(cluster: Cluster, nbytes: float) -> Cost:
    """All-reduce over a ring of all workers: a node sends to one neighbour, whatever runs on it."""
    n = cluster.workers
    return _rounds(cluster, 2 * (n - 1), nbytes / n)


def hierarchical(cluster: Cluster, nbytes: float) -> Cost:
    """All-reduce by a ring between the nodes, with half a ring inside each node before it and after it."""
    between = ring(Cluster(cluster.nodes, cluster.link), nbytes)
    inside = 2 * (cluster.per_node - 1) * cluster.local.seconds(nbytes / cluster.per_node)
    return Cost(between.seconds + inside, between.wire)


ALL_REDUCES: dict[str, Callable[[Cluster, float], Cost]] = {"ring": ring, "hierarchical": hierarchical}


def cost_of(call: Call, cluster: Cluster, nbytes: float, algorithm: str = "ring") -> Cost:
    """The cost of one collective over all workers of a cluster.

    Args:
        call: which.
        cluster: over whom.
        nbytes: payload of one worker, as the meter counts it.
        algorithm: of all-reduces, a key of `ALL_REDUCES`.
    """
    if cluster.workers == 1 or nbytes == 0:
        return Cost(0.0, 0.0)
    if call in ("all_reduce", "gradients"):
        return ALL_REDUCES[algorithm](cluster, nbytes)
    return _OTHERS[call](cluster, nbytes)


def _all_gather(cluster: Cluster, nbytes: float) -> Cost:
    return _rounds(cluster, cluster.workers - 1, nbytes)


def _exchange(cluster: Cluster, nbytes: float) -> Cost:
    """Everybody to everybody: what leaves a node is what all its workers send to the workers of others."""
    n, inside = cluster.workers, cluster.per_node
    piece = nbytes / (n - 1)
    leaving = inside * (n - inside)
    wire = wire_bytes(leaving * piece, leaving)
    local = (n - 1) * cluster.local.seconds(piece)
    return Cost(max((n - 1) * cluster.pace.latency + 8 * wire / cluster.link.rate, local), wire)


def _broadcast(cluster: Cluster, nbytes: float) -> Cost:
    seconds = math.ceil(math.log2(cluster.nodes)) * cluster.link.seconds(nbytes)
    seconds += math.ceil(math.log2(cluster.per_node)) * cluster.local.seconds(nbytes)
    return Cost(seconds, (cluster.nodes - 1) / cluster.nodes * wire_bytes(nbytes))


_OTHERS: dict[Call, Callable[[Cluster, float], Cost]] = {
    "all_gather": _all_gather,
    "exchange": _exchange,
    "broadcast": _broadcast,
}


def _rounds(cluster: Cluster, count: int, message: float) -> Cost:
    """So many rounds in which every node sends `message` bytes to the next."""
    wire = count * wire_bytes(message, RING_PARTS) if cluster.nodes > 1 else 0.0
    return Cost(count * cluster.pace.seconds(message, RING_PARTS), wire)
