"""Trains a small network by plain DDP and by ab_outer, and shows both side by side: make demo"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--workers", default="4", metavar="N")
parser.add_argument("--steps", default="600", metavar="N")
parser.add_argument("--out", type=Path, default=Path("runs") / f"demo-{time.strftime('%Y%m%d-%H%M%S')}", metavar="PATH")
args = parser.parse_args()

settings = ("--task", "digits-mlp", "--workers", args.workers, "--steps", args.steps, "--log-every", "100")
results = {}
for recipe in ("ddp", "ab_outer"):
    command = ("-m", "abtrain", "train", recipe, *settings, "--out", str(args.out / recipe))
    subprocess.run([sys.executable, *command], check=True)
    results[recipe] = json.loads((args.out / recipe / "result.json").read_text())
    print()

table = Table(title=f"digits-mlp, {args.workers} workers, {args.steps} steps")
table.add_column("")
for recipe in results:
    table.add_column(recipe, justify="right")
for name, text in {
    "top-1": lambda result: f"{result['top1']:.2f} %",
    "sent per worker": lambda result: f"{result['payload_bytes']['total'] / 1e6:,.2f} MB",
    "relative to DDP": lambda result: f"{result['payload_ratio']:.2%}",
    "smaller model": lambda result: f"{result['compression']:.2f} : 1",
    "seconds": lambda result: f"{result['seconds']['total']:.1f}",
}.items():
    table.add_row(name, *map(text, results.values()))
Console(highlight=False).print(table)

abtrain, run = os.path.relpath(Path(sys.executable).with_name("abtrain")), args.out / "ab_outer"
print(
    f"""
On one machine nothing is gained by sending less. Over a slow link it is: ask `plan`.

What to do next:
  {abtrain} plan --task digits-mlp --rate 20mbit
  {abtrain} inspect {run}
  {abtrain} export {run} --as onnx
  your own model: examples/own_loop.py, and README.md, "Your own loop"
  two machines:   README.md, "Two machines\""""
)
