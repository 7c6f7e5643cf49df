"""Plain data parallel training on real data: torchrun --nproc-per-node 4 examples/plain_ddp.py"""

import argparse

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from abtrain import weights_digest
from abtrain.commands.tasks.evaluation import evaluate
from abtrain.commands.tasks.task import TASKS, batches, build_model, build_optimizer, build_schedule

parser = argparse.ArgumentParser()
parser.add_argument("--task", default="digits-mlp", choices=sorted(TASKS))
parser.add_argument("--steps", type=int, default=600)
parser.add_argument("--lr", type=float, default=1e-3)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
task = TASKS[args.task]
data = task.load(None)
loader = batches(task, data, seed=args.seed, rank=rank, world_size=world_size, batch_size=task.batch_size)

model = build_model(task, args.seed)
optimizer = build_optimizer(model, args.lr)
scheduler = build_schedule(optimizer, args.steps)
parallel = DistributedDataParallel(model)

for _ in range(args.steps):
    x, y = next(loader)
    loss = task.loss(parallel(x), y)
    loss.backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()

if rank == 0:
    print(f"{evaluate(model, task, data)} weights_digest={weights_digest(model)}")
dist.barrier()
dist.destroy_process_group()
