"""All-reduces floats over all workers, and says what a ring all-reduce ought to send: for `abtrain lab`.

abtrain lab --nodes 4 --rate 100mbit -- benchmarks/allreduce.py --megabytes 10
abtrain lab --nodes 4 --rate 1gbit -- benchmarks/allreduce.py --megabytes 0.0004 --rounds 200 --pause 10

Of few bytes, the time of a hop is the latency that `abtrain plan --latency` asks for: of a message between two
workers, with all that their software and their processors add to it. In training, messages come with pauses between
them, and a processor that has gone to sleep is slow to answer: so `--pause` sleeps before every round, and is not
counted. Measure between as many workers as are going to train.
"""

from __future__ import annotations

import argparse
import os
import time

import torch
import torch.distributed as dist


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--pause", type=float, default=0.0, metavar="MS", help="sleep for so long before every round")
    options = parser.parse_args()
    dist.init_process_group("gloo")
    workers = dist.get_world_size()
    values = torch.ones(int(options.megabytes * 1e6) // 4)
    seconds = 0.0
    dist.barrier()
    for _ in range(options.rounds):
        time.sleep(options.pause / 1000)
        started = time.perf_counter()
        dist.all_reduce(values)
        values.div_(workers)
        seconds += time.perf_counter() - started
    assert values[0].item() == values[-1].item() == 1
    # A ring sends every worker's share around twice, but for its own.
    ring = options.rounds * 2 * (workers - 1) / workers * 4 * values.numel()
    hop = 1000 * seconds / options.rounds / (2 * (workers - 1))
    if os.environ["RANK"] == "0":
        rate = 8 * ring / seconds
        print(f"seconds={seconds:.3f} ring_bytes={ring:.0f} rate={rate:.0f} ms_a_hop={hop:.2f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
