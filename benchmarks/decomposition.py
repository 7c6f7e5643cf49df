"""Compares the seconds to decompose all weights of GPT-2 124M with those of its training steps, in one thread.

python benchmarks/decomposition.py [REPETITIONS]

A step has 4 samples of 64 tokens, and AdamW. Seconds are those of the processor, since other programs would delay the
clock. Each repetition times a few steps, the decomposition of all weights at half of their full rank, and a full SVD
in float32 of one weight of each shape.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from abtrain.commands.tasks.models import gpt2
from abtrain.lowrank.classify import classify
from abtrain.lowrank.svd import MatrixShape, decompose
from abtrain.recipes.ab_outer import ab_outer
from abtrain.recipes.rank_rules import FixedRank

STEPS = 1000
TIMED = 3
CONTEXT, BATCH = 64, 4
RULE = FixedRank(384)


def seconds(act: Callable[[], object]) -> float:
    started = time.process_time()
    act()
    return time.process_time() - started


def make_step(model: nn.Module) -> Callable[[], None]:
    """Returns a function that runs one training step on random tokens."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        tokens = torch.randint(0, 50_257, (BATCH, CONTEXT + 1))
        logits = model(tokens[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def by_svd(W: Tensor) -> None:
    torch.linalg.svd(W, full_matrices=False)


def main() -> None:
    repetitions = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = gpt2()
    factoring = ab_outer(STEPS).factoring
    named = dict(model.named_parameters())
    weights = [named[one.name].detach() for one in classify(model, factoring) if one.kind == "factored"]
    matrices = [MatrixShape(W.shape).to_matrix(W) for W in weights]
    shapes = Counter(tuple(W.shape) for W in matrices)
    one_of = {shape: next(W for W in matrices if W.shape == shape) for shape in shapes}
    numbers = sum(p.numel() for p in model.parameters())
    in_weights = sum(W.numel() for W in matrices)
    print(f"{numbers:,} parameters, of which {in_weights:,} are in {len(matrices)} weights that may be factored")
    step = make_step(model)
    step()
    decompose(matrices[0], RULE)
    ratios = []
    for _ in range(repetitions):
        of_step = statistics.median(seconds(step) for _ in range(TIMED))
        ours = sum(seconds(lambda W=W: decompose(W, RULE)) for W in matrices)
        plain = sum(shapes[shape] * seconds(lambda W=W: by_svd(W)) for shape, W in one_of.items())
        ratios.append(ours / (STEPS * of_step))
        print(
            f"step {of_step:.2f} s, decomposition {ours:.1f} s ({ratios[-1]:.2%} of {STEPS:,} steps), "
            f"full SVD {plain:.1f} s ({plain / ours:.2f} times as long)"
        )
    low, high = min(ratios), max(ratios)
    print(f"decomposition over {STEPS:,} steps: {statistics.median(ratios):.2%} ({low:.2%} to {high:.2%})")


if __name__ == "__main__":
    main()
