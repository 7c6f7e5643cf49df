"""What it costs that workers compare what they hold: python benchmarks/comparing.py [--layers 12] [--rounds 2]

Two processes on this machine train a GPT of GPT-2's shapes (124 M parameters, context 64, batch 1) with AdamW. They
merge every 20 steps. Measured are the seconds that a worker spends in comparing (settings, memory formats, initial
weights, replicas, what a round started from, buffers): their share of a round, and their number at the start.
Prints one line of JSON; `--keep` adds it to results/comparing.jsonl.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from records import FOLDER, keep
from torch import Tensor, nn

from abtrain import ABTraining, recipes
from abtrain.consistency import replicas
from abtrain.engine import ab_training as engine
from abtrain.engine import beginning
from abtrain.engine import phase_change as arrangement
from abtrain.merging import buffers, rounds
from abtrain.merging import merger as merge
from abtrain.merging import shared_tensors as state

VOCABULARY, WIDTH, CONTEXT, EVERY = 50257, 768, 64, 20


class GPT2(nn.Module):
    """The shapes of GPT-2; its output layer is its embedding."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(1024, WIDTH)
        block = functools.partial(
            nn.TransformerEncoderLayer, WIDTH, 12, 4 * WIDTH, 0.0, F.gelu, batch_first=True, norm_first=True
        )
        self.blocks = nn.ModuleList(block() for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return self.norm(x) @ self.tokens.weight.T


class Clock:
    """Adds up the seconds of calls. Calls within calls count once."""

    def __init__(self) -> None:
        self.seconds, self._inside = 0.0, False

    def watch(self, module: Any, name: str) -> None:
        """Times every call of a module's function from now on."""
        setattr(module, name, self._timed(getattr(module, name)))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            self._inside, start = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._inside = False
                self.seconds += time.perf_counter() - start

        return timed


def work(rank: int, folder: str, layers: int, count: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    clock = Clock()
    for module, name in (
        (beginning, "check_equal"),
        (engine, "check_replicas"),
        (arrangement, "check_phase"),
        (state, "agree_on_tensors"),
        (rounds, "check_replicas"),
        (rounds, "checksum"),
        (merge, "checksum"),
        (buffers, "checksum"),
        (replicas, "checksum"),
        (replicas, "check_replicas"),
    ):
        clock.watch(module, name)
    torch.manual_seed(0)
    model = GPT2(layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    recipe = recipes.local_sgd(EVERY * count, every=EVERY)
    dist.barrier()
    ab = ABTraining(model, optimizer, recipe, group_size=1)
    start = clock.seconds
    clock.seconds, begun = 0.0, time.perf_counter()
    while not ab.finished:
        tokens = torch.randint(VOCABULARY, (1, CONTEXT))
        F.cross_entropy(ab(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        ab.step()
    seconds = time.perf_counter() - begun
    if rank == 0:
        found = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "seconds_a_round": seconds / count,
            "comparing_a_round": clock.seconds / count,
            "share": clock.seconds / seconds,
            "seconds_at_start": start,
        }
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--keep", action="store_true", help="add the line to results/comparing.jsonl")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, (folder, options.layers, options.rounds), nprocs=2)
        found = json.loads(Path(folder, "found.json").read_text())
    arguments = f"--layers {options.layers} --rounds {options.rounds}"
    hardware = {"platform": platform.platform(), "cores": os.cpu_count(), "torch": torch.__version__}
    record = {"arguments": arguments, **found, "hardware": hardware}
    print(json.dumps(keep(FOLDER / "comparing.jsonl", record) if options.keep else record))


if __name__ == "__main__":
    main()
