import threading
import time
from pathlib import Path

import pytest

from abtrain.commands.train import watchdog
from abtrain.commands.train.watchdog import Watchdog
from abtrain.errors import PeerLostError


def test_a_worker_that_hangs_says_where_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended, codes = threading.Event(), []
    monkeypatch.setattr(watchdog, "_MARGIN_SECONDS", 0.1)
    monkeypatch.setattr(watchdog.os, "_exit", lambda code: (codes.append(code), ended.set()))
    with Watchdog(0.1, "rank 3 on here", tmp_path / "stacks.txt") as dog:
        dog.beat("step 7, phase warmup")
        assert ended.wait(60)
    assert set(codes) == {6}
    said = capsys.readouterr().err.splitlines()[0]
    assert said.startswith(
        "abtrain: error: rank 3 on here made no progress for 0.2 s (step 7, phase warmup) and exits."
    )
    assert "test_a_worker_that_hangs" in (tmp_path / "stacks.txt").read_text()


def test_a_worker_that_makes_steps_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog.os, "_exit", lambda code: pytest.fail("it was alive"))
    with Watchdog(30, "rank 0", None) as dog:
        dog.beat("step 1")
        time.sleep(0.1)


def test_stacks_are_written_where_a_peer_is_lost(tmp_path: Path) -> None:
    with pytest.raises(PeerLostError), Watchdog(30, "rank 0", tmp_path / "stacks.txt"):
        raise PeerLostError("gone")
    assert "Current thread" in (tmp_path / "stacks.txt").read_text()
    assert Watchdog(30, "rank 0", tmp_path / "no" / "stacks.txt").dump().startswith("nowhere")
