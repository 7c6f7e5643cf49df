"""All-reduces floats over all workers, and says what a ring all-reduce ought to send: for `abtrain lab`.

abtrain lab --nodes 4 --rate 100mbit -- benchmarks/allreduce.py --megabytes 10
abtrain lab --nodes 4 --rate 1gbit -- benchmarks/allreduce.py --megabytes 0.0004 --rounds 200 --work 10

Of few bytes, the time of a hop is the latency that `abtrain plan --latency` asks for: of a message between two
workers, with all that their software and their processors add to it. With `--work`, each worker computes for about so
many milliseconds before every round, as it does in training: where workers share cores, they answer later then. That
computing itself, timed without an all-reduce before every round with one, is taken off. Seconds are those of the median
round, times the rounds: what else the machine does in between is not the link's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

_MATRIX = torch.ones(256, 256) / 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--work", type=float, default=0.0, metavar="MS", help="compute for so long before every round")
    options = parser.parse_args()
    dist.init_process_group("gloo")
    workers = dist.get_world_size()
    values = torch.ones(int(options.megabytes * 1e6) // 4)
    products = _products(options.work)

    def reduce() -> None:
        _work(products)
        dist.all_reduce(values)
        values.div_(workers)

    alone, reducing = [], []
    for _ in range(options.rounds):
        alone.append(_seconds(lambda: _work(products)))
        reducing.append(_seconds(reduce))
    seconds = options.rounds * (statistics.median(reducing) - statistics.median(alone))
    assert values[0].item() == values[-1].item() == 1
    # A ring sends every worker's share around twice, but for its own.
    ring = options.rounds * 2 * (workers - 1) / workers * 4 * values.numel()
    hop = 1000 * seconds / options.rounds / (2 * (workers - 1))
    if os.environ["RANK"] == "0":
        rate = 8 * ring / seconds
        print(f"seconds={seconds:.3f} ring_bytes={ring:.0f} rate={rate:.0f} ms_a_hop={hop:.2f}", flush=True)
    dist.destroy_process_group()


def _seconds(act: Callable[[], None]) -> float:
    """From a barrier on."""
    dist.barrier()
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def _products(milliseconds: float) -> int:
    """How many matrix products take a worker so long, next to all the others."""
    tried = 200
    return round(tried * milliseconds / (1000 * _seconds(lambda: _work(tried))))


def _work(products: int) -> None:
    for _ in range(products):
        _MATRIX @ _MATRIX


if __name__ == "__main__":
    main()
