import io
import re

import pytest

from abtrain.commands.output import Output
from abtrain.commands.train.config import TrainConfig
from abtrain.commands.train.display import Display
from abtrain.commands.units import human_bytes

RECORD = {
    "step": 20,
    "phase": "warmup",
    "loss": 1.5,
    "lr": 1e-3,
    "grad_norm": 0.25,
    "samples_per_second": 5120.0,
    "payload_bytes": 2_500_000,
}
MERGES = [
    {"ranks": [0, 1, 2], "loss_mean": 1.0, "loss_max": 1.5, "seconds": 0.25, "wait_seconds": 0.1},
    {"ranks": [0, 1, 2], "loss_mean": 2.0, "loss_max": 3.0, "seconds": 0.25, "wait_seconds": 0.1},
]
RESULT = {
    "recipe": "ab",
    "task": "digits-mlp",
    "seed": 0,
    "top1": 97.5,
    "loss": 0.1,
    "seconds": {"total": 3.0, "compute": 1.5, "sync": 1.0, "svd": 0.5},
    "payload_bytes": {"total": 2_500_000},
    "payload_ratio": 0.378,
    "group_size": 1,
    "compression": 1.88,
    "weights_digest": "0123456789abcdef" * 4,
}


def shown(result: dict[str, object], terminal: bool = False) -> str:
    out = io.StringIO()
    with Display(100, Output(file=out, force_terminal=terminal, width=100)) as display:
        display.heading(TrainConfig(recipe="ab", steps=100, batch_size=8, device="cpu"), 85_002)
        display.show(RECORD)
        display.summary(result, "runs/[x]/" + "y" * 200)  # type: ignore[arg-type]
    return out.getvalue()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.6, "1 kB"),
        (1000, "1 kB"),
        (2_500_000, "2.5 MB"),
        (999_999, "1 MB"),
        (5e12, "5 TB"),
        (3e15, "3,000 TB"),
    ],
)
def test_human_bytes(count: float, text: str) -> None:
    assert human_bytes(count) == text


def test_plain_lines_where_there_is_no_terminal() -> None:
    text = shown(RESULT)
    assert "\x1b" not in text
    assert "ab on digits-mlp, 85,002 parameters, cpu\n100 steps of 4 x 8 samples, 4 workers in 4 groups\n" in text
    line = "step    20/100  warmup   loss 1.5000  lr 1.00e-03  2.5 MB sent  5,120 samples/s  grad 0.25\n"
    assert line in text
    for figure in ("97.50 %", "0.1000", "2.5 MB", "37.8 %", "1.88 : 1", "3.0 (compute 1.5, sync 1.0, svd 0.5)"):
        assert figure in text
    assert "0123456789abcdef" in text and "runs/[x]/" in text and text.count("y") > 200


@pytest.mark.parametrize(
    ("width", "end"),
    [
        (30, "loss 1.5000 (max 3.0000)"),
        (80, "lr 1.00e-03  2.5 MB sent"),
        (100, "5,120 samples/s"),
        (200, "grad 0.25  2 merges of 3 workers: 0.50 s, 0.20 s waiting"),
    ],
)
def test_merges_tell_the_losses_of_all_workers_and_a_line_holds_what_fits(width: int, end: str) -> None:
    out = io.StringIO()
    Display(100, Output(file=out, width=width)).show(RECORD, MERGES)
    line = out.getvalue().rstrip("\n")
    assert "loss 1.5000 (max 3.0000)" in line and line.endswith(end)
    assert len(line) <= width or end.startswith("loss")


@pytest.mark.parametrize("width", [80, 120])
def test_the_bar_fits_the_terminal(width: int) -> None:
    out = io.StringIO()
    with Display(100_000, Output(file=out, force_terminal=True, color_system=None, width=width)) as display:
        display.show(RECORD, MERGES)
    shown = [line for line in re.sub("\x1b\\[[0-9;?]*[A-Za-z]", "", out.getvalue()).splitlines() if "20/100000" in line]
    assert shown and all("loss 1.5000 (max 3.0000)" in line and len(line.strip("\r")) <= width for line in shown)


def test_a_bar_on_a_terminal() -> None:
    text = shown(RESULT, terminal=True)
    assert "\x1b" in text and "20/100" in text


def test_a_task_without_classes_has_no_top1() -> None:
    assert "top-1" not in shown(RESULT | {"top1": None})


def test_a_run_in_groups_shows_what_a_group_sends() -> None:
    sent = {"total": 9_000_000, "between_groups": 400_000, "of_group": {"warmup": 500_000, "factors": 300_000}}
    lines = shown(RESULT | {"payload_bytes": sent, "group_size": 2}).splitlines()
    assert any("sent to other groups" in line and "800 kB per group" in line for line in lines)
