"""Measures steps and merges of GPT-2's shapes beside DDP, a plain all-reduce and a copy, in one run.

torchrun --nproc-per-node 2 benchmarks/scale.py [--sizes 10M 124M 350M] [--device cuda]

- A step: of a plain loop without communication, of DDP, and of abtrain's `ddp` and `local_sgd`. Each takes turns with
  the plain loop, and the table has the ratio of the medians.
- A merge with each wire takes turns with an all-reduce of all parameters in float32 and with `clone()` of them. Its
  peak memory is what the process (on CUDA: PyTorch) holds at most during the merge, beyond what it held before.

All workers are on one machine, so bytes cost next to nothing, and the table shows what abtrain itself costs. The first
rank writes a line of JSON for each size to results/scale.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from records import FOLDER, keep
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import abtrain
from abtrain import recipes
from abtrain.commands.tasks.models import GPT2_VOCABULARY, gpt2

SIZES = {"10M": (160, 4, 4), "124M": (768, 12, 12), "350M": (1024, 24, 16), "1B": (1408, 38, 22)}
"""Width, layers and heads. 10M and 1B are not sizes that GPT-2 was published in."""
WIRES = ("fp32", "bf16", "int8", "int4", "int3", "ternary")
COPIES = 6
"""Copies of the parameters in memory: themselves, gradients, anchors, momentum, residuals, the all-reduce."""
MANY = 1_000_000

Step = Callable[[], object]


class Clock:
    """Times calls of all ranks together, on the CPU or on this rank's GPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def seconds(self, act: Step) -> float:
        """Returns the seconds of a call that all ranks begin at the same time."""
        dist.barrier()
        self._wait()
        started = time.perf_counter()
        act()
        self._wait()
        return time.perf_counter() - started

    def peak(self, act: Step) -> tuple[float, int]:
        """Returns the seconds of a call, and the bytes that it needed at most beyond those held before."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            return self.seconds(act), torch.cuda.max_memory_allocated() - before
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        before = resident("VmRSS")
        return self.seconds(act), max(resident("VmHWM") - before, 0)

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


def resident(name: str) -> int:
    """Returns the resident bytes of this process: now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def medians(clock: Clock, turns: int, calls: dict[str, Step]) -> dict[str, float]:
    """Returns the median seconds of each call. They take turns, after one turn that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns + 1):
        for name, call in calls.items():
            seconds[name].append(clock.seconds(call))
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, tokens: tuple[int, int]) -> Step:
    """Returns a function that runs one training step on random tokens (samples, context), but for communication."""

    def step() -> None:
        x = torch.randint(GPT2_VOCABULARY, tokens, device=device)
        F.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return step


def build(size: str, device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = gpt2(*SIZES[size]).to(device)
    return model, torch.optim.SGD(model.parameters(), lr=1e-3)


def steps(size: str, clock: Clock, device: torch.device, options: argparse.Namespace) -> dict[str, float]:
    """Returns the seconds of a step of each kind, as multiples of a plain loop's."""
    ratios = {}
    for kind in ("DDP", "ddp", "local_sgd"):
        plain, optimizer = build(size, device)
        one = step_of(plain, optimizer, device, (options.batch, options.context))
        model, optimizer = build(size, device)
        if kind == "DDP":
            wrapped: Any = DistributedDataParallel(model)
            other: Step = step_of(wrapped, optimizer, device, (options.batch, options.context))
        else:
            recipe = recipes.ddp(MANY) if kind == "ddp" else recipes.local_sgd(MANY, every=MANY)
            wrapped = abtrain.ABTraining(model, optimizer, recipe, group_size=1)
            trains = step_of(wrapped, optimizer, device, (options.batch, options.context))
            other = lambda trains=trains, ab=wrapped: (trains(), ab.step())  # noqa: E731
        seconds = medians(clock, options.turns, {"plain": one, kind: other})
        ratios["plain seconds"], ratios[kind] = seconds["plain"], seconds[kind] / seconds["plain"]
        if kind != "DDP":
            wrapped.close()
    return ratios


def merge(recipe: str, wire: str, size: str, clock: Clock, device: torch.device, turns: int) -> dict[str, float]:
    """Measures merges beside all-reduces and copies. Returns their seconds and a merge's peak bytes."""
    model, optimizer = build(size, device)
    numbers = sum(p.numel() for p in model.parameters())
    ab = abtrain.ABTraining(model, optimizer, getattr(recipes, recipe)(MANY, every=1, wire=wire), group_size=1)
    train = step_of(ab, optimizer, device, (1, 8))
    flat = torch.ones(numbers, device=device)
    times: dict[str, list[float]] = {"merge": [], "all-reduce": [], "clone": []}
    peaks = []
    for _ in range(turns + 1):
        train()
        seconds, peak = clock.peak(ab.step)
        times["merge"].append(seconds)
        peaks.append(peak)
        times["all-reduce"].append(clock.seconds(lambda: dist.all_reduce(flat)))
        times["clone"].append(clock.seconds(flat.clone))
    ab.close()
    # The first merge also allocates what stays: anchors, momentum, residuals.
    found = {name: statistics.median(seconds[1:]) for name, seconds in times.items()}
    return {**found, "peak": max(peaks[1:]) / (4 * numbers), "first peak": peaks[0] / (4 * numbers)}


def merges(size: str, clock: Clock, device: torch.device, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    return {
        f"{recipe}, {wire}": merge(recipe, wire, size, clock, device, options.turns)
        for recipe in ("local_sgd", "diloco")
        for wire in options.wires
    }


def fits(numbers: int, device: torch.device) -> bool:
    """Whether the memory of this machine, or of each GPU, holds merges of so many parameters."""
    if device.type == "cuda":
        return COPIES * 4 * numbers < torch.cuda.get_device_properties(device).total_memory
    return COPIES * 4 * numbers * dist.get_world_size() < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def table(size: str, record: dict[str, Any]) -> str:
    """Returns the figures of one size in Markdown."""
    lines = [f"\n## {size}: {record['parameters'] / 1e6:.1f} M parameters, {record['workers']} workers\n"]
    if record["steps"]:
        plain = record["steps"].pop("plain seconds")
        ratios = ", ".join(f"{kind} {ratio:.3f}" for kind, ratio in record["steps"].items())
        lines += [f"A step takes {plain:.3f} s without communication. Times that: {ratios}.\n"]
    if record["merges"]:
        lines.append("| merge | seconds | x all-reduce | x clone | peak, x parameters | first peak |")
        lines.append("|---|" + "---:|" * 5)
    for name, m in record["merges"].items():
        ratio, copies = m["merge"] / m["all-reduce"], m["merge"] / m["clone"]
        lines.append(
            f"| {name} | {m['merge']:.3f} | {ratio:.1f} | {copies:.1f} | {m['peak']:.2f} | {m['first peak']:.2f} |"
        )
    return "\n".join(lines)


def measure(size: str, clock: Clock, device: torch.device, options: argparse.Namespace) -> dict[str, Any] | None:
    """Measures one size. Returns None, and says so, if memory does not hold it."""
    with torch.device("meta"):
        numbers = sum(p.numel() for p in gpt2(*SIZES[size]).parameters())
    if not fits(numbers, device):
        if dist.get_rank() == 0:
            print(f"\n## {size}: left out, since {COPIES} copies of {numbers:,} parameters do not fit into memory")
        return None
    trained = {} if options.merges_only or size == "1B" else steps(size, clock, device, options)
    return {
        "arguments": " ".join(sys.argv[1:]),
        "size": size,
        "parameters": numbers,
        "workers": dist.get_world_size(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "steps": trained,
        "merges": merges(size, clock, device, options),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["10M", "124M", "350M"])
    parser.add_argument("--wires", nargs="*", choices=WIRES, default=list(WIRES), help="of merges; none: only steps")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--merges-only", action="store_true", help="do not time steps")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "scale.py: PyTorch finds no CUDA GPU here: use --device cpu\n")
    if not dist.is_torchelastic_launched():
        parser.exit(2, "scale.py: start it by torchrun --nproc-per-node 2 benchmarks/scale.py\n")
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", dist.get_node_local_rank())
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    for size in options.sizes:
        record = measure(size, Clock(device), device, options)
        if record is not None and dist.get_rank() == 0:
            keep(FOLDER / "scale.jsonl", json.loads(json.dumps(record)))
            print(table(size, record), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
