"""Labs as Python makes them: links, bytes, faults, failures."""

import itertools
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from abtrain.commands.lab import Job, Lab, LabConfig, LabFault, namespaces
from abtrain.commands.lab.namespaces import lab_prefix
from abtrain.commands.lab.network import CONGESTION_CONTROLS
from abtrain.errors import ConfigurationError, HostFailedError, LabError

pytestmark = pytest.mark.alone

RATES = (100 * 10**6, 20 * 10**6)

# Host 0 sends to host 1, which says how long it took.
SENDER = """
import os, socket, time
count = 1_000_000
if os.environ["LAB_HOST"] == "1":
    with socket.create_server(("", 4000)) as server:
        connection, _ = server.accept()
        started, seen = time.monotonic(), 0
        while seen < count:
            seen += len(connection.recv(65536))
        print("seconds", time.monotonic() - started)
else:
    while True:
        try:
            connection = socket.create_connection(("10.77.0.2", 4000))
            break
        except ConnectionRefusedError:
            time.sleep(0.05)
    connection.sendall(bytes(count))
    connection.recv(1)
"""

# Every host calls all others every 20 ms for three seconds, and says when it heard of whom.
CALLER = """
import os, socket, time
host = os.environ["LAB_HOST"]
ears = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
ears.bind(("", 4000))
ears.settimeout(0.02)
end = time.monotonic() + 3
while time.monotonic() < end:
    for other in (1, 2):
        ears.sendto(host.encode(), (f"10.77.0.{other}", 4000))
    try:
        while True:
            print(time.monotonic(), ears.recv(1).decode(), flush=True)
    except TimeoutError:
        pass
"""


# Every host calls all others every 20 ms, and ends with 6 once it has not heard of one for a second.
LISTENER = """
import os, socket, sys, time
own = os.environ["LAB_HOST"]
ears = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
ears.bind(("", 4000))
ears.settimeout(0.02)
heard = time.monotonic() + 5
while time.monotonic() < heard + 1:
    for other in (1, 2):
        try:
            ears.sendto(own.encode(), (f"10.77.0.{other}", 4000))
        except OSError:
            pass
    try:
        while True:
            if ears.recv(1).decode() != own:
                heard = time.monotonic()
    except TimeoutError:
        pass
if own == "0":
    sys.exit(6)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """One for all tests that leave it as it was."""
    with Lab(LabConfig(nodes=2, rates=RATES)) as lab:
        yield lab


@pytest.fixture
def spoilt_lab() -> Iterator[Lab]:
    """One for a test that spoils it."""
    with Lab(LabConfig(nodes=2, rates=RATES, name="spoilt")) as lab:
        yield lab


def test_links_are_measured_before_anything_runs(spoilt_lab: Lab) -> None:
    for (up, down), rate in zip(spoilt_lab.measured, RATES, strict=True):
        assert up == pytest.approx(rate, rel=0.15) and down == pytest.approx(rate, rel=0.15)
    spoilt_lab.change(0, 5 * 10**6)
    assert spoilt_lab.measure()[0] == pytest.approx((5e6, 5e6), rel=0.15)


def test_a_link_that_is_not_what_it_should_be_is_named(spoilt_lab: Lab) -> None:
    host = f"{lab_prefix('spoilt')}-host1"
    shape = ("tbf", "rate", "5mbit", "burst", "16kb", "latency", "200ms")
    subprocess.run(("tc", "-n", host, "qdisc", "replace", "dev", "eth0", "root", *shape), check=True)
    with pytest.raises(LabError, match=r"host 1: the link up carries .* instead of 20mbit") as caught:
        spoilt_lab.measure()
    assert "host 0" not in str(caught.value) and "down" not in str(caught.value)


def test_a_host_that_is_cut_off_is_named(spoilt_lab: Lab) -> None:
    spoilt_lab.cut(1)
    with pytest.raises(LabError, match="host 1 and the switch cannot reach each other"):
        spoilt_lab.measure()


def test_bytes_are_those_that_were_sent(lab: Lab, script: Path, tmp_path: Path) -> None:
    script.write_text(SENDER)
    lines: list[tuple[int, str]] = []
    result = lab.run(
        Job((str(script),), tmp_path / "out", launcher="python"), show=lambda host, line: lines.append((host, line))
    )
    sender, receiver = (host.traffic for host in result.hosts)
    # Headers are at most 66 of 1,514 bytes; few packets are sent twice, where the slower link's queue was full.
    # Either end may count more: the faster link passes, and counts, larger packets with fewer headers.
    assert 1e6 < receiver.rx_bytes < 1.06e6 and 1e6 < sender.tx_bytes < 1.06e6
    assert max(sender.rx_bytes, receiver.tx_bytes) < 0.02 * 1e6
    # The slower of the two links sets the pace, once a burst has passed.
    ((host, line),) = lines
    assert host == 1 and float(line.split()[1]) > 0.9 * 8 * (1e6 - 128 * 1024) / RATES[1]
    assert 0.5 * RATES[1] < receiver.peak_rx < 2 * RATES[1]
    record = json.loads((tmp_path / "out/lab.json").read_text())
    assert [host["tx_bytes"] for host in record["hosts"]] == [sender.tx_bytes, receiver.tx_bytes]
    assert record["hosts"][1]["rate"] == RATES[1] and record["versions"].keys() >= {"abtrain", "torch", "kernel"}
    assert record["link"]["congestion_control"] in CONGESTION_CONTROLS
    assert (tmp_path / "out/host-1.log").read_text() == f"{line}\n"


def heard(log: Path) -> list[float]:
    """When the host of this log heard of the other one, in seconds."""
    own = log.stem[-1]
    calls = [line.split() for line in log.read_text().splitlines()]
    return [float(moment) for moment, caller in calls if caller != own]


def longest_gap(moments: list[float]) -> float:
    return max(after - before for before, after in itertools.pairwise(moments))


@pytest.mark.parametrize("kind", ["cut", "freeze"])
def test_faults_that_pass(kind: str, lab: Lab, script: Path, tmp_path: Path) -> None:
    script.write_text(CALLER)
    fault = LabFault(kind, host=1, at=1, duration=0.6)  # type: ignore[arg-type]
    result = lab.run(Job((str(script),), tmp_path / "out", faults=(fault,), launcher="python"))
    moments = heard(tmp_path / "out/host-0.log")
    assert longest_gap(moments) > 0.5
    assert [event for _, event in result.events] == [f"{kind} 1", {"cut": "join 1", "freeze": "thaw 1"}[kind]]
    # After the gap, traffic continues as before.
    assert sum(moment > moments[0] + 2 for moment in moments) >= 5


def test_a_host_that_is_killed_on_purpose_has_not_failed(lab: Lab, script: Path, tmp_path: Path) -> None:
    script.write_text(CALLER)
    result = lab.run(Job((str(script),), tmp_path / "out", faults=(LabFault("kill", host=1, at=1),), launcher="python"))
    assert [(host.exit_code, host.killed) for host in result.hosts] == [(0, False), (137, True)]
    assert result.failed_host is None and result.seconds > 2


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (LabFault("cut", host=1, at=1), r"host 1 was cut off at \d.\d s and never reconnected"),
        (LabFault("cut", host=1, at=1, duration=1.5), r"host 1 was cut off at \d.\d s"),
        (LabFault("freeze", host=1, at=1), r"host 1 was frozen at \d.\d s and never resumed"),
        (LabFault("kill", host=1, at=1), r"host 1 was killed at \d.\d s"),
        (
            LabFault("change", host=1, at=0.2, rate=10**6),
            r"host 1 had its link set to 1mbit at \d.\d s, and host 1 was killed at",
        ),
    ],
    ids=str,
)
def test_a_fault_that_the_lab_caused_is_named(
    fault: LabFault, said: str, spoilt_lab: Lab, script: Path, tmp_path: Path
) -> None:
    script.write_text(LISTENER)
    faults = (fault, LabFault("kill", host=1, at=1)) if fault.kind == "change" else (fault,)
    with pytest.raises(HostFailedError, match=rf"^host 0 failed with exit code 6: see .*log. Before that, {said}"):
        spoilt_lab.run(Job((str(script),), tmp_path / "out", faults=faults, launcher="python"))


def test_a_fault_after_the_failure_is_not_named(lab: Lab, script: Path, tmp_path: Path) -> None:
    script.write_text("import os, sys, time\nsys.exit(3) if os.environ['LAB_HOST'] == '1' else time.sleep(600)\n")
    with pytest.raises(HostFailedError, match=r"host-1.log$"):
        lab.run(Job((str(script),), tmp_path / "out", faults=(LabFault("freeze", 0, 0.7),), launcher="python"))


def test_a_fault_that_leaves_a_command_hanging_is_named(lab: Lab, script: Path, tmp_path: Path) -> None:
    script.write_text("import time\ntime.sleep(600)\n")
    job = Job((str(script),), tmp_path / "out", faults=(LabFault("freeze", 1, 0.5),), launcher="python", timeout=1.5)
    with pytest.raises(
        LabError, match=r"a longer --timeout. Before that, host 1 was frozen at \d.\d s and never resumed$"
    ):
        lab.run(job)


def test_a_link_that_was_cut_before_the_command_is_named(spoilt_lab: Lab, script: Path, tmp_path: Path) -> None:
    script.write_text(LISTENER.replace("+ 5", "+ 0"))
    spoilt_lab.cut(1)
    with pytest.raises(HostFailedError, match=r"Before that, host 1 was cut off before the command started"):
        spoilt_lab.run(Job((str(script),), tmp_path / "out", launcher="python"))
    spoilt_lab.join(1)
    script.write_text("raise SystemExit(3)\n")
    with pytest.raises(HostFailedError, match=r"host-\d.log$"):
        spoilt_lab.run(Job((str(script),), tmp_path / "again", launcher="python"))


def test_a_host_that_fails_ends_the_others(lab: Lab, script: Path, tmp_path: Path) -> None:
    script.write_text(
        "import os, sys, time\nprint('no luck') or sys.exit(3) if os.environ['LAB_HOST'] == '1' else time.sleep(600)\n"
    )
    started = time.monotonic()
    with pytest.raises(HostFailedError, match=r"host 1 failed with exit code 3: see .*host-1.log") as caught:
        lab.run(Job((str(script),), tmp_path / "out", launcher="python"))
    assert caught.value.exit_code == 3
    assert time.monotonic() - started < 10
    assert (tmp_path / "out/host-1.log").read_text() == "no luck\n"
    assert json.loads((tmp_path / "out/lab.json").read_text())["failed_host"] == 1


def test_processes_that_a_command_started_end_with_it(lab: Lab, script: Path, tmp_path: Path) -> None:
    script.write_text(
        "import subprocess\nsubprocess.Popen(['sleep', '600'], start_new_session=True, stdout=subprocess.DEVNULL)\n"
    )
    lab.run(Job((str(script),), tmp_path / "out", launcher="python"))
    assert namespaces.processes_in(namespaces.of_lab(lab_prefix("lab"))) == []


def test_a_command_that_takes_too_long_is_ended(lab: Lab, script: Path, tmp_path: Path) -> None:
    script.write_text("import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(600)\n")
    with pytest.raises(LabError, match="did not end within"):
        lab.run(Job((str(script),), tmp_path / "out", launcher="python", timeout=0.5))
    assert json.loads((tmp_path / "out/lab.json").read_text())["timed_out"]


def test_two_labs_at_once_need_two_names(lab: Lab) -> None:
    with pytest.raises(ConfigurationError, match="'lab' belongs to another lab"), Lab(LabConfig(nodes=1)):
        pass
    with Lab(LabConfig(nodes=1, name="other")):
        assert len(namespaces.of_lab(lab_prefix("other"))) == 2
    assert len(namespaces.of_lab(lab_prefix("lab"))) == 3
    assert namespaces.of_lab(lab_prefix("other")) == []
