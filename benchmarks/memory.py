"""Compares the predicted peak memory of a worker with that of real workers, on the CPU.

python benchmarks/memory.py [gpt2|small] [WORD...]

Each line is one run of two workers on this machine, with random tokens. With words, only runs whose name has one of
them. `gpt2` has the shapes of GPT-2 124M, with context 64 and batch 4. Lines are added to results/memory.jsonl.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from records import keep
from torch import nn
from torch.nn import functional as F

from abtrain import ABTraining, FixedRank, Recipe, recipes
from abtrain.comm.topology import Topology
from abtrain.commands.circumstances import hardware, versions
from abtrain.commands.memory import peak_memory
from abtrain.commands.plan.memory import OptimizerName, StepMemory, peak_of, predict_memory
from abtrain.commands.plan.shapes import shapes_of
from abtrain.commands.plan.step_memory import measure_steps
from abtrain.commands.tasks.models import GPT, gpt2
from abtrain.optim import muon_and_adamw

CONTEXT, BATCH, WORKERS = 64, 4, 2
RANK = 128
FACTORED: dict[str, Any] = {"every": 2, "warmup_steps": 2, "rank_rule": FixedRank(RANK)}
RECIPES: dict[str, Recipe] = {
    "ddp": recipes.ddp(3),
    "ddp bf16": recipes.ddp(3, wire="bf16"),
    "local_sgd": recipes.local_sgd(4, every=2),
    "local_sgd int4": recipes.local_sgd(4, every=2, wire="int4"),
    "diloco int4": recipes.diloco(4, every=2, wire="int4"),
    "diloco fp32": recipes.diloco(4, every=2),
    "diloco delay=5": recipes.diloco(8, every=6, delay=5, wire="int4"),
    "ab_local": recipes.ab_local(6, **FACTORED),
    "ab_outer": recipes.ab_outer(6, **FACTORED),
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": gpt2,
    "small": partial(GPT, vocabulary=2048, context=CONTEXT, width=256, depth=4),
}


def build(model: str, optimizer: OptimizerName) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    torch.manual_seed(0)
    built = MODELS[model]()
    if optimizer == "muon":
        return built, muon_and_adamw(built, lr=1e-4)
    if optimizer == "adamw":
        return built, [torch.optim.AdamW(built.parameters(), lr=1e-4)]
    return built, [torch.optim.SGD(built.parameters(), lr=0.01)]


def gradients(call: Callable[..., Any], model: nn.Module, seed: int) -> None:
    vocabulary = model.get_submodule("embedding").num_embeddings
    tokens = torch.randint(0, vocabulary, (BATCH, CONTEXT + 1), generator=torch.Generator().manual_seed(seed))
    F.cross_entropy(call(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()


def alone(name: str, optimizer: OptimizerName, ranks: dict[str, int]) -> tuple[int, int]:
    torch.set_num_threads(1)

    def made() -> Any:
        model, optimizers = build(name, optimizer)

        def step() -> None:
            gradients(model, model, 0)
            for one in optimizers:
                one.step()
                one.zero_grad()

        return model, optimizers, step

    return measure_steps(made, ranks)


def work(rank: int, file: str, name: str, optimizer: OptimizerName, recipe: Recipe) -> tuple[int, dict[str, int]]:
    """Trains as one worker. Returns its peak memory, and the ranks of its weights."""
    torch.set_num_threads(1)
    store = dist.FileStore(file, WORKERS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORKERS)
    model, optimizers = build(name, optimizer)
    ab = ABTraining(model, optimizers, recipe, group_size=1)
    while not ab.finished:
        gradients(ab, model, 2 * ab.steps_done + rank)
        for one in optimizers:
            one.step()
            one.zero_grad()
        ab.step()
    ranks = ab.rank_history[-1]["ranks"] if ab.rank_history else {}
    peak = peak_memory()
    dist.destroy_process_group()
    return peak, ranks


def new_processes(count: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"))


def measured(name: str, optimizer: OptimizerName, recipe: Recipe) -> tuple[int, dict[str, int]]:
    with tempfile.TemporaryDirectory() as folder, new_processes(WORKERS) as pool:
        file = str(Path(folder) / "store")
        runs = [pool.submit(work, rank, file, name, optimizer, recipe) for rank in range(WORKERS)]
        return max((run.result() for run in runs), key=lambda found: found[0])


def main(name: str = "gpt2", *words: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    known: dict[Any, tuple[int, int]] = {}
    out = Path(__file__).parent / "results" / "memory.jsonl"
    print("| optimizer | recipe | predicted | measured | difference | x parameters | moment |")
    print("|---|---|---|---|---|---|---|")
    for label, recipe in RECIPES.items():
        if words and not any(word in label for word in words):
            continue
        for optimizer in ("sgd", "adamw", "muon"):
            peak, ranks = measured(name, optimizer, recipe)
            for of in (dict[str, int](), ranks):
                if (optimizer, tuple(of)) not in known:
                    with new_processes(1) as pool:
                        known[optimizer, tuple(of)] = pool.submit(alone, name, optimizer, of).result()
            step = StepMemory.of(known[optimizer, ()], known[optimizer, tuple(ranks)] if ranks else None)
            with torch.device("meta"):
                model = shapes_of(MODELS[name](), recipe.factoring)
            moment = peak_of(predict_memory(recipe, model, Topology(WORKERS, 1), step, ranks, optimizer))
            row = {"model": name, "optimizer": optimizer, "recipe": label, "predicted": moment.total, "measured": peak}
            told = {"phase": moment.phase, "moment": moment.when, "parts": moment.parts}
            circumstances = {"versions": versions(), "hardware": hardware()}
            keep(out, {**row, **told, "step": dataclasses.asdict(step), "ranks": ranks, **circumstances})
            print(
                f"| {optimizer} | {label} | {moment.total / 1e6:,.0f} MB | {peak / 1e6:,.0f} MB | "
                f"{moment.total / peak - 1:+.1%} | {peak / (4 * model.numel):.2f} | {moment.phase}, {moment.when} |",
                flush=True,
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
