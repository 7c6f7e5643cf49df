"""The same loop with abtrain: torchrun --nproc-per-node 4 examples/with_abtrain.py --recipe ab_outer"""

import argparse

import torch.distributed as dist

from abtrain import ABTraining, recipes, weights_digest
from abtrain.commands.tasks.evaluation import evaluate
from abtrain.commands.tasks.task import TASKS, batches, build_model, build_optimizer, build_schedule

parser = argparse.ArgumentParser()
parser.add_argument("--task", default="digits-mlp", choices=sorted(TASKS))
parser.add_argument("--steps", type=int, default=600)
parser.add_argument("--lr", type=float, default=1e-3)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--recipe", default="ab_outer", choices=sorted(recipes.RECIPES))
parser.add_argument("--group-size", type=int, default=1)
args = parser.parse_args()

dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
task = TASKS[args.task]
data = task.load(None)
loader = batches(task, data, seed=args.seed, rank=rank, world_size=world_size, batch_size=task.batch_size)

model = build_model(task, args.seed)
optimizer = build_optimizer(model, args.lr)
scheduler = build_schedule(optimizer, args.steps)
ab = ABTraining(model, optimizer, recipes.build(args.recipe, args.steps), group_size=args.group_size)

for _ in range(args.steps):
    x, y = next(loader)
    loss = task.loss(ab(x), y)
    loss.backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    ab.step()

if rank == 0:
    print(f"{evaluate(model, task, data)} weights_digest={weights_digest(ab.dense_state_dict())}")
dist.barrier()
dist.destroy_process_group()
