"""`abtrain lab` as a user runs it, to its end or to a sudden one: nothing of it may be left."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from abtrain.commands.lab import Lab, LabConfig, namespaces

pytestmark = pytest.mark.alone

ABTRAIN = (sys.executable, "-m", "abtrain", "lab")
ALLREDUCE = Path(__file__).parents[2] / "benchmarks/allreduce.py"


def left_of(pid: int) -> list[str]:
    """The namespaces of a process's labs."""
    return [path.name for path in namespaces.FOLDER.iterdir() if re.match(rf"abtrain-lab-{pid}-", path.name)]


def runs(pid: int) -> bool:
    """Whether a process still runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def start(*arguments: str, cwd: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen((*ABTRAIN, *arguments), cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def start_sleepers(cwd: Path) -> "subprocess.Popen[str]":
    """A lab whose workers would sleep for long, once they do."""
    (cwd / "sleeper.py").write_text("import time\nprint('asleep', flush=True)\ntime.sleep(600)\n")
    process = start("--nodes", "2", "--launcher", "python", "--out", "out", "--", "sleeper.py", cwd=cwd)
    assert process.stdout is not None
    asleep = 0
    while asleep < 2:
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        asleep += "asleep" in line
    return process


def watcher_of(process: "subprocess.Popen[str]") -> int:
    said = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "abtrain.commands.lab.watcher"], capture_output=True, text=True
    )
    return int(said.stdout)


def test_the_bytes_of_an_all_reduce_are_those_of_the_ring(tmp_path: Path) -> None:
    process = start("--nodes", "3", "--out", "out", "--", str(ALLREDUCE), cwd=tmp_path)
    said, errors = process.communicate()
    assert process.returncode == 0, said + errors
    found = re.search(r"host 0 \| seconds=([\d.]+) ring_bytes=(\d+)", said)
    assert found is not None
    seconds, ring_bytes = float(found[1]), int(found[2])
    record = json.loads((tmp_path / "out/lab.json").read_text())
    for host in record["hosts"]:
        assert host["tx_bytes"] == pytest.approx(ring_bytes, rel=0.02)
        assert host["rx_bytes"] == pytest.approx(ring_bytes, rel=0.02)
        assert host["peak_tx"] < 1.2 * host["rate"]
    # No faster than the links are; how much slower is for a benchmark to say.
    assert seconds > 0.95 * 8 * ring_bytes / 100e6
    assert "13.3" in said and "sent MB" in said
    assert left_of(process.pid) == []


def test_the_exit_code_is_that_of_the_worker_that_failed_first(tmp_path: Path) -> None:
    (tmp_path / "fail.py").write_text(
        "import sys\nimport torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "if dist.get_rank() == 1: sys.exit(9)\n"
        "dist.all_reduce(torch.ones(3))\n"
    )
    process = start("--nodes", "2", "--out", "out", "--", "fail.py", cwd=tmp_path)
    said, errors = process.communicate()
    assert process.returncode == 9, said + errors
    assert errors == "abtrain: error: host 1 failed with exit code 9: see out/host-1.log\n"
    assert left_of(process.pid) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_on_request(number: signal.Signals, tmp_path: Path) -> None:
    process = start_sleepers(tmp_path)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (75, f"abtrain: error: stopped on request ({number.name})\n")
    (record,) = tmp_path.rglob("lab.json")
    assert json.loads(record.read_text())["stopped"] is True
    assert left_of(process.pid) == []


def test_nothing_is_left_of_a_lab_that_is_killed(tmp_path: Path) -> None:
    process = start_sleepers(tmp_path)
    inside = namespaces.processes_in(left_of(process.pid))
    assert len(inside) == 2
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 15
    while left_of(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left_of(process.pid) == []
    assert not any(runs(pid) for pid in inside)


@pytest.mark.parametrize("by", ["another lab", "--clean"])
def test_what_is_left_is_removed_later(by: str, tmp_path: Path) -> None:
    process = start_sleepers(tmp_path)
    names = left_of(process.pid)
    inside = namespaces.processes_in(names)
    os.kill(watcher_of(process), signal.SIGKILL)
    process.kill()
    process.communicate()
    assert left_of(process.pid) == names and len(names) == 3
    assert namespaces.processes_in(names) == inside and len(inside) == 2
    if by == "another lab":
        with Lab(LabConfig(nodes=1)):
            pass
    else:
        said = subprocess.run((*ABTRAIN, "--clean"), capture_output=True, text=True, check=True).stdout
        assert f"abtrain-lab-{process.pid}-" in said
    assert left_of(process.pid) == []
    assert not any(runs(pid) for pid in inside)


def test_all_errors_are_reported_before_anything_is_built(tmp_path: Path) -> None:
    process = start("--rate", "fast", "--cut", "7@1s", "--kill", "one", "--", "nowhere.py", cwd=tmp_path)
    _, errors = process.communicate()
    assert process.returncode == 2
    lines = errors.splitlines()
    assert len(lines) == 4 and all(line.startswith("abtrain: error: ") for line in lines)
    assert "'fast'" in errors and "host 7 does not exist" in errors and "'one'" in errors and "nowhere.py" in errors
    assert list(tmp_path.iterdir()) == []


def test_workers_have_time_to_save_when_the_lab_is_stopped(tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text(
        "import signal, time\n"
        "def save(*_):\n"
        "    time.sleep(4)\n"
        "    open('saved', 'w').close()\n"
        "    raise SystemExit(75)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "print('asleep', flush=True)\n"
        "time.sleep(600)\n"
    )
    process = start("--nodes", "1", "--launcher", "python", "--out", "out", "--", "sleeper.py", cwd=tmp_path)
    assert process.stdout is not None
    while "asleep" not in (line := process.stdout.readline()):
        assert line, process.communicate()[1]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=40)
    assert process.returncode == 75 and (tmp_path / "saved").exists()
