"""Compares training steps of factored models with those of dense ones, and of layers written by hand, in one thread.

python benchmarks/compute.py [CASE...] [--pairs 15] [--returned] [--keep]

A step is a forward pass, a backward pass and a step of AdamW. Seconds are those of the processor, since other programs
would delay the clock. Each pair of steps gives one ratio, and each case has a limit for the median of its ratios.
Both steps run in this process, in which malloc keeps the memory of large tensors for the next step: the program starts
itself again with `KEPT_MEMORY` in its environment. With `--returned`, malloc returns this memory to the system.
`--keep` adds a line for each case to results/compute.jsonl.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torchvision
from records import FOLDER, keep
from torch import Tensor, nn

from abtrain.lowrank.classify import classify
from abtrain.lowrank.surgery import factorize_
from abtrain.lowrank.svd import Factors, MatrixShape
from abtrain.recipes.factoring import Factoring
from abtrain.recipes.rank_rules import FixedRank

WIDTH, HIDDEN, ROWS = 768, 3072, 6304
LARGEST = 9 * WIDTH * HIDDEN // (10 * (WIDTH + HIDDEN))
"""The largest rank at which recipes with `keep_dense_if_larger` factor the weights of the MLP block."""
KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(4 * 2**30), "MALLOC_TRIM_THRESHOLD_": str(16 * 2**30)}
"""Settings of glibc's malloc, which reads them when a process starts: no tensor gets pages of its own, and freed memory
stays in the process."""
Trains = Literal["all", "A", "B"]
Step = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """Two steps to compare. `build` returns ours and the other one.

    Attributes:
        slowdown: the largest allowed ratio of our seconds to the other's; None if `speedup` is the limit.
        speedup: the smallest allowed ratio of the other's seconds to ours.
    """

    name: str
    build: Callable[[], tuple[Step, Step]]
    slowdown: float | None = None
    speedup: float | None = None


def make_step(model: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor] | None = None) -> Step:
    """Returns a function that trains the trainable parameters of a model for one step; `run` is its compiled form."""
    run = run or model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    gradient = 1e-3 * torch.randn_like(model(x).detach())

    def step() -> None:
        run(x).backward(gradient)
        optimizer.step()
        optimizer.zero_grad()
        x.grad = None

    return step


def factor_(model: nn.Module, name: str, k: int, trains: Trains = "all") -> None:
    """Replaces a weight by random factors of rank k, of which those in `trains` are trained."""
    weight = model.get_parameter(name)
    shape, scale = MatrixShape(weight.shape), (float(weight.detach().std()) / k**0.5) ** 0.5
    record = factorize_(model, name, Factors(scale * torch.randn(shape.m, k), scale * torch.randn(k, shape.n)))
    record.A.requires_grad_(trains != "B")
    record.B.requires_grad_(trains != "A")


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))


def factored_mlp(k: int, trains: Trains) -> nn.Sequential:
    model = mlp()
    for name in ("0.weight", "2.weight"):
        factor_(model, name, k, trains)
    return model


def by_hand(k: int, trains: Trains) -> nn.Sequential:
    """The factored MLP block as a user would write it, with two plain layers for each weight."""
    model = nn.Sequential(
        nn.Linear(WIDTH, k, bias=False),
        nn.Linear(k, HIDDEN),
        nn.GELU(),
        nn.Linear(HIDDEN, k, bias=False),
        nn.Linear(k, WIDTH),
    )
    # A is the factor with the weight's larger dimension.
    for place, factor in ((0, "B"), (1, "A"), (3, "A"), (4, "B")):
        model.get_parameter(f"{place}.weight").requires_grad_(trains in ("all", factor))
    return model


def rows(inside: bool) -> Tensor:
    """Input of the MLP block; `inside` a model, it needs a gradient."""
    return torch.randn(ROWS, WIDTH, requires_grad=inside)


def against_hand(k: int, trains: Trains) -> tuple[Step, Step]:
    x = rows(inside=True)
    return make_step(factored_mlp(k, trains), x), make_step(by_hand(k, trains), x)


def against_dense(k: int, trains: Trains, inside: bool = True) -> tuple[Step, Step]:
    x = rows(inside)
    return make_step(factored_mlp(k, trains), x), make_step(mlp(), x)


def compiled(k: int, trains: Trains) -> tuple[Step, Step]:
    x, ours, dense = rows(inside=True), factored_mlp(k, trains), mlp()
    return make_step(ours, x, torch.compile(ours)), make_step(dense, x, torch.compile(dense))


def vit(images: int) -> tuple[Step, Step]:
    """ViT-B/16 with all weights of its encoder factored at one rank, at which it has a quarter of its parameters."""
    ours, dense, x = torchvision.models.vit_b_16(), torchvision.models.vit_b_16(), torch.randn(images, 3, 224, 224)
    eligible = classify(ours, Factoring(FixedRank(1), exclude=("conv_proj.*", "heads.*")))
    weights = [one for one in eligible if one.kind == "factored"]
    shapes = [MatrixShape(torch.Size(one.shape)) for one in weights]
    full = sum(p.numel() for p in ours.parameters())
    stay = full - sum(one.numel for one in weights)
    k = int((full / 4 - stay) / sum(shape.m + shape.n for shape in shapes))
    for one in weights:
        factor_(ours, one.name, k)
    print(f"ViT-B/16: {len(weights)} weights at rank {k}: {sum(p.numel() for p in ours.parameters()) / full:.3f}")
    return make_step(ours, x), make_step(dense, x)


def conv_block(k: int) -> tuple[Step, Step]:
    """Two 3x3 convolutions with norms, as in a ResNet, with weights and images in channels_last."""

    def block() -> nn.Sequential:
        layers = [
            layer for _ in range(2) for layer in (nn.Conv2d(128, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU())
        ]
        return nn.Sequential(*layers).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    ours, dense = block(), block()
    x = torch.randn(16, 128, 28, 28).to(memory_format=torch.channels_last).requires_grad_()
    for name in ("0.weight", "3.weight"):
        factor_(ours, name, k)
    return make_step(ours, x), make_step(dense, x)


def cases() -> Iterator[Case]:
    yield Case("vit", functools.partial(vit, 4), speedup=2.2)
    yield Case("conv", functools.partial(conv_block, 32), slowdown=1.05)
    one: tuple[Trains, ...] = ("A", "B")
    for trains in one:
        yield Case(f"hand-{trains}", functools.partial(against_hand, 96, trains), slowdown=1.05)
        yield Case(f"dense-{trains}", functools.partial(against_dense, 96, trains), speedup=3.0)
        yield Case(f"compiled-{trains}", functools.partial(compiled, 96, trains), speedup=4.0)
    yield Case("large-inside", functools.partial(against_dense, LARGEST, "all"), slowdown=1.05)
    every: tuple[Trains, ...] = ("all", *one)
    for trains in every:
        yield Case(f"large-{trains}", functools.partial(against_dense, LARGEST, trains, inside=False), slowdown=1.05)


def seconds(step: Step) -> float:
    started = time.process_time()
    step()
    return time.process_time() - started


def measure(case: Case, pairs: int) -> tuple[str, dict[str, float]]:
    """Returns a line for people, and the figures of a case."""
    ours, other = case.build()
    for step in (ours, other):
        step()
    times = []
    for pair in range(pairs):
        # Neither step is always the one that finds the cache as the other has left it.
        order = (ours, other) if pair % 2 else (other, ours)
        first, second = map(seconds, order)
        times.append((first, second) if pair % 2 else (second, first))
    ratios = [a / b if case.slowdown else b / a for a, b in times]
    found, limit = statistics.median(ratios), case.slowdown or case.speedup
    assert limit is not None
    kept = found <= limit if case.slowdown else found >= limit
    meaning = "our seconds over the other's, at most" if case.slowdown else "times as fast, at least"
    mine, others = (statistics.median(column) for column in zip(*times, strict=True))
    line = (
        f"{case.name:<18} {found:.3f} ({min(ratios):.3f} to {max(ratios):.3f}) {meaning} {limit}: "
        f"{'holds' if kept else 'FAILS'}; {1000 * mine:.0f} and {1000 * others:.0f} ms"
    )
    return line, {"ratio": found, "low": min(ratios), "high": max(ratios), "ours": mine, "other": others}


def main() -> None:
    known = {case.name: case for case in cases()}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(known)}; all by default")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--returned", action="store_true", help="let malloc return the memory of large tensors")
    parser.add_argument("--keep", action="store_true", help="add the figures to results/compute.jsonl")
    options = parser.parse_args()
    if unknown := set(options.cases) - set(known):
        parser.error(f"unknown cases: {', '.join(sorted(unknown))}")
    if not options.returned and not KEPT_MEMORY.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEPT_MEMORY})
    if options.returned and KEPT_MEMORY.keys() & os.environ.keys():
        parser.error(f"--returned needs an environment without {' and '.join(KEPT_MEMORY)}: unset them")
    torch.set_num_threads(1)
    hardware = {"platform": platform.platform(), "cores": os.cpu_count(), "torch": torch.__version__}
    for name in options.cases or known:
        torch.manual_seed(0)
        torch._dynamo.reset()
        line, found = measure(known[name], options.pairs)
        print(line, flush=True)
        if options.keep:
            returned = " --returned" * options.returned
            record = {"arguments": f"{name} --pairs {options.pairs}{returned}", **found}
            keep(FOLDER / "compute.jsonl", {**record, "load": os.getloadavg()[0], "hardware": hardware})


if __name__ == "__main__":
    main()
