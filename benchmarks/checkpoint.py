"""What a checkpoint costs beside a plain safetensors save of the same tensors, both synced to the disk.

python benchmarks/checkpoint.py [MEBIBYTES] [ROUNDS]
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from abtrain import checkpoint
from abtrain.comm import SingleProcess


def plain(folder: Path, tensors: dict[str, Tensor], step: int) -> None:
    path = folder / f"plain-{step}.safetensors"
    save_file(tensors, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def ours(folder: Path, tensors: dict[str, Tensor], step: int) -> None:
    checkpoint.save(folder / "checkpoints", step, {"tensors": tensors}, SingleProcess(), keep=rounds)


size, rounds = (int(sys.argv[i]) if len(sys.argv) > i else default for i, default in ((1, 256), (2, 5)))
tensors = {f"layer{i}": torch.randn(2**18) for i in range(size)}
with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
    seconds: dict[str, list[float]] = {"plain": [], "checkpoint": []}
    for step in range(rounds):
        for kind, save in (("plain", plain), ("checkpoint", ours)):
            start = time.perf_counter()
            save(Path(name), tensors, step)
            seconds[kind].append(time.perf_counter() - start)
medians = {kind: statistics.median(times) for kind, times in seconds.items()}
print(f"{size} MiB: plain {medians['plain']:.3f} s, checkpoint {medians['checkpoint']:.3f} s")
print(f"ratio {medians['checkpoint'] / medians['plain']:.2f}")
