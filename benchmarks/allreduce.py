"""All-reduces floats over all workers, and says what a ring all-reduce ought to send: for `abtrain lab`.

abtrain lab --nodes 4 --rate 100mbit -- benchmarks/allreduce.py --megabytes 10
abtrain lab --nodes 4 --rate 1gbit -- benchmarks/allreduce.py --megabytes 0.0004 --rounds 200 --work 10

Of few bytes, the time of a hop is the latency that `abtrain plan --latency` asks for: of a message between two
workers, with all that their software and their processors add to it. With `--work`, each worker computes for about so
many milliseconds before every round, as it does in training: where workers share cores, they answer later then. That
computing itself, timed without all-reduces, is taken off.
"""

from __future__ import annotations

import argparse
import os
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
    alone = _seconds(options.rounds, lambda: _work(products))

    def reduce() -> None:
        _work(products)
        dist.all_reduce(values)
        values.div_(workers)

    seconds = _seconds(options.rounds, reduce) - alone
    assert values[0].item() == values[-1].item() == 1
    # A ring sends every worker's share around twice, but for its own.
    ring = options.rounds * 2 * (workers - 1) / workers * 4 * values.numel()
    hop = 1000 * seconds / options.rounds / (2 * (workers - 1))
    if os.environ["RANK"] == "0":
        rate = 8 * ring / seconds
        print(f"seconds={seconds:.3f} ring_bytes={ring:.0f} rate={rate:.0f} ms_a_hop={hop:.2f}", flush=True)
    dist.destroy_process_group()


def _seconds(rounds: int, act: Callable[[], None]) -> float:
    """Of so many rounds, from a barrier on."""
    dist.barrier()
    started = time.perf_counter()
    for _ in range(rounds):
        act()
    return time.perf_counter() - started


def _products(milliseconds: float) -> int:
    """How many matrix products take a worker so long, next to all the others."""
    tried = 200
    return round(tried * milliseconds / (1000 * _seconds(1, lambda: _work(tried))))


def _work(products: int) -> None:
    for _ in range(products):
        _MATRIX @ _MATRIX


if __name__ == "__main__":
    main()
