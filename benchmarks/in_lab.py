"""Compares other libraries with this one on the same links: python benchmarks/in_lab.py --rate 100mbit (as root)

Every host of the lab has one worker. Bytes are those that its interface sent, start-up and the first broadcast of the
weights included. Seconds are those of the training loop. The result of a run is a line of
benchmarks/results/in-lab.jsonl, and a run with a line there is not repeated. `--table` prints the results that exist
and runs nothing. `--speed STEPS` runs fewer steps: enough to measure the seconds of a step where a whole run would
take hours.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from records import FOLDER, Record, RecordedRun, in_short, keep, say

from abtrain.commands.lab import Job, Lab, LabConfig, parse_link_rate
from abtrain.commands.runs.folder_run import run_once

FILE = FOLDER / "in-lab.jsonl"
PEER_LOOPS = Path(__file__).parent / "peers" / "loops.py"
LINES = {
    "solo": "abtrain solo",
    "DDP": "peer ddp",
    "DDP, bf16 hook": "peer ddp-bf16",
    "DDP, PowerSGD hook, rank 1": "peer powersgd --rank 1",
    "DDP, PowerSGD hook, rank 2": "peer powersgd --rank 2",
    "PostLocalSGDOptimizer, every 20": "peer post-local-sgd --every 20",
    "Accelerate LocalSGD, every 20": "peer accelerate-local-sgd --every 20",
    "Accelerate LocalSGD, every 50": "peer accelerate-local-sgd --every 50",
    "Accelerate LocalSGD, every 100": "peer accelerate-local-sgd --every 100",
    "diloco, int4": "abtrain diloco:wire=int4",
    "ab_outer, int4": "abtrain ab_outer:wire=int4",
    "ab_outer": "abtrain ab_outer",
}
REFERENCE_BYTES, REFERENCE_SECONDS, LIMIT = "DDP", "DDP, bf16 hook", "solo"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", default="100mbit")
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--task", default="fashion-cnn")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--speed", type=int, default=None, metavar="STEPS", help="run only so many, for their seconds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--lr", default="2e-3")
    parser.add_argument("--only", nargs="+", help="labels to run; all by default")
    parser.add_argument("--table", action="store_true", help="print the results that exist, run nothing")
    options = parser.parse_args()
    steps = options.speed or options.steps
    place = f"--nodes {options.nodes} --rate {options.rate}"
    common = f"--task {options.task} --steps {steps} --lr {options.lr}"
    runs = {
        label: [RecordedRun(FILE, f"{command} {common} --seed {seed} {place}") for seed in options.seeds]
        for label, command in LINES.items()
        if not options.only or label in options.only
    }
    if not options.table:
        config = LabConfig(nodes=options.nodes, rates=(parse_link_rate(options.rate),))
        run_once([run for own in runs.values() for run in own], _runner(config, place), say, in_short)
    records = {label: [run.record for run in own] for label, own in runs.items()}
    found = {label: there for label, own in records.items() if (there := [record for record in own if record])}
    print(f"\n{options.task}, {steps} steps, learning rate {options.lr}, {options.nodes} hosts at {options.rate}\n")
    print("| | runs | top-1 | MB a host | of DDP's | ms a step | DDP bf16's over it | used |")
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join(_rows(found, steps)))


@contextlib.contextmanager
def _runner(config: LabConfig, place: str) -> Iterator[Callable[[RecordedRun], None]]:
    with Lab(config) as lab:
        yield lambda run: _run(lab, run, place)


def _run(lab: Lab, run: RecordedRun, place: str) -> None:
    owner, *arguments = shlex.split(run.arguments.removesuffix(place))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        if owner == "peer":
            program, file = [str(PEER_LOOPS), *arguments, "--out", str(out / "result.json")], out / "result.json"
        else:
            program = ["-m", "abtrain", "train", *arguments, "--out", str(out / "run")]
            file = out / "run" / "result.json"
        result = lab.run(Job(tuple(program), out / "lab"))
        came = json.loads(file.read_text())
    seconds = came["seconds"]["total"] if owner == "abtrain" else came["seconds"]
    keep(
        FILE,
        {
            "arguments": run.arguments,
            "top1": came["top1"],
            "loss": came["loss"],
            "seconds": seconds,
            "wire_bytes": result.wire_bytes,
            "lab_seconds": result.seconds,
            "versions": came["versions"],
            "hardware": {"cores": os.cpu_count()},
        },
    )


def _rows(runs: dict[str, list[Record]], steps: int) -> list[str]:
    size = {label: _mean(records, "wire_bytes") for label, records in runs.items()}
    step = {label: 1000 * _mean(records, "seconds") / steps for label, records in runs.items()}
    rows = []
    for label, records in runs.items():
        cells = (
            label,
            str(len(records)),
            f"{_mean(records, 'top1'):.2f}",
            f"{size[label] / 1e6:.1f}",
            _over(size.get(REFERENCE_BYTES), size[label], "1/{:.0f}"),
            f"{step[label]:.1f}",
            _over(step.get(REFERENCE_SECONDS), step[label], "{:.2f}"),
            _over(step.get(LIMIT), step[label], "{:.0%}"),
        )
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _mean(records: Sequence[Record], name: str) -> float:
    return statistics.fmean(record[name] for record in records)


def _over(one: float | None, other: float, text: str) -> str:
    return "-" if one is None else text.format(one / other)


if __name__ == "__main__":
    main()
