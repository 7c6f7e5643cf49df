"""Starts labs one after another, kills some at a random moment, and looks for what is left. Needs root on Linux.

python benchmarks/lab_kills.py [--starts 20] [--kills 5]

A killed lab is left alone with its watcher every other time; the other times the watcher is killed too, and the next
lab has to find the leftovers.
"""

from __future__ import annotations

import argparse
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from abtrain.commands.lab import clean, namespaces

MOST_SECONDS = 3.5  # from the start to the kill: from before the first namespace to the middle of the script


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=20)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    doomed = set(chance.sample(range(options.starts - 1), options.kills))
    pids = []
    with tempfile.TemporaryDirectory() as name:
        script = Path(name) / "script.py"
        script.write_text("import time\ntime.sleep(3)\n")
        for start in range(options.starts):
            command = ("lab", "--launcher", "python", "--out", f"{name}/{start}", "--", str(script))
            lab = subprocess.Popen((sys.executable, "-m", "abtrain", *command), stdout=subprocess.DEVNULL)
            pids.append(lab.pid)
            if start in doomed:
                time.sleep(chance.uniform(0.2, MOST_SECONDS))
                kill(lab, with_watcher=len(pids) % 2 == 0)
            print(f"start {start}: exit code {lab.wait()}, {len(left(pids))} namespaces of all labs", flush=True)
    time.sleep(2)  # for the watcher of the last one
    report(pids)


def kill(lab: subprocess.Popen[bytes], with_watcher: bool) -> None:
    """Kills a lab's process, and its watcher where that is asked for."""
    children = Path(f"/proc/{lab.pid}/task/{lab.pid}/children").read_text().split() if with_watcher else []
    for child in children:
        if b"abtrain.commands.lab.watcher" in Path(f"/proc/{child}/cmdline").read_bytes():
            subprocess.run(("kill", "-KILL", child), check=True)
    lab.send_signal(signal.SIGKILL)


def left(pids: list[int]) -> list[str]:
    """The namespaces of these processes' labs."""
    owned = re.compile(rf"abtrain-lab-({'|'.join(map(str, pids))})-")
    return [path.name for path in namespaces.FOLDER.iterdir() if owned.match(path.name)]


def report(pids: list[int]) -> None:
    """Says what is left, and fails if anything is."""
    names, processes = left(pids), namespaces.processes_in(left(pids))
    print(f"left: {len(names)} namespaces, {len(processes)} processes in them; dead labs removed now: {clean()}")
    sys.exit(1 if names or processes else 0)


if __name__ == "__main__":
    main()
