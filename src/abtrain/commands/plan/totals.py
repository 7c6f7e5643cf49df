"""Sums the predicted payload of a run, and compares payload with that of DDP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from abtrain.comm.communicator import scope_spans, senders, sent_by_call
from abtrain.comm.topology import Topology
from abtrain.commands.plan.stretches import Stretch


def payload(stretches: Sequence[Stretch], topology: Topology, rank: int = 0) -> dict[str, Any]:
    """Returns the bytes of a worker in a run with the keys of `Meter.payload()`: total, between_groups and so on."""
    by_scope, by_phase, of_group = {"between_groups": 0, "within_groups": 0}, dict[str, int](), dict[str, int]()
    for stretch in stretches:
        calls = ((one, times) for call, times in stretch.all() for one in sent_by_call(call, topology, rank))
        for traffic, times in calls:
            nbytes = traffic.nbytes * times
            if nbytes:
                spans = scope_spans(topology, traffic.scope)
                by_scope[spans] += nbytes
                by_phase[stretch.phase] = by_phase.get(stretch.phase, 0) + nbytes
                if spans == "between_groups":
                    sent = nbytes * senders(topology, traffic.scope)
                    of_group[stretch.phase] = of_group.get(stretch.phase, 0) + sent
    return {"total": sum(by_scope.values()), **by_scope, "by_phase": by_phase, "of_group": of_group}


def over_links(sent: Mapping[str, Any], topology: Topology) -> dict[str, int]:
    """Returns, by phase, the bytes that a group sends to other groups; of a single group, those of a worker.

    `sent` is a result of `payload` or of `Meter.payload`. Bytes that workers send within their group, such as gradients
    on one machine, do not count where there are other groups: they do not use the links between groups.
    """
    return dict(sent["of_group" if topology.n_groups > 1 else "by_phase"])


def payload_ratio(nbytes: float, parameters: float, steps: float) -> float:
    """Returns a payload in bytes divided by that of DDP, which sends all gradients in float32 at every step.

    `nbytes` is the sum of `over_links`. DDP sums gradients within a group, so its group sends as much as a worker.
    """
    return nbytes / (4 * parameters * steps)
