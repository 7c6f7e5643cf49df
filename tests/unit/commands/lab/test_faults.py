import pytest

from abtrain.commands.lab.faults import Event, LabFault, fault_problems, faults_in_words, parse_fault, timeline
from abtrain.errors import ConfigurationError


@pytest.mark.parametrize(
    ("kind", "text", "fault"),
    [
        ("cut", "3@20s+10s", LabFault("cut", 3, 20, 10)),
        ("cut", "0@0.5s", LabFault("cut", 0, 0.5)),
        ("freeze", "2@5s+3s", LabFault("freeze", 2, 5, 3)),
        ("kill", "1@8s", LabFault("kill", 1, 8)),
        ("change", "2@10s=20mbit", LabFault("change", 2, 10, rate=20 * 10**6)),
    ],
)
def test_faults_are_written_as_they_are_read(kind: str, text: str, fault: LabFault) -> None:
    assert parse_fault(kind, text) == fault  # type: ignore[arg-type]
    assert str(fault) == f"{kind} {text}"


@pytest.mark.parametrize(
    ("kind", "text"),
    [("cut", "3"), ("cut", "3@20"), ("kill", "1@8s+2s"), ("change", "2@10s"), ("freeze", "-1@5s"), ("change", "2@1s=")],
)
def test_an_invalid_fault_is_reported_with_the_syntax(kind: str, text: str) -> None:
    with pytest.raises(ConfigurationError, match=f"--{kind} '.*' cannot be read: use HOST@STARTs.*such as"):
        parse_fault(kind, text)  # type: ignore[arg-type]


def test_a_change_to_a_rate_that_cannot_be() -> None:
    with pytest.raises(ConfigurationError, match=r"--change '2@1s=fast': rate 'fast' cannot be read"):
        parse_fault("change", "2@1s=fast")


def test_faults_that_do_not_fit_the_lab() -> None:
    faults = (LabFault("cut", 4, 1), LabFault("kill", 0, 1), LabFault("freeze", 1, 2, 0), LabFault("change", 2, 1))
    problems = fault_problems(faults, nodes=4)
    assert len(problems) == 3
    assert "host 4 does not exist: use a number from 0 to 3" in problems[0]
    assert "freeze 1@2s+0s" in problems[1] and "only a change has a rate" in problems[2]


def test_the_timeline_has_the_end_of_what_passes() -> None:
    actions = timeline([LabFault("cut", 1, 5, 10), LabFault("kill", 0, 6), LabFault("freeze", 2, 1, 1)])
    assert [(action.at, action.verb, action.fault.host) for action in actions] == [
        (1, "freeze", 2),
        (2, "thaw", 2),
        (5, "cut", 1),
        (6, "kill", 0),
        (15, "join", 1),
    ]


EVENTS = (
    Event(-1.0, "cut", 0),
    Event(2.0, "cut", 2),
    Event(3.04, "freeze", 1),
    Event(4.0, "change", 2, 20 * 10**6),
    Event(5.0, "kill", 3),
    Event(6.0, "join", 2),
    Event(7.0, "thaw", 1),
    Event(8.0, "cut", 2),
)


def test_an_event_is_written_with_its_rate() -> None:
    assert [str(event) for event in EVENTS[2:5]] == ["freeze 1", "change 2=20mbit", "kill 3"]


@pytest.mark.parametrize(
    ("until", "said"),
    [
        (0.0, []),
        (2.5, ["host 2 was cut off at 2.0 s and never reconnected"]),
        (3.5, ["host 2 was cut off at 2.0 s and never reconnected", "host 1 was frozen at 3.0 s and never resumed"]),
        (
            9.0,
            [
                "host 2 was cut off at 2.0 s and reconnected at 6.0 s",
                "host 1 was frozen at 3.0 s and resumed at 7.0 s",
                "host 2 had its link set to 20mbit at 4.0 s",
                "host 3 was killed at 5.0 s",
                "host 2 was cut off at 8.0 s and never reconnected",
            ],
        ),
    ],
)
def test_what_the_lab_did_in_words(until: float, said: list[str]) -> None:
    before = "host 0 was cut off before the command started and never reconnected"
    assert faults_in_words(EVENTS, until) == [before, *said]
