"""What a checkpoint costs beside a plain safetensors save of the same tensors, both synced to the disk.

python benchmarks/checkpoint.py [MEBIBYTES] [PAIRS]
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from abtrain.checkpoint import store as checkpoint
from abtrain.comm import SingleProcess


def plain(folder: Path, tensors: dict[str, Tensor], step: int) -> None:
    """What a user would write who asks for no more than that the bytes last."""
    folder.mkdir()
    path = folder / "plain.safetensors"
    save_file(tensors, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def ours(folder: Path, tensors: dict[str, Tensor], step: int) -> None:
    checkpoint.save(folder, step, {"tensors": tensors}, SingleProcess())


def main() -> None:
    size, pairs = (int(sys.argv[i]) if len(sys.argv) > i else default for i, default in ((1, 256), (2, 15)))
    # As in a network: a few large matrices, and many small vectors between them.
    shapes = [shape for _ in range(size // 16) for shape in ((2048, 2048 - 2), (2048,), (2048,), (2048,))]
    tensors = {f"layer{i}": torch.randn(shape) for i, shape in enumerate(shapes)}
    megabytes = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
    seconds: dict[str, list[float]] = {"plain": [], "checkpoint": []}
    savers = [("plain", plain), ("checkpoint", ours)]
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        for pair in range(pairs):
            # Whoever comes first finds another disk than who comes second.
            for kind, save in savers if pair % 2 else savers[::-1]:
                folder = Path(name) / kind
                start = time.perf_counter()
                save(folder, tensors, pair)
                seconds[kind].append(time.perf_counter() - start)
                shutil.rmtree(folder)
                os.sync()
    ratios = [mine / theirs for mine, theirs in zip(seconds["checkpoint"], seconds["plain"], strict=True)]
    medians = {kind: statistics.median(times) for kind, times in seconds.items()}
    print(f"{megabytes:.0f} MB, {pairs} pairs: " + ", ".join(f"{kind} {s:.3f} s" for kind, s in medians.items()))
    low, high = statistics.quantiles(ratios, n=4)[::2]
    print(f"ratio of a pair: median {statistics.median(ratios):.2f}, quartiles {low:.2f} to {high:.2f}")
    print(f"ratio of the medians: {medians['checkpoint'] / medians['plain']:.2f}")


if __name__ == "__main__":
    main()
