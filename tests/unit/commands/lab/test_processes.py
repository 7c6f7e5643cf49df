"""Who failed first, from the order and the exit codes in which hosts end."""

import pytest

from abtrain.commands.lab.processes import HostProcesses
from abtrain.errors import PeerLostError


class Ended:
    """A process that has ended."""

    def __init__(self, returncode: int) -> None:
        self.returncode = returncode


def ended(codes: dict[int, int], killed: set[int], tmp_path) -> HostProcesses:
    """Hosts 0 to 3, of which these have ended, in this order."""
    processes = HostProcesses([f"h{host}" for host in range(4)], tmp_path, lambda host, line: None)
    processes._processes = [Ended(codes.get(host, 0)) for host in range(4)]  # type: ignore[misc]
    processes._ends = {host: float(moment) for moment, host in enumerate(codes)}
    processes.killed = killed
    return processes


@pytest.mark.parametrize(
    ("codes", "killed", "first"),
    [
        ({}, set(), None),
        ({0: 0, 1: 0}, set(), None),
        ({2: 1, 0: 1, 1: 1}, set(), 2),
        # Losing another worker is a consequence, even where it ends sooner.
        ({0: PeerLostError.exit_code, 2: 7}, set(), 2),
        ({0: 143, 2: 1}, set(), 2),
        ({0: PeerLostError.exit_code, 1: PeerLostError.exit_code}, set(), 0),
        ({3: -9}, {3}, None),
        ({3: -9, 1: 6}, {3}, 1),
    ],
)
def test_the_host_to_blame(codes: dict[int, int], killed: set[int], first: int | None, tmp_path) -> None:
    assert ended(codes, killed, tmp_path).first_failed() == first


def test_exit_codes_of_signals(tmp_path) -> None:
    assert ended({0: -9, 1: 5}, set(), tmp_path).exit_code(0) == 137
