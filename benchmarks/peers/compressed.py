"""MuLoCo in 2 bits and SparseLoCo, written after their authors' code and papers, since no package index has them.

MuLoCo (arXiv 2505.23725, and github.com/facebookresearch/MuLoCo, commit 15ee278): Muon inside, rounds of 30 steps. A
matrix's change is sent in four levels a row, from error feedback that decays by 0.9; embeddings, output layers and
norms are sent as they are. The mean is rounded once more, and an outer SGD with Nesterov momentum follows it.

SparseLoCo (arXiv 2508.15706): AdamW inside. Of every 4,096 numbers of a change, to which 0.95 of what was not sent
before is added, the 64 largest are sent, in four levels a tensor. The weights follow the mean.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from abtrain.commands.tasks.task import Task, build_optimizers, build_schedule
from abtrain.commands.train.trainer import clip_gradients, loss_of

_LEVELS, _SIGMAS = 4, 6.0
_CHUNK, _KEPT = 4096, 64
_BITS = 2
Compress = Callable[[str, Tensor], tuple[Tensor, float]]
"""Returns what receivers get of a named change, and its bits."""


class Rounds:
    """Local steps, and an outer optimizer that follows the mean of the workers' compressed changes.

    Attributes:
        payload: the bytes that this worker has handed over: each message once, as a reduce-scatter and an all-gather.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        options: argparse.Namespace,
        compress: Compress,
        *,
        decay: float,
        outer_lr: float,
        outer_momentum: float = 0.0,
        rounds_mean: bool = False,
    ) -> None:
        self._task, self.model, self._every = task, model, options.every
        self._optimizers = build_optimizers(model, options.optimizer, options.lr, task.weight_decay)
        self._schedules = [build_schedule(one, options.steps, task.lr_warmup) for one in self._optimizers]
        self._compress, self._decay, self._rounds_mean = compress, decay, rounds_mean
        self._anchors = {name: p.detach().clone() for name, p in model.named_parameters()}
        self._errors = {name: torch.zeros_like(anchor) for name, anchor in self._anchors.items()}
        momentum = {"momentum": outer_momentum, "nesterov": True} if outer_momentum else {}
        self._outer = torch.optim.SGD(self._anchors.values(), lr=outer_lr, **momentum)
        # MuLoCo's code multiplies what it sends by the outer rate as well.
        self._scale = outer_lr
        self._done = 0
        self.payload = 0.0

    def step(self, x: Tensor, y: Tensor) -> None:
        loss_of(self.model, self._task, x, y, self._task.precision).backward()
        clip_gradients(self._optimizers, self._task.clip)
        for optimizer, schedule in zip(self._optimizers, self._schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        self._done += 1
        if self._done % self._every == 0:
            self._merge()

    def finish(self) -> nn.Module:
        if self._done % self._every:
            self._merge()
        for buffer in self.model.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= dist.get_world_size()
        return self.model

    @torch.no_grad()
    def _merge(self) -> None:
        for name, parameter in self.model.named_parameters():
            anchor, error = self._anchors[name], self._errors[name]
            error.mul_(self._decay).add_(anchor - parameter, alpha=self._scale)
            sent, bits = self._compress(name, error)
            error -= sent
            self.payload += bits / 8
            dist.all_reduce(sent)
            sent /= dist.get_world_size()
            anchor.grad = self._compress(name, sent)[0] if self._rounds_mean else sent
        self._outer.step()
        for name, parameter in self.model.named_parameters():
            parameter.copy_(self._anchors[name])


def muloco(task: Task, model: nn.Module, options: argparse.Namespace) -> Rounds:
    """MuLoCo with 2 bits and error feedback."""
    whole = _whole(model)

    def compress(name: str, change: Tensor) -> tuple[Tensor, float]:
        if name in whole:
            return change.clone(), 32.0 * change.numel()
        rows = change.flatten(1) if change.ndim > 1 else change.unsqueeze(0)
        return _levels(rows).view(change.shape), _BITS * rows.numel() + 32.0 * (1 + _LEVELS) * len(rows)

    outer = {"outer_lr": options.outer_lr or 0.8, "outer_momentum": options.outer_momentum}
    return Rounds(task, model, options, compress, decay=0.9, **outer, rounds_mean=True)


def sparseloco(task: Task, model: nn.Module, options: argparse.Namespace) -> Rounds:
    """SparseLoCo with 64 of 4,096 numbers in 2 bits."""

    def compress(_: str, change: Tensor) -> tuple[Tensor, float]:
        flat = change.flatten()
        chunks = nn.functional.pad(flat, (0, -flat.numel() % _CHUNK)).view(-1, _CHUNK)
        # Of a tensor that is smaller than a chunk, the same share is kept.
        kept = max(1, round(_KEPT * min(flat.numel(), _CHUNK) / _CHUNK))
        places = chunks.abs().topk(kept).indices
        values = _levels(chunks.gather(1, places).view(1, -1)).view(places.shape)
        sent = torch.zeros_like(chunks).scatter_(1, places, values).view(-1)[: flat.numel()]
        return sent.view(change.shape), (_BITS + 12) * values.numel() + 32.0 * (1 + _LEVELS)

    return Rounds(task, model, options, compress, decay=0.95, outer_lr=options.outer_lr or 1.0)


METHODS: Mapping[str, Callable[[Task, nn.Module, argparse.Namespace], Rounds]] = {
    "muloco": muloco,
    "sparseloco": sparseloco,
}


def _levels(rows: Tensor) -> Tensor:
    """Rounds each row to four levels: the means of what falls into bins that its mean and deviation give."""
    mean = rows.mean(1, keepdim=True)
    centred = rows - mean
    deviation = centred.norm(dim=1, keepdim=True) / max(rows.shape[1] - 1, 1) ** 0.5
    width = (_SIGMAS * deviation / _LEVELS).masked_fill(deviation == 0, 1.0)
    bins = (centred / width + _LEVELS // 2).round().clamp(0, _LEVELS - 1).long()
    sums = torch.zeros(len(rows), _LEVELS).scatter_add_(1, bins, centred)
    counts = torch.zeros(len(rows), _LEVELS).scatter_add_(1, bins, torch.ones_like(centred))
    return (sums / counts.clamp(min=1)).gather(1, bins) + mean


def _whole(model: nn.Module) -> set[str]:
    """Returns the names of the parameters that MuLoCo sends as they are: those of embeddings, norms and the output."""
    kinds = (nn.Embedding, nn.LayerNorm, nn.BatchNorm2d)
    modules = dict(model.named_modules())
    output = [name for name, module in modules.items() if isinstance(module, nn.Linear)][-1]
    found = {name for name, _ in model.named_parameters() if isinstance(modules[name.rpartition(".")[0]], kinds)}
    return found | {f"{output}.weight"}
