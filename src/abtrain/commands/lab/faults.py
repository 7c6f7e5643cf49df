"""Defines the faults of hosts and links that a lab injects while a job runs, and parses their notation."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from abtrain.commands.lab.config import parse_link_rate
from abtrain.commands.units import format_rate
from abtrain.errors import ConfigurationError

Kind = Literal["cut", "freeze", "kill", "change"]


@dataclass(frozen=True)
class LabFault:
    """One fault of one host.

    Attributes:
        kind: `cut` (the link), `freeze` or `kill` (all processes), or `change` (the rate of the link).
        host: the number of the host, from 0.
        at: the start of the fault, in seconds after the start of the job.
        duration: the seconds until a cut link is reconnected or frozen processes continue. None means that the fault
            lasts to the end of the job.
        rate: the new rate of the link in bits per second; only for `change`.
    """

    kind: Kind
    host: int
    at: float
    duration: float | None = None
    rate: int | None = None

    def __str__(self) -> str:
        until = "" if self.duration is None else f"+{self.duration:g}s"
        return f"{self.kind} {self.host}@{self.at:g}s{until}{_rate_suffix(self.rate)}"


def _rate_suffix(rate: int | None) -> str:
    return "" if rate is None else f"={format_rate(rate)}"


_SECONDS = r"(?P<{}>\d+(?:\.\d+)?)s"
_START = r"(?P<host>\d+)@" + _SECONDS.format("at")
_DURATION = r"(?:\+" + _SECONDS.format("duration") + ")?"
_FORMS: dict[Kind, tuple[str, str]] = {
    "cut": (_START + _DURATION, "HOST@STARTs+DURATIONs, such as 3@20s+10s"),
    "freeze": (_START + _DURATION, "HOST@STARTs+DURATIONs, such as 2@5s+3s"),
    "kill": (_START, "HOST@STARTs, such as 1@8s"),
    "change": (_START + r"=(?P<rate>\w[\w.]*)", "HOST@STARTs=RATE, such as 2@10s=20mbit"),
}


def form_of(kind: Kind) -> str:
    """Returns the notation for faults of this kind, with an example."""
    return _FORMS[kind][1]


def parse_fault(kind: Kind, text: str) -> LabFault:
    """Parses a fault from the command line, such as 3@20s+10s.

    Raises:
        ConfigurationError: the string is not a fault of this kind.
    """
    pattern, form = _FORMS[kind]
    found = re.fullmatch(pattern, text.strip())
    if found is None:
        raise ConfigurationError(f"--{kind} {text!r} cannot be read: use {form}")
    parts = found.groupdict()
    duration, rate = parts.get("duration"), parts.get("rate")
    try:
        new_rate = None if rate is None else parse_link_rate(rate)
    except ConfigurationError as error:
        raise ConfigurationError(f"--{kind} {text!r}: {error}") from None
    return LabFault(
        kind, int(parts["host"]), float(parts["at"]), None if duration is None else float(duration), new_rate
    )


def fault_problems(faults: Iterable[LabFault], nodes: int) -> list[str]:
    """Returns a message for each problem of faults in a lab of `nodes` hosts; empty if there are none."""
    problems = []
    for fault in faults:
        if not 0 <= fault.host < nodes:
            problems.append(f"{fault}: host {fault.host} does not exist: use a number from 0 to {nodes - 1}")
        if fault.duration is not None and fault.duration <= 0:
            problems.append(
                f"{fault}: the duration {fault.duration:g} s is too short: use one above 0, or leave it out"
            )
        if (fault.kind == "change") != (fault.rate is not None):
            problems.append(f"{fault}: only a change has a rate: set `rate` for each change, and for no other fault")
    return problems


@dataclass(frozen=True)
class Action:
    """The beginning or the end of a fault.

    Attributes:
        at: the time of the action, in seconds after the start of the job.
        verb: the kind of the action: cut, join, freeze, thaw, kill or change.
        fault: the fault that begins or ends.
    """

    at: float
    verb: str
    fault: LabFault


@dataclass(frozen=True)
class Event:
    """The record of an action on a host.

    Attributes:
        seconds: the time of the action, in seconds after the start of the job. It is negative before the start.
        verb: the kind of the action: cut, join, freeze, thaw, kill or change.
        host: the number of the host.
        rate: the new rate of its link in bits per second; only for `change`.
    """

    seconds: float
    verb: str
    host: int
    rate: int | None = None

    def __str__(self) -> str:
        return f"{self.verb} {self.host}{_rate_suffix(self.rate)}"


_ENDS = {"cut": "join", "freeze": "thaw"}


def timeline(faults: Iterable[LabFault]) -> list[Action]:
    """Returns the actions that begin and end the faults, in chronological order."""
    actions = []
    for fault in faults:
        actions.append(Action(fault.at, fault.kind, fault))
        if fault.duration is not None:
            actions.append(Action(fault.at + fault.duration, _ENDS[fault.kind], fault))
    return sorted(actions, key=lambda action: action.at)


def faults_in_words(events: Iterable[Event], until: float) -> list[str]:
    """Describes the faults that were injected before `until`. Each fault is one sentence without a full stop.

    Args:
        events: the recorded actions, in chronological order.
        until: a time in seconds after the start of the job. Later events are ignored.
    """
    counted = [event for event in events if event.seconds <= until]
    return [_in_words(event, counted[index + 1 :]) for index, event in enumerate(counted) if event.verb in _WORDS]


_WORDS = {"cut": "was cut off", "freeze": "was frozen", "kill": "was killed", "change": "had its link set to {rate}"}
_NEVER = {"cut": "never reconnected", "freeze": "never resumed"}


def _in_words(event: Event, later: Iterable[Event]) -> str:
    did = f"host {event.host} {_WORDS[event.verb]}".format(rate=format_rate(event.rate or 0))
    start = "before the command started" if event.seconds < 0 else f"at {event.seconds:.1f} s"
    if event.verb not in _ENDS:
        return f"{did} {start}"
    ends = (other for other in later if (other.verb, other.host) == (_ENDS[event.verb], event.host))
    end = next(ends, None)
    if end is None:
        return f"{did} {start} and {_NEVER[event.verb]}"
    back = "reconnected" if event.verb == "cut" else "resumed"
    return f"{did} {start} and {back} at {end.seconds:.1f} s"
