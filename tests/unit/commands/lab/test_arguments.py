from pathlib import Path

import pytest

from abtrain.commands.lab import LabConfig, LabFault, arguments
from abtrain.commands.lab.arguments import parse_arguments
from abtrain.errors import ConfigurationError


@pytest.fixture(autouse=True)
def _on_a_system_with_labs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "system_problems", list)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()


def test_everything_that_can_be_said() -> None:
    line = "--nodes 2 --rates 1gbit,20mbit --workers-per-node 3 --network 10.1.0.0/24 --out run --timeout 60 "
    line += "--cut 1@20s+10s --cut 0@1s --change 0@10s=5mbit --launcher python"
    request = parse_arguments([*line.split(), "--", "train.py", "--nodes", "9", "--", "x"])
    assert request.config == LabConfig(2, (10**9, 20 * 10**6), 3, "10.1.0.0/24")
    job = request.job
    assert job is not None
    # Arguments after -- are the script's.
    assert job.command == ("train.py", "--nodes", "9", "--", "x")
    assert job.faults == (LabFault("cut", 1, 20, 10), LabFault("cut", 0, 1), LabFault("change", 0, 10, rate=5 * 10**6))
    assert (job.out, job.timeout, job.launcher) == (Path("run"), 60, "python")


def test_the_defaults_are_those_of_the_lab() -> None:
    request = parse_arguments(["--", "train.py"])
    assert request.config == LabConfig()
    assert request.job is not None and request.job.out.parent == Path("runs")


def test_clean_needs_nothing_else() -> None:
    assert parse_arguments(["--clean"]).job is None


def test_all_that_is_wrong_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "system_problems", lambda: ["no root"])
    line = "--nodes 0 --rate fast --kill one --freeze 1@1s+1s --workers-per-node 0 -- nowhere.py"
    with pytest.raises(ConfigurationError) as caught:
        parse_arguments(line.split())
    problems = caught.value.problems
    for part in ("'fast'", "'one'", "--nodes 0", "at least 1", "host 1 does not exist", "nowhere.py", "no root"):
        assert sum(part in problem for problem in problems) == 1, part
    assert len(problems) == 7


def test_a_wrong_fault_hides_no_wrong_number_of_rates() -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_arguments(["--nodes", "3", "--rates", "1mbit,2mbit", "--kill", "one", "--", "train.py"])
    assert len(caught.value.problems) == 2 and "--rates has 2 rates for 3 hosts" in str(caught.value)


@pytest.mark.parametrize("line", ["--speed 5", "--nodes many", "--rate 1mbit --rates 1mbit", "train.py"])
def test_options_that_there_are_not(line: str) -> None:
    with pytest.raises(ConfigurationError, match=r"--speed|'many'|not allowed with|unexpected argument 'train.py'"):
        parse_arguments(line.split())
