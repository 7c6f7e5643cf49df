"""Measures the seconds of encoding and decoding by each code, as multiples of the seconds of copying the same tensor.

python benchmarks/codes.py [--numbers 20000000] [--threads 1]

A copy here is `clone()`, which also maps memory for its result. `into` decodes into existing memory instead, and `add`
adds decoded numbers to a sum. All calls take turns, so that other programs slow all of them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from abtrain.merging.wires.codes import CODES

COLUMNS = ("encode", "decode", "into", "add")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numbers", type=int, default=20_000_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    x = torch.randn(options.numbers // 640 * 640)
    calls = {("clone", ""): x.clone} | _calls(x)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for _ in range(options.turns + 1):
        for key, call in calls.items():
            started = time.perf_counter()
            call()
            seconds[key].append(time.perf_counter() - started)
    # The first turn maps the memory of buffers.
    median = {key: statistics.median(times[1:]) for key, times in seconds.items()}
    copy = median.pop(("clone", ""))
    print(f"{x.numel():,} numbers, {options.threads} threads: clone() takes {1000 * copy:.1f} ms\n")
    print(f"| code | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    for name in CODES:
        print(f"| {name} | {' | '.join(f'{median[name, column] / copy:.2f}' for column in COLUMNS)} |")


def _calls(x: Tensor) -> dict[tuple[str, str], Callable[[], object]]:
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    into, count = torch.zeros_like(x), x.numel()
    for name, code in CODES.items():
        data = code.encode(x)
        calls[name, "encode"] = lambda code=code: code.encode(x)
        calls[name, "decode"] = lambda code=code, data=data: code.decode(data, count)
        calls[name, "into"] = lambda code=code, data=data: code.decode(data, count, out=into)
        calls[name, "add"] = lambda code=code, data=data: code.add_decoded(data, into)
    return calls


if __name__ == "__main__":
    main()
