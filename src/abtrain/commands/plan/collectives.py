"""Predicts how many seconds a collective takes and how many bytes it sends over the links.

The predictions use the alpha-beta model of Hockney (1994). They apply it as Thakur, Rabenseifner and Gropp do
(Optimization of collective communication operations in MPICH, 2005). A message of m bytes takes alpha + m beta. Here
alpha is the latency of a link, and m beta is the time of the message's frames at the link's rate. Additions take no
time. Links are full duplex, and the slowest link that a collective uses determines its time.

An all-reduce of M bytes uses one of two algorithms:

    ring           a ring of all n workers in the order of their ranks: 2 (n-1) rounds of M/n, which is optimal in
                   bandwidth (Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms for clusters of workstations,
                   2009); Gloo uses it
    hierarchical   a reduce-scatter inside each node, a ring of the n nodes, an all-gather inside each node

In both, each node sends 2 (n-1)/n M over its link. A broadcast uses a binomial tree. An all-gather uses a ring of n-1
rounds. An exchange between all pairs of workers sends n-1 messages in sequence (Thakur et al.).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from abtrain.comm.communicator import Call, Scope
from abtrain.errors import ConfigurationError
from abtrain.recipes.numbers import number_problems, whole_number_problems

SEGMENT = 1448
"""Bytes of data in a full Ethernet frame: MTU 1500 minus 20 for IP, 20 for TCP and 12 for TCP's timestamps."""
HEADERS = 66
"""Bytes of headers in a frame: the 52 above, and 14 for Ethernet. An acknowledgement consists only of these."""
SEGMENTS_PER_ACK = 16
"""Received frames per acknowledgement. RFC 1122 (4.2.3.2) requires one per two full segments, but Linux's receive
offload combines up to 44 segments before TCP sees them, depending on the device."""
ENVELOPE = 260
"""Bytes that Gloo sends in addition to the data of a message, in separate frames: a header, and notices that buffers
are ready. Measured over a loopback device; it only matters for small messages."""
RING_PARTS = 2
"""The number of messages into which Gloo splits a round of a ring. It adds one while it receives the next."""


def wire_bytes(nbytes: float, messages: float = 1) -> float:
    """Returns the bytes that a network interface sends for `nbytes` of data in a number of messages of equal size.

    The bytes include headers, and acknowledgements for the same amount of received data.
    """
    if nbytes <= 0 or messages <= 0:
        return 0.0
    frames = messages * math.ceil(nbytes / messages / SEGMENT)
    return nbytes + frames * HEADERS * (1 + 1 / SEGMENTS_PER_ACK) + messages * ENVELOPE


@dataclass(frozen=True)
class NodeLink:
    """A network link of a node.

    Args:
        rate: the rate in bits per second, in each direction.
        latency: the seconds until the first byte of a message arrives.
    """

    rate: float
    latency: float = 0.0

    def problems(self) -> list[str]:
        """Returns a message for each problem of the link; empty if there are none."""
        found = number_problems("rate", self.rate, above=0)
        if not (math.isfinite(self.latency) and self.latency >= 0):
            found.append(f"latency={self.latency} is out of range: use a finite number of seconds of at least 0")
        return found

    def seconds(self, nbytes: float, messages: float = 1) -> float:
        """Returns the seconds to send `nbytes` of data in a number of messages of equal size."""
        return self.latency + 8 * wire_bytes(nbytes, messages) / self.rate


LOCAL = NodeLink(rate=100e9, latency=2e-6)
"""The link between the workers of one node: memory or NVLink."""


@dataclass(frozen=True)
class Cluster:
    """A cluster of nodes that all have the same number of workers. The slowest link determines the time of collectives.

    Args:
        nodes: the number of nodes.
        link: the link of the slowest node.
        per_node: the number of workers on each node.
        local: the link between the workers of a node.

    Raises:
        ConfigurationError: a number is out of range. The error lists all of them.
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
        """The slowest link that workers use: the node's link, or the local link if there is only one node."""
        return self.link if self.nodes > 1 else self.local

    @property
    def swift(self) -> Cluster:
        """The same cluster without latency."""
        return replace(self, link=NodeLink(self.link.rate), local=NodeLink(self.local.rate))

    def part(self, workers: int) -> Cluster:
        """Returns a smaller cluster with this many workers: a part of one node, or several whole nodes."""
        if workers <= self.per_node:
            return Cluster(1, self.link, workers, self.local)
        return Cluster(-(-workers // self.per_node), self.link, self.per_node, self.local)


def scoped(cluster: Cluster, scope: Scope, group_size: int) -> tuple[Cluster, int]:
    """Returns the part of a cluster that a scope covers, and how many such scopes use the links of a node at once.

    Counterparts are one worker of each group. Each node has the counterparts of several places, which share its link.
    The first workers are the counterparts of one place.
    """
    if scope == "world" or (scope == "counterparts" and group_size == 1):
        return cluster, 1
    if scope == "group":
        return cluster.part(group_size), 1
    groups = cluster.workers // group_size
    at_once = 1 if scope == "firsts" else min(group_size, cluster.per_node)
    inside = max(cluster.per_node // group_size, 1)
    return Cluster(max(groups // inside, 1), cluster.link, inside, cluster.local), at_once


class Cost(NamedTuple):
    """The cost of one collective: its seconds, and the mean bytes that a node sends over its link, headers included."""

    seconds: float
    wire: float


def ring(cluster: Cluster, nbytes: float) -> Cost:
    """Returns the cost of an all-reduce over a ring of all workers, in which each node sends to one other node."""
    n = cluster.workers
    return _rounds(cluster, 2 * (n - 1), nbytes / n)


def hierarchical(cluster: Cluster, nbytes: float) -> Cost:
    """Returns the cost of a ring all-reduce between nodes, with a reduce-scatter and an all-gather inside each node."""
    between = ring(Cluster(cluster.nodes, cluster.link), nbytes)
    inside = 2 * (cluster.per_node - 1) * cluster.local.seconds(nbytes / cluster.per_node)
    return Cost(between.seconds + inside, between.wire)


ALL_REDUCES: dict[str, Callable[[Cluster, float], Cost]] = {"ring": ring, "hierarchical": hierarchical}


def cost_of(call: Call, cluster: Cluster, nbytes: float, algorithm: str = "ring") -> Cost:
    """Returns the cost of one collective among all workers of a cluster.

    Args:
        call: the kind of the collective.
        cluster: the cluster.
        nbytes: the payload of one worker in bytes, as `abtrain.comm.meter` counts it.
        algorithm: the algorithm of all-reduces, a key of `ALL_REDUCES`.
    """
    if cluster.workers == 1 or nbytes == 0:
        return Cost(0.0, 0.0)
    if call in ("all_reduce", "gradients"):
        return ALL_REDUCES[algorithm](cluster, nbytes)
    return _OTHERS[call](cluster, nbytes)


def _all_gather(cluster: Cluster, nbytes: float) -> Cost:
    return _rounds(cluster, cluster.workers - 1, nbytes)


def _exchange(cluster: Cluster, nbytes: float) -> Cost:
    """Returns the cost of an exchange between all pairs of workers. Workers of the same node do not use its link."""
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
    """Returns the cost of `count` rounds. In each round, every node sends `message` bytes to the next node."""
    wire = count * wire_bytes(message, RING_PARTS) if cluster.nodes > 1 else 0.0
    return Cost(count * cluster.pace.seconds(message, RING_PARTS), wire)
