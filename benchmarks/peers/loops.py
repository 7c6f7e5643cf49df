"""Trains a task by a method of another library, through that library's own code: under torchrun, or in `abtrain lab`.

    torchrun --nproc-per-node 4 benchmarks/peers/loops.py powersgd --rank 1 --task fashion-cnn --out result.json

Model, data, batches, optimizer and schedule are those of `abtrain train`, so that a run differs by the method alone.
Each loop is written as its library's documentation has it. Methods without a library are in compressed.py.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from compressed import METHODS
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, post_localSGD_hook, powerSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.nn.parallel import DistributedDataParallel

from abtrain import weights_digest
from abtrain.commands.tasks.evaluation import evaluate
from abtrain.commands.tasks.task import TASKS, Task, batches, build_model, build_optimizer, build_schedule

Step = Callable[[Tensor, Tensor], None]
Finish = Callable[[], nn.Module]


def main() -> None:
    options = _options()
    dist.init_process_group("gloo")
    rank, workers = dist.get_rank(), dist.get_world_size()
    task = TASKS[options.task]
    data = task.load(None)
    loader = batches(task, data, seed=options.seed, rank=rank, world_size=workers, batch_size=task.batch_size)
    model = build_model(task, options.seed)
    method = METHODS[options.peer](task, model, options) if options.peer in METHODS else None
    step, finish = (method.step, method.finish) if method else PEERS[options.peer](task, model, options)
    dist.barrier()
    started = time.perf_counter()
    for _ in range(options.steps):
        step(*next(loader))
    trained = finish()
    dist.barrier()
    seconds = time.perf_counter() - started
    if rank == 0:
        result = {
            **evaluate(trained, task, data),
            "seconds": seconds,
            "parameters": sum(parameter.numel() for parameter in trained.parameters()),
            "payload_bytes": method.payload if method else None,
            "weights_digest": weights_digest(trained),
            "versions": {"torch": torch.__version__, **_version_of(options.peer)},
            "hardware": {"cores": os.cpu_count(), "threads_per_worker": torch.get_num_threads()},
        }
        options.out.write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=sorted([*PEERS, *METHODS]))
    parser.add_argument("--task", default="fashion-cnn", choices=sorted(TASKS))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rank", type=int, default=1, help="of PowerSGD's matrices")
    parser.add_argument("--every", type=int, default=20, help="steps between the averages of local SGD, or rounds")
    parser.add_argument("--optimizer", default="adamw", choices=["adamw", "muon"], help="of MuLoCo and SparseLoCo")
    parser.add_argument("--outer-lr", type=float, help="of MuLoCo and SparseLoCo; by default as published")
    parser.add_argument("--outer-momentum", type=float, default=0.9, help="of MuLoCo")
    parser.add_argument(
        "--plain-steps", type=int, default=10, help="steps of plain DDP before PowerSGD or local SGD begins"
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the result, written by rank 0")
    return parser.parse_args()


def _ddp(task: Task, model: nn.Module, options: argparse.Namespace) -> tuple[Step, Finish]:
    """DistributedDataParallel, gradients in float32."""
    return _hooked(task, DistributedDataParallel(model), options)


def _ddp_bf16(task: Task, model: nn.Module, options: argparse.Namespace) -> tuple[Step, Finish]:
    """DistributedDataParallel with PyTorch's bf16 hook."""
    parallel = DistributedDataParallel(model)
    parallel.register_comm_hook(None, default_hooks.bf16_compress_hook)
    return _hooked(task, parallel, options)


def _powersgd(task: Task, model: nn.Module, options: argparse.Namespace) -> tuple[Step, Finish]:
    """DistributedDataParallel with PyTorch's PowerSGD hook, error feedback and warm start on (arXiv 1905.13727)."""
    # On Gloo the hook hangs or aborts with more than one bucket: its messages get another order on every rank.
    parallel = DistributedDataParallel(model, bucket_cap_mb=1024)
    state = powerSGD_hook.PowerSGDState(
        process_group=None,
        matrix_approximation_rank=options.rank,
        start_powerSGD_iter=max(2, options.plain_steps),  # the least that PyTorch takes with error feedback
        min_compression_rate=1,
    )
    parallel.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    return _hooked(task, parallel, options)


def _hooked(task: Task, parallel: DistributedDataParallel, options: argparse.Namespace) -> tuple[Step, Finish]:
    """The plain loop: all communication is DDP's."""
    optimizer = build_optimizer(parallel, options.lr)
    scheduler = build_schedule(optimizer, options.steps)

    def step(x: Tensor, y: Tensor) -> None:
        task.loss(parallel(x), y).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    return step, lambda: parallel.module


def _post_local_sgd(task: Task, model: nn.Module, options: argparse.Namespace) -> tuple[Step, Finish]:
    """PostLocalSGDOptimizer: DDP for the first steps, then averages of the parameters (arXiv 1808.07217)."""
    # Every worker is a machine, so there is nobody to share gradients with between two averages.
    alone, _ = dist.new_subgroups(group_size=1)
    parallel = DistributedDataParallel(model)
    state = post_localSGD_hook.PostLocalSGDState(
        process_group=None, subgroup=alone, start_localSGD_iter=options.plain_steps, post_local_gradient_allreduce=False
    )
    parallel.register_comm_hook(state, post_localSGD_hook.post_localSGD_hook)
    inner = build_optimizer(parallel, options.lr)
    averager = PeriodicModelAverager(period=options.every, warmup_steps=options.plain_steps)
    optimizer = PostLocalSGDOptimizer(optim=inner, averager=averager)
    scheduler = build_schedule(inner, options.steps)

    def step(x: Tensor, y: Tensor) -> None:
        task.loss(parallel(x), y).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    def finish() -> nn.Module:
        # The averages come in the first step of a period: the last steps would be left out of the result.
        _average(parallel.module, with_parameters=True)
        return parallel.module

    return step, finish


def _accelerate_local_sgd(task: Task, model: nn.Module, options: argparse.Namespace) -> tuple[Step, Finish]:
    """Hugging Face Accelerate's LocalSGD."""
    from accelerate import Accelerator
    from accelerate.local_sgd import LocalSGD

    accelerator = Accelerator(cpu=True)
    raw = build_optimizer(model, options.lr)
    scheduler = build_schedule(raw, options.steps)  # Accelerate's wrapper would step it once for every worker
    parallel, optimizer = accelerator.prepare(model, raw)
    local = LocalSGD(accelerator=accelerator, model=parallel, local_sgd_steps=options.every)
    local.__enter__()

    def step(x: Tensor, y: Tensor) -> None:
        accelerator.backward(task.loss(parallel(x), y))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        local.step()

    def finish() -> nn.Module:
        local.__exit__(None, None, None)
        trained: nn.Module = accelerator.unwrap_model(parallel)
        _average(trained, with_parameters=False)
        return trained

    return step, finish


def _average(model: nn.Module, *, with_parameters: bool) -> None:
    """Averages running statistics, which local SGD leaves alone, so that every method is judged by the mean's."""
    tensors = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if with_parameters:
        tensors += [parameter.data for parameter in model.parameters()]
    for tensor in tensors:
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()


def _version_of(peer: str) -> dict[str, str]:
    if peer != "accelerate-local-sgd":
        return {}
    from importlib.metadata import version

    return {"accelerate": version("accelerate")}


PEERS: dict[str, Callable[[Task, nn.Module, argparse.Namespace], tuple[Step, Finish]]] = {
    "ddp": _ddp,
    "ddp-bf16": _ddp_bf16,
    "powersgd": _powersgd,
    "post-local-sgd": _post_local_sgd,
    "accelerate-local-sgd": _accelerate_local_sgd,
}

if __name__ == "__main__":
    main()
