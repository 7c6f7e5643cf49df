"""Measures the seconds of a merge of one large tensor, as multiples of those of a plain all-reduce of it, and memory.

python benchmarks/merge_time.py [--numbers 100000000] [--wires fp32 int8 int4 ternary]

Two processes of one thread work over the loopback interface, where bytes cost next to nothing. `step` is the whole of
an `ab.step()` that merges. `memory` is a worker's peak of resident memory beyond that of the same process after its
first training steps without a merge, as a multiple of the parameters. `--keep` adds a line for each case to
results/merge-time.jsonl.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
from records import FOLDER, keep
from torch import Tensor, nn

from abtrain import ABTraining, recipes


class Large(nn.Module):
    """A model of one weight, of which a forward pass uses a part."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count))

    def forward(self) -> Tensor:
        return self.weight.sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numbers", type=int, default=100_000_000)
    parser.add_argument("--wires", nargs="+", default=["fp32", "int8", "int4", "ternary"])
    parser.add_argument("--recipes", nargs="+", default=["local_sgd", "diloco"])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="print where rank 0 spends the last merge")
    parser.add_argument("--keep", action="store_true", help="add the figures to results/merge-time.jsonl")
    options = parser.parse_args()
    if os.environ.get("RANK") is None:
        print("| recipe | wire | all-reduce s | step s | ratio | cpu ratio | memory |\n|---|---|---|---|---|---|---|")
    for recipe in options.recipes:
        for wire in options.wires:
            with tempfile.TemporaryDirectory() as folder:
                # A process for each case, since the peak of memory never falls.
                torch.multiprocessing.spawn(work, (options, folder, recipe, wire), nprocs=2)


def work(rank: int, options: argparse.Namespace, folder: str, recipe: str, wire: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = Large(options.numbers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    turns = options.turns + 1
    ab = ABTraining(model, optimizer, recipes.build(recipe, 2 * turns + 1, every=2, wire=wire))
    plain, merges = list[tuple[float, float]](), list[tuple[float, float]]()
    before = 0
    for turn in range(turns):
        train(ab, optimizer)
        ab.step()
        before = before or peak()
        train(ab, optimizer)
        merges.append(timed(lambda last=turn == turns - 1: profiled(ab.step, options.profile and last and not rank)))
        memory = (peak() - before) / (4 * options.numbers)
        values = model.weight.detach().clone()
        plain.append(timed(lambda values=values: dist.all_reduce(values)))
        del values
    if rank == 0:
        (wall, cpu), (base, base_cpu) = (
            map(statistics.median, zip(*rows[1:], strict=True)) for rows in (merges, plain)
        )
        print(
            f"| {recipe} | {wire} | {base:.3f} | {wall:.3f} | {wall / base:.2f} | {cpu / base_cpu:.2f} "
            f"| {memory:.2f} |",
            flush=True,
        )
        if options.keep:
            figures = {"all_reduce": base, "step": wall, "ratio": wall / base, "memory": memory}
            arguments = f"{recipe} {wire} --numbers {options.numbers} --turns {options.turns}"
            circumstances = {"load": os.getloadavg()[0], "hardware": hardware()}
            keep(FOLDER / "merge-time.jsonl", {"arguments": arguments, **figures, **circumstances})
    dist.destroy_process_group()


def train(ab: ABTraining, optimizer: torch.optim.Optimizer) -> None:
    ab().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    with torch.no_grad():
        ab.module.weight[: len(ab.module.weight) // 2].add_(0.01 * torch.randn(1))


def timed(call: Any) -> tuple[float, float]:
    dist.barrier()
    started, busy = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - started, time.process_time() - busy


def profiled(call: Any, wanted: bool) -> None:
    if not wanted:
        call()
        return
    import cProfile
    import pstats

    with cProfile.Profile() as profiler:
        call()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def hardware() -> dict[str, Any]:
    return {"platform": platform.platform(), "cores": os.cpu_count(), "torch": torch.__version__}


def peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
