"""What commands print at 80 columns, as tests/golden shows it.

`GOLDEN=write python -m pytest tests/unit/commands/test_golden.py` rewrites the files: read them before you commit them.
Help texts at 80 columns are in docs/commands.md.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from abtrain.commands import cli
from abtrain.commands.compare.command import show as show_comparison
from abtrain.commands.compare.summary import rows
from abtrain.commands.export import command as export_command
from abtrain.commands.export import inspect_command
from abtrain.commands.export.inspection import Gains, InspectedWeight
from abtrain.commands.lab.command import show_result
from abtrain.commands.lab.counters import HostTraffic
from abtrain.commands.lab.result import HostResult, LabResult
from abtrain.commands.output import Output
from abtrain.commands.paper.command import show as show_table
from abtrain.commands.paper.experiments import SCALES, cells
from abtrain.commands.paper.published import Value
from abtrain.commands.paper.tables import PaperRow, comparison_table, scaling_table, study_table
from abtrain.commands.plan import memory_command
from abtrain.commands.train.config import TrainConfig
from abtrain.commands.train.display import Display
from tests.unit.commands.made_up import outcomes
from tests.unit.commands.train.test_display import MERGES, RECORD, RESULT

GOLDEN = Path(__file__).parents[2] / "golden"
COLUMNS = 80
TINY = SCALES["tiny"]


def typed(*arguments: str) -> Callable[[], None]:
    def run() -> None:
        with contextlib.suppress(SystemExit):
            cli.main(arguments)

    return run


def train() -> None:
    config = TrainConfig("ab_outer", steps=20_000, workers=4, batch_size=64, device="cpu")
    with Display(20_000) as display:
        display.heading(config, 868_010)
        for step, phase in ((20, "warmup"), (20_000, "factors")):
            display.show({**RECORD, "step": step, "phase": phase}, MERGES)
        display.validated(20_000, {"top1": 97.5, "loss": 0.1}, True)
        display.summary({**RESULT, "recipe": "ab_outer"}, Path("runs/digits-mlp-ab_outer-seed0-20260101-120000"))


def train_on_a_terminal() -> None:
    """The last frame of the progress bar."""
    out = io.StringIO()
    with Display(20_000, Output(file=out, force_terminal=True, width=COLUMNS)) as display:
        display.show({**RECORD, "step": 10_000, "phase": "factors"}, MERGES)
    print(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).strip().splitlines()[-1])


def compare() -> None:
    show_comparison(rows(outcomes(), 4), Output())


def paper() -> None:
    found = [
        PaperRow(cell, 3, Value(88.12, 0.34), -1.23, Value(7.5, 0.25), 0.3658, Value(123.4, 5.6), Value(0.0123, 0.001))
        for cell in cells("table2-local", TINY, nodes=(4, 16))
    ]
    show_table(scaling_table(found, "local", TINY), Output())
    show_table(comparison_table(found, TINY), Output())
    show_table(study_table(found, "Merges"), Output())


def lab() -> None:
    traffic = HostTraffic(123_456_789, 98_765_432, 95_600_000, 87_000_000)
    hosts = (
        HostResult(0, "10.77.0.1", 10**8, 9.5e7, 9.4e7, traffic, 0, False),
        HostResult(1, "10.77.0.2", 10**8, 9.5e7, 9.4e7, traffic, 137, True),
    )
    show_result(LabResult(("train.py",), Path("runs/lab"), 45.6, False, hosts, (), None, "cubic"), Output())


def export() -> None:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.chdir(folder)
        file = Path("model-plain.pt")
        file.write_bytes(bytes(158_000))
        patch.setattr(export_command, "find_run", lambda run, best: SimpleNamespace(multiplied_out=str))
        patch.setattr(export_command, "export", lambda *given: (file, 3e-8))
        patch.setattr(export_command, "needed_packages", lambda run: ["torchvision"])
        typed("export", "runs/one")()


def inspect() -> None:
    weights = [
        InspectedWeight("features.0.weight", 32, 9, ()),
        InspectedWeight("features.10.deeply.nested.block.with.a.long.name.weight", 1152, 128, (3.0, 2.0, 0.1)),
    ]
    inspect_command.show_weights(weights, Output())
    latency = {1: (0.21, 0.19), 256: (31.2, 28.4)}
    ratio = {1: 0.9, 256: 0.91}
    gains = Gains((868_010, 158_000), (12.1e6, 3.4e6), (92.5, 92.46), (0.21, 0.2101), latency, ratio, 3e-6)
    inspect_command.show_gains(gains, Output())


def plan_memory(*arguments: str) -> Callable[[], None]:
    def run() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memory_command, "measured_process", lambda: 7 * 10**8)
            typed("plan", *arguments, "--memory", "--parameters", "124M", "--activations", "400MB")()

    return run


PLAN = ("plan", "--parameters", "25e6", "--step-time", "100ms")
CAPTURES: dict[str, Callable[[], None]] = {
    "train": train,
    "train-terminal": train_on_a_terminal,
    "recipes": typed("recipes"),
    "recipes-one": typed("recipes", "ab_outer:every=40,wire=int4"),
    "plan": typed(*PLAN, "--rate", "100mbit"),
    "plan-fast-link": typed(*PLAN, "--rate", "400gbit"),
    "plan-one": typed(*PLAN, "diloco", "--rates", "1gbit,1gbit,1gbit,20mbit"),
    "plan-memory": plan_memory("--nodes", "2"),
    "plan-memory-one": plan_memory("diloco:wire=int4,delay=5", "--nodes", "2", "--optimizer", "sgd"),
    "compare": compare,
    "paper": paper,
    "paper-ecr": typed("paper", "ecr"),
    "paper-dry-run": typed("paper", "table2-local", "--dry-run", "--nodes", "4"),
    "lab": lab,
    "export": export,
    "inspect": inspect,
}


@pytest.mark.parametrize("name", CAPTURES)
def test_output_at_80_columns(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    CAPTURES[name]()
    said = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines()) + "\n"
    file = GOLDEN / f"{name}.txt"
    if os.environ.get("GOLDEN") == "write":
        file.write_text(said, encoding="utf-8")
    assert said == file.read_text(encoding="utf-8")
    assert max(map(len, said.splitlines())) <= COLUMNS and "…" not in said


def test_every_file_is_a_capture() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == set(CAPTURES)
