"""Measures the seconds of a merge of many small tensors, as multiples of those of one tensor with as many numbers.

python benchmarks/many_tensors.py [--tensors 50000] [--size 40] [--wires fp32 int4]

Two processes of one thread merge over the loopback interface, with `local_sgd` and `diloco`. `list` is a model of one
`nn.ParameterList`, and `layers` one of linear layers, each with two parameters of the given size together. The models
take turns, so that other programs slow all of them. `step` is the whole of an `ab.step()` that merges, `merge` is what
`ab.last_merges` calls `seconds`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from abtrain import ABTraining, recipes

RECIPES = ("local_sgd", "diloco")


class Listed(nn.Module):
    """A model of `count` parameters of `size` numbers, of which a forward pass uses the first."""

    def __init__(self, count: int, size: int) -> None:
        super().__init__()
        self.parts = nn.ParameterList([torch.randn(size) for _ in range(count)])

    def forward(self) -> Tensor:
        return self.parts[0].sum()


class Layered(nn.Module):
    """A model of linear layers with weights of 6 x 6."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(6, 6) for _ in range(count)))

    def forward(self) -> Tensor:
        return self.layers[0].weight.sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=50_000)
    parser.add_argument("--size", type=int, default=40)
    parser.add_argument("--wires", nargs="+", default=["fp32", "int4"])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--models", nargs="+")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--profile", help="the model whose merges rank 0 profiles")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (options, folder), nprocs=2)


def work(rank: int, options: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    if rank == 0:
        print("| recipe | wire | model | step ms | ratio | merge ms | ratio |\n|---|---|---|---|---|---|---|")
    for recipe in options.recipes:
        for wire in options.wires:
            compare(rank, recipe, wire, options)
    dist.destroy_process_group()


def compare(rank: int, recipe: str, wire: str, options: argparse.Namespace) -> None:
    makers: dict[str, Callable[[], nn.Module]] = {
        "one": lambda: Listed(1, options.tensors * options.size),
        "list": lambda: Listed(options.tensors, options.size),
        "one like layers": lambda: Listed(1, options.tensors // 2 * 42),
        "layers": lambda: Layered(options.tensors // 2),
    }
    loops = {name: begin(makers[name](), recipe, wire, options.turns + 2) for name in options.models or makers}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in loops}
    for turn in range(options.turns + 2):
        for name, (ab, optimizer) in loops.items():
            seconds[name].append(
                merge(ab, optimizer, profiled=rank == 0 and name == options.profile and turn == options.turns + 1)
            )
    if rank:
        return
    base = (1.0, 1.0)
    for name, times in seconds.items():
        # The first two turns map memory, and look at the state of the optimizer.
        step, merging = (statistics.median(column) for column in zip(*times[2:], strict=True))
        base = (step, merging) if name.startswith("one") else base
        print(
            f"| {recipe} | {wire} | {name} | {1000 * step:.1f} | {step / base[0]:.2f} | {1000 * merging:.1f} "
            f"| {merging / base[1]:.2f} |",
            flush=True,
        )


def begin(model: nn.Module, recipe: str, wire: str, steps: int) -> tuple[ABTraining, torch.optim.Optimizer]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return ABTraining(model, optimizer, recipes.build(recipe, steps + 1, every=1, wire=wire)), optimizer


def merge(ab: ABTraining, optimizer: torch.optim.Optimizer, profiled: bool) -> tuple[float, float]:
    ab().backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        parameters = list(ab.module.parameters())
        torch._foreach_add_(parameters, 0.01 * (1 + dist.get_rank()))
    dist.barrier()
    started = time.perf_counter()
    if profiled:
        profile(ab.step)
    else:
        ab.step()
    return time.perf_counter() - started, ab.last_merges[-1]["seconds"]


def profile(call: Any) -> None:
    import cProfile
    import pstats

    with cProfile.Profile() as profiler:
        call()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(30)


if __name__ == "__main__":
    main()
