"""The examples run, and plain DDP, the loop with abtrain and the trainer end with the same weights."""

from __future__ import annotations

import difflib
import json
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.processes import start
from tests.scripts import run_script

pytest.importorskip("sklearn", reason="the examples' data needs the extra 'data'")

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
STEPS = "40"
SETTINGS = ("--steps", STEPS, "--seed", "7", "--lr", "2e-3")
# A thread of Gloo that lets go of a tensor while Python takes itself apart aborts any script that ends as scripts do,
# with plain DDP too; workers of the command end otherwise (`abtrain.commands.process`).
GLOO_ABORTED = "terminate called without an active exception"


def launched(workers: int, name: str, *arguments: str, cwd: Path) -> str:
    """What an example prints that torchrun starts, as users start it."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
    command = [*launcher, str(EXAMPLES / name), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    for _ in range(2):
        ended = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=200)
        if GLOO_ABORTED not in ended.stderr:
            break
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def digest_in(shown: str) -> str:
    found = re.search(r"weights_digest=([0-9a-f]{64})", shown)
    assert found, shown
    return found[1]


def trained_by(recipe: str, cwd: Path) -> str:
    return digest_in(run_script(3, EXAMPLES / "with_abtrain.py", *SETTINGS, "--recipe", recipe, cwd=cwd))


def test_plain_ddp_and_ddp_through_abtrain_end_with_the_same_weights(tmp_path: Path) -> None:
    plain = digest_in(run_script(3, EXAMPLES / "plain_ddp.py", *SETTINGS, cwd=tmp_path))
    assert digest_in(launched(3, "with_abtrain.py", *SETTINGS, "--recipe", "ddp", cwd=tmp_path)) == plain
    ended = start(tmp_path, "train", "ddp", "--task", "digits-mlp", "--workers", "3", *SETTINGS, "--out", "run").wait()
    assert ended.code == 0, ended.err
    assert json.loads((tmp_path / "run" / "result.json").read_text())["weights_digest"] == plain


def test_a_sharded_model_is_trained_and_loaded_whole(tmp_path: Path) -> None:
    shown = run_script(4, EXAMPLES / "sharded.py", "--steps", "100", cwd=tmp_path)
    assert float(re.findall(r"error ([\d.]+)", shown)[0]) < 2.0


def test_a_loop_is_stopped_resumed_and_served_without_abtrain(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    script = str(EXAMPLES / "resumable.py")
    with subprocess.Popen([*command, script], stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=environment) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "step 100 is saved\n"
        run.send_signal(signal.SIGINT)
        rest, _ = run.communicate(timeout=60)
    stopped_at = int(re.findall(r"step (\d+) is saved", rest)[-1])
    assert run.returncode != 0 and 100 < stopped_at < 400 and "accuracy" not in rest
    shown = run_script(2, EXAMPLES / "resumable.py", cwd=tmp_path)
    assert "step 100" not in shown
    assert float(re.findall(r"accuracy ([\d.]+)%", shown)[0]) > 90
    code = "import sys, torch; sys.modules['abtrain'] = None; m = torch.export.load('small.pt2').module(); "
    code += "print(tuple(m(torch.rand(5, 1, 8, 8)).shape))"
    served = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=100)
    assert served.stdout == "(5, 10)\n", served.stderr


def test_the_example_trains_by_any_recipe(tmp_path: Path) -> None:
    assert trained_by("ab_outer", tmp_path) != trained_by("ab", tmp_path)


def test_the_first_page_shows_the_difference_of_the_examples() -> None:
    """In docs/index.md; all of it but the first line, which says what the example is."""
    plain, with_abtrain = (
        (EXAMPLES / name).read_text().splitlines()[1:] for name in ("plain_ddp.py", "with_abtrain.py")
    )
    changes = [line[0] + line[2:] for line in difflib.ndiff(plain, with_abtrain) if line[0] in "+-"]
    shown = re.search(r"```diff\n(.*?)```", (ROOT / "docs" / "index.md").read_text(), re.DOTALL)
    assert shown
    assert sorted(line for line in shown[1].splitlines() if line[:1] in ("+", "-")) == sorted(changes)


def test_the_demo_shows_both_and_the_next_steps(tmp_path: Path) -> None:
    # One worker needs no launcher, whose imports would take the most of the test.
    command = [sys.executable, str(EXAMPLES / "demo.py"), "--workers", "1", "--steps", STEPS, "--out", "demo"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=200)
    assert ended.returncode == 0, ended.stderr
    shown = ended.stdout[ended.stdout.rindex("digits-mlp, 1 workers") :]
    assert re.search(r"ddp +┃ ab_outer", shown) and "What to do next" in shown and "demo/ab_outer" in shown


def test_a_gpt_is_trained_and_tuned(tmp_path: Path) -> None:
    """The examples of two tutorials, with two workers and few steps: the second takes the model of the first."""
    trained = run_script(2, EXAMPLES / "gpt.py", "--steps", "30", cwd=tmp_path)
    assert re.search(r"factored 1\.\d\d : 1, \d\.\d\d MB sent by each worker", trained), trained
    assert (tmp_path / "gpt.pt").exists()
    tuned = run_script(2, EXAMPLES / "lora.py", "--steps", "20", cwd=tmp_path)
    before, after = re.findall(r"(\d\.\d{3}) (?:before|after)", tuned)
    assert float(after) < float(before), tuned
    assert (tmp_path / "tuned.pt").exists()


def test_tuning_says_which_program_writes_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", ["lora.py"])
    with pytest.raises(SystemExit, match=r"python examples/gpt\.py writes it"):
        runpy.run_path(str(EXAMPLES / "lora.py"), run_name="__main__")
